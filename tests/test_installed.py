"""The wheel in an environment of its own, away from the checkout: the first hour of a user, in small."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import httpx
import pytest
from command import free_port

from neo_nb.synthetic.crowds import make_scenes

ROOT = Path(__file__).resolve().parent.parent
UV = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
OURS = ("NEO_", "FIFTYONE", "PYTHONPATH", "TRACKIO", "VIRTUAL_ENV")


def clean() -> dict[str, str]:
    """This process's environment, without what it knows of the checkout."""
    return {key: value for key, value in os.environ.items() if not key.startswith(OURS)}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An environment with what predicting and evaluating need, and photos with labels beside it."""
    place = tmp_path_factory.mktemp("installed")
    if UV is None:
        pytest.skip("uv makes the environment, and it is not here")
    made = subprocess.run([UV, "build", "-q", "--wheel", "-o", place, ROOT], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no wheel without a package index: {made.stderr.strip().splitlines()[-1]}")
    subprocess.run([UV, "venv", "-q", "--python", sys.executable, place / "venv"], check=True)
    install(place, "")
    photos = place / "photos"
    for kind in ("images", "labels"):
        (photos / kind).mkdir(parents=True)
    table = make_scenes(40, (180, 320), 5, place / "drawn")
    for i, one in enumerate(table):
        shutil.copy(one.path, photos / "images" / f"{i:03d}.jpg")
        height, width = one.size
        lines = []
        for (x1, y1, x2, y2), label in zip(one.boxes_xyxy.tolist(), one.labels.tolist()):
            box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(" ".join([str(label), *(f"{value:.6f}" for value in box)]))
        (photos / "labels" / f"{i:03d}.txt").write_text("\n".join(lines))
    (photos / "labels" / "classes.txt").write_text("\n".join(table.class_names))
    return place


def install(place: Path, extras: str) -> None:
    [wheel] = place.glob("*.whl")
    words = [UV, "pip", "install", "-q", "--python", place / "venv" / "bin" / "python", "-c", ROOT / "constraints.txt"]
    done = subprocess.run([*words, f"{wheel}{extras}"], capture_output=True, text=True, env=clean())
    if done.returncode:
        pytest.skip(f"no packages without a package index: {done.stderr.strip().splitlines()[-1]}")


def neo(place: Path, *words: str, at: str = ".") -> subprocess.CompletedProcess:
    command = [place / "venv" / "bin" / "neo", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=place / at, env=clean(), timeout=900)


def works(place: Path, *words: str) -> str:
    done = neo(place, *words, at="birds")
    assert done.returncode == 0, f"neo {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def serves(place: Path) -> None:
    """What the Dockerfiles do after the wheel is in: the extra, and the command of the image."""
    lacking = neo(place, "serve", "2", at="birds")
    assert lacking.returncode == 2 and 'pip install "neo_nb[serve]"' in lacking.stderr, lacking.stderr
    install(place, "[serve]")
    port = free_port()
    words = [place / "venv" / "bin" / "neo", "serve", "3", "--port", str(port)]
    process = subprocess.Popen(words, cwd=place / "birds", env=clean(), stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
        photo = (place / "new.jpg").read_bytes()
        answer = httpx.post(f"http://127.0.0.1:{port}/detect", files={"file": ("new.jpg", photo)})
        assert answer.status_code == 200 and answer.json()["images"][0]["height"] == 180, answer.text
    finally:
        process.terminate()
        assert process.wait(60) == 0


PYTHON = """
from neo_nb import load_detector
detector = load_detector("best")
found = detector("../new.jpg", threshold=0.0)
assert len(found) == 1 and found[0].plot().size == (320, 180)
found.filter(0.0, classes=["person"]).save("out.json")
print(detector.class_names, found.num_boxes)
"""


def test_the_first_hour(place):
    """Make a workspace, import, train, evaluate, export, predict, look at errors, and the same from Python."""
    outside = neo(place, "data", "list")
    assert outside.returncode == 2 and "neo init" in outside.stderr, "outside of a workspace it says so"
    assert neo(place, "init", "birds").returncode == 0
    lacking = neo(place, "train", "--data", "mine", at="birds")
    assert lacking.returncode == 2 and 'pip install "neo_nb[train]"' in lacking.stderr, lacking.stderr
    install(place, "[train,fiftyone,pretrained]")

    imported = works(place, "data", "import", "../photos", "mine", "--val", "0.25")
    assert "40" in imported, imported
    works(place, "train", "--data", "mine", "--minutes", "0.4", "--size", "192", "320", "--batch-size", "4")
    [run] = (place / "birds" / "reports").glob("0001-*")
    for name in ("report.html", "weights/best.safetensors", "metrics.json", "results.csv"):
        assert (run / name).is_file(), name
    works(place, "evaluate", "last")
    works(place, "export", "1")
    cv2.imwrite(str(place / "new.jpg"), cv2.imread(str(place / "photos" / "images" / "000.jpg")))
    works(place, "predict", "best", "../new.jpg", "--threshold", "0.05")
    assert len(json.loads(works(place, "runs", "--json"))["runs"]) == 4
    serves(place)
    python = [place / "venv" / "bin" / "python", "-c", PYTHON]
    done = subprocess.run(python, capture_output=True, text=True, cwd=place / "birds", env=clean())
    assert done.returncode == 0 and (place / "birds" / "out.json").is_file(), done.stderr

    errors = neo(place, "errors", "1", at="birds")
    if "database cannot start" not in errors.stderr:
        assert errors.returncode == 0, errors.stderr
    inside = {path.name for path in (place / "birds").iterdir()}
    assert inside == {
        ".gitignore",
        "README.md",
        "data",
        "data_manifests",
        "nbs",
        "out.json",
        "reports",
        "settings.ini",
    }
    beside = {path.name for path in place.iterdir() if path.suffix != ".whl"}
    assert beside - {".gitignore"} == {"venv", "photos", "drawn", "birds", "new.jpg"}, (
        "nothing outside of the workspace"
    )
