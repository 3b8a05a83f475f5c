"""An exported file against the weights it was made from: boxes, scores and AP, at other sizes than that of the training.

    python tests/export_proof.py FOLDER RUN [RUN ...] [--sizes 640x640 1088x1920] [--images 100] [--data bccd]
        [--cell 240x320]

exports each trained run in fp32 and fp16, and detects on sheets: half of them real photos of a data set (the run's),
put side by side at one size (that of the run's training), half of them drawn crowds. AP is that on the photos. The
fp16 file is run with the roundings of a GPU written into its graph. Killed and called again, it goes on with what is
left. Writes export-proof.md into FOLDER."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from neo_nb.base.annotations import Annotations
from neo_nb.base.core import atomic_write, derive_seed
from neo_nb.base.detections import Detections, concat, load_detections, save_detections
from neo_nb.base.geometry import fit
from neo_nb.base.run_folders import find_detector
from neo_nb.data.loader import read_image
from neo_nb.data.manifest import load_dataset
from neo_nb.data.resize import resize_image
from neo_nb.deploy.detector import Detector, TorchDetector, load_detector
from neo_nb.deploy.half import emulated_detector, to_half
from neo_nb.deploy.onnx import compare, export_onnx
from neo_nb.evaluate.coco_metrics import coco_metrics
from neo_nb.synthetic.crowds import draw_scene

Images = Callable[[int], np.ndarray]
MOST = 8  # Photos on a sheet: a detector of 300 queries has room for what is on them
GROUND = 114


def photo_sheets(
    table: Annotations, size: tuple[int, int], cell: tuple[int, int], count: int
) -> tuple[Images, Annotations]:
    "Photos on free cells of a grid, and the table of all sheets."
    rows, columns = size[0] // cell[0], size[1] // cell[1]
    sheets, offsets, boxes, labels = [], [0], [], []
    for sheet in range(count):
        rng = np.random.default_rng(derive_seed(0, "sheet", *size, sheet))
        free = rng.permutation(rows * columns)[:MOST]
        sheets.append([(int(at), int(photo)) for at, photo in zip(free, rng.integers(len(table), size=len(free)))])
        for at, photo in sheets[-1]:
            one = table[photo]
            height, width = fit(one.size, cell)
            corner = np.float32([at % columns * cell[1], at // columns * cell[0]] * 2)
            boxes.append(one.boxes_xyxy * np.float32([width / one.size[1], height / one.size[0]] * 2) + corner)
            labels.append(one.labels)
        offsets.append(sum(map(len, boxes)))

    def image(sheet: int) -> np.ndarray:
        made = np.full((*size, 3), GROUND, np.uint8)
        for at, photo in sheets[sheet]:
            one = table[photo]
            small = resize_image(read_image(one.path, one.size), fit(one.size, cell))
            top, left = at // columns * cell[0], at % columns * cell[1]
            made[top : top + small.shape[0], left : left + small.shape[1]] = small
        return made

    ids = np.arange(count)
    names, sizes = [f"sheet-{i}" for i in ids], np.tile(size, (count, 1))
    return image, Annotations(
        ids,
        names,
        sizes,
        offsets,
        np.concatenate(boxes),
        np.concatenate(labels),
        table.class_names,
        table.category_ids,
    )


def detect_all(detector: Detector, image: Images, count: int, file: Path) -> Detections:
    "What a detector finds, from the disk when it was found before."
    if not file.exists():
        parts = []
        for row in range(count):
            found = detector.detect_images([image(row)])
            columns = (found.image_index + row, found.boxes_xyxy, found.scores, found.labels)
            parts.append(Detections(*columns, count, found.class_names, found.category_ids))
            print(f"{file.stem}: {row + 1}/{count}", end="\r", flush=True)
        save_detections(concat(parts), file)
    return load_detections(file)


def prove_run(
    run: Path, size: tuple[int, int], count: int, folder: Path, data: str | None, cell: tuple[int, int] | None
) -> list[str]:
    "Rows of the table: one for each precision."
    original = load_detector(find_detector(run))
    model, data = original.model, data or original.record["data"].partition("/")[0]
    stem = f"{model.model_name}-{size[0]}x{size[1]}"
    fp32 = folder / f"{stem}-fp32.onnx"
    fp16 = folder / f"{stem}-fp16.onnx"
    if not fp32.exists():
        export_onnx(model, fp32, size=size)
    if not fp16.exists():
        to_half(fp32, fp16)
    photos, truth = photo_sheets(load_dataset(data, "val"), size, cell or original.size, count // 2)

    def image(row: int) -> np.ndarray:
        seed = derive_seed(1, "scene", *size, row)
        return photos(row) if row < count // 2 else draw_scene(seed, size)[0]

    torch_detector = TorchDetector(model, size, original.record)
    detectors = {
        "torch": lambda: torch_detector,
        "fp32": lambda: load_detector(fp32),
        "fp16": lambda: emulated_detector(fp16),
    }
    found = {name: detect_all(make(), image, count, folder / f"{stem}-{name}.npz") for name, make in detectors.items()}
    on_photos = {name: boxes.select(boxes.image_index < count // 2) for name, boxes in found.items()}
    ap = {}
    for name, boxes in on_photos.items():
        columns = (boxes.image_index, boxes.boxes_xyxy, boxes.scores, boxes.labels)
        ap[name] = coco_metrics(Detections(*columns, len(truth), boxes.class_names), truth, 300)["AP"]
    lines = []
    for name in ("fp32", "fp16"):
        said = compare(found["torch"], found[name])
        lines.append(
            f"| `{model.model_name}` | {size[0]}x{size[1]} | {name} | {said['detections']:,} | {said['agreement']:.4f} "
            f"| {said['box_difference']:.2g} | {said['score_difference']:.2g} | {ap['torch']:.4f} | {ap[name]:.4f} |"
        )
        print(lines[-1])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--sizes", nargs="+", default=["640x640", "1088x1920"])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--data")
    parser.add_argument("--cell", type=lambda text: tuple(map(int, text.split("x"))))
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    heads = ("model", "size", "file", "detections ≥ .05", "agree", "box, px", "score", "AP, torch", "AP, file")
    text = ["# Exported files against their weights", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in asked.runs:
        for size in asked.sizes:
            height, width = map(int, size.split("x"))
            text += prove_run(run, (height, width), asked.images, asked.folder, asked.data, asked.cell)
    with atomic_write(asked.folder / "export-proof.md") as path:
        path.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    sys.exit(main())
