"""runtime.hpp of an export, compiled and held to runtime.py: needs a C++ compiler and the headers of ONNX Runtime.

`ORT_INCLUDE` names the folder of onnxruntime_cxx_api.h, where it is not in a usual place. The library is that of the
Python package.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from neo_nb.deploy.onnx import export_onnx
from neo_nb.jobs.runtime import Detector, cpp_runtime
from neo_nb.models.zoo import create_model

PLACES = (os.environ.get("ORT_INCLUDE"), "/usr/include/onnxruntime", "/usr/include", "/usr/local/include/onnxruntime")
MAIN = r"""
#include "runtime.hpp"
#include <cstdio>
#include <fstream>
#include <iterator>

int main(int count, char** words) {  // model, then file, height and width of each image
    neo::Detector detect(words[1]);
    std::vector<std::vector<uint8_t>> pixels;
    std::vector<neo::Image> images;
    for (int k = 2; k + 2 < count; k += 3) {
        std::ifstream file(words[k], std::ios::binary);
        pixels.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        images.push_back({nullptr, std::stoi(words[k + 1]), std::stoi(words[k + 2])});
    }
    for (size_t k = 0; k < images.size(); ++k) images[k].rgb = pixels[k].data();
    const auto found = detect.many(images);
    if (!images.empty() && detect(images[0]).size() != found[0].size()) return 1;
    for (size_t k = 0; k < found.size(); ++k)
        for (const neo::Box& b : found[k])
            std::printf("%zu %s %.6f %.4f %.4f %.4f %.4f\n", k, neo::class_names[b.class_id], b.confidence, b.x1, b.y1, b.x2, b.y2);
}
"""


@pytest.fixture(scope="module")
def build():
    compiler = shutil.which("c++") or shutil.which("g++")
    include = next((p for p in PLACES if p and Path(p, "onnxruntime_cxx_api.h").is_file()), None)
    [library] = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    if compiler is None or include is None:
        pytest.skip("no C++ compiler, or no headers of ONNX Runtime (ORT_INCLUDE)")

    def make(folder: Path) -> Path:
        (folder / "main.cpp").write_text(MAIN)
        words = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-isystem", include, "main.cpp"]
        (folder / "libonnxruntime.so.1").symlink_to(library)  # the name that the library has for programs
        words += ["-o", "main", "libonnxruntime.so.1", "-Wl,-rpath,$ORIGIN"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder / "main"

    return make


@pytest.mark.parametrize("batch, resize", [("dynamic", "letterbox"), (2, "stretch")])
def test_the_header_says_what_the_python_runtime_says(build, batch, resize, tmp_path):
    model = create_model("rtdetr_nano", class_names=["cat", 'a "dog"'])
    file = export_onnx(model, tmp_path / "model.onnx", size=(96, 128), batch=batch)
    shape = onnxruntime.InferenceSession(str(file)).get_inputs()[0].shape
    about = {"input_shape": shape, "class_names": ["cat", 'a "dog"'], "confidence_threshold": 0.0}
    about["preprocessing"] = {"content_size": [96, 128], "resize_mode": resize}
    (tmp_path / "metadata.json").write_text(json.dumps(about))
    (tmp_path / "runtime.hpp").write_text(cpp_runtime(about))
    rng = np.random.default_rng(0)
    shapes = [(96, 128), (192, 256), (150, 120), (333, 517), (40, 60), (60, 500)]  # as it is, halved, odd, larger
    images = [
        rng.integers(0, 255, (h // 4 + 1, w // 4 + 1, 3), np.uint8).repeat(4, 0).repeat(4, 1)[:h, :w]
        for h, w in shapes
    ]
    words = [str(file)]
    for number, image in enumerate(images):
        (tmp_path / f"{number}.rgb").write_bytes(np.ascontiguousarray(image).tobytes())
        words += [f"{number}.rgb", *map(str, image.shape[:2])]
    done = subprocess.run([build(tmp_path), *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs: list[list] = [[] for _ in images]
    for line in done.stdout.splitlines():
        head, rest = line.split(" ", 1)
        name, *numbers = rest.rsplit(" ", 5)
        theirs[int(head)].append((name, *map(float, numbers)))
    for number, (ours, found) in enumerate(zip(Detector(tmp_path).many(images), theirs)):
        assert len(ours) == len(found) > 20 and {name for name, *_ in found} <= {*about["class_names"]}
        scores = np.sort([row["confidence"] for row in ours]) - np.sort([row[1] for row in found])
        assert np.abs(scores).max() < (1e-4 if shapes[number] in ((96, 128), (192, 256)) else 5e-3), shapes[number]
        if number == 0:  # nothing was scaled: box by box
            rows = [(row["class_name"], row["confidence"], *row["bbox"]) for row in ours]
            assert np.abs(np.array([r[1:] for r in rows]) - np.array([r[1:] for r in found])).max() < 2e-3
