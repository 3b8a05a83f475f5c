"""Sliced inference: any detector in tiles, and from one end of the command line to the other."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_merge import apart, same_set
from test_tiles import smooth

from neo_nb.base.annotations import Annotations
from neo_nb.base.boxes import box_iou
from neo_nb.base.detections import Detections
from neo_nb.cli.main import main
from neo_nb.data.loader import read_image
from neo_nb.data.tiles import tile_table
from neo_nb.deploy.detector import Detector, load_detector
from neo_nb.deploy.merge_tiles import to_image_coords
from neo_nb.deploy.tiled import TiledDetector

ROOT = Path(__file__).resolve().parent.parent


class Eye(Detector):
    "A detector that sees patches of one colour each: the class is in the red, the score in nothing."

    kind = "eye"

    def __init__(self):
        contract = {"class_names": ("a", "b"), "category_ids": (1, 2), "contract": {"divisor": 32}}
        super().__init__(contract | {"model": "eye", "config": {"num_queries": 300}}, (64, 64))
        self.looks = []

    def detect_images(self, images, batch_size=None):
        self.looks.append([image.shape[:2] for image in images])
        rows = []
        for number, image in enumerate(images):
            code = image.astype(int) @ (1 << 16, 1 << 8, 1)
            for value in np.unique(code[code > 0]).tolist():
                y, x = np.nonzero(code == value)
                box = x.min(), y.min(), x.max() + 1, y.max() + 1
                rows.append((number, *box, 0.3 + value % 7 / 10, (value >> 16) % 2))
        columns = np.array(rows, float).reshape(-1, 7)
        return Detections(columns[:, 0], columns[:, 1:5], columns[:, 5], columns[:, 6], len(images), ("a", "b"))


def painted(rng, size, boxes, labels):
    "A black image with a patch of a colour of its own for each box."
    image = np.zeros((*size, 3), np.uint8)
    for number, ((x1, y1, x2, y2), label) in enumerate(zip(boxes.tolist(), labels.tolist())):
        image[y1:y2, x1:x2] = label + 2, number // 200 + 1, number % 200 + 1
    return image


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("large", [0, 10**9])
def test_slices_find_every_patch_once(tmp_path, monkeypatch, whole, large):
    from neo_nb.data import tiles

    monkeypatch.setattr(tiles.RegionReader.__init__, "__defaults__", (None, large))
    rng = np.random.default_rng(0)
    photos, truth, labels = [], [], []
    for row in range(6):
        size = tuple(int(n) for n in rng.integers(60, 400, 2))
        boxes = apart(rng, size, 25, 4, 60, gap=2).round().astype(int)
        truth.append(boxes)
        labels.append(rng.integers(0, 2, len(boxes)))
        photos.append(painted(rng, size, boxes, labels[-1]))
        cv2.imwrite(str(tmp_path / f"{row}.png"), photos[-1][..., ::-1])
    table = Annotations(np.arange(6), [f"{r}.png" for r in range(6)], [p.shape[:2] for p in photos], [0] * 7,
                        np.zeros((0, 4)), [], ("a", "b"), root=tmp_path)  # fmt: skip
    eye = Eye()
    sliced = TiledDetector(eye, (100, 120), 0.2, whole)
    for found in (sliced.detect_images(photos, batch_size=3), sliced.predict(table, batch_size=3, progress=False)):
        assert found.num_images == 6
        for row in range(6):
            assert same_set(found.for_image(row), truth[row].astype(float), labels[row])
    seen = [shape for batch in eye.looks for shape in batch]
    assert max(map(len, eye.looks)) == 3
    windows = [w for p in photos for w in sliced.windows(p.shape[:2]).tolist()]
    assert seen == [(y2 - y1, x2 - x1) for x1, y1, x2, y2 in windows] * 2


def tiny(folder):
    "A detector with weights of chance that says something everywhere."
    import torch

    from neo_nb.models import create_model, save_weights

    torch.manual_seed(0)
    model = create_model("rtdetr_nano", class_names=("person", "head"), num_queries=30).eval()
    model.size = (96, 96)
    save_weights(model, folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


def test_without_overlap_objects_inside_tiles_are_what_each_tile_says():
    rng, size, tile = np.random.default_rng(1), (300, 480), (100, 120)
    windows, boxes = TiledDetector(Eye(), tile, 0.0, whole=False).windows(size), []
    assert len(windows) == 12
    for x1, y1, _, _ in windows.tolist():
        boxes += [apart(rng, (90, 110), 6, 6, 40, gap=3).round() + np.tile((x1 + 5, y1 + 5), 2)]
    boxes = np.concatenate(boxes).astype(int)
    image = painted(rng, size, boxes, rng.integers(0, 2, len(boxes)))
    predicted = TiledDetector(Eye(), tile, 0.0, whole=False).detect_images([image])
    alone = Eye().detect_images([image[y1:y2, x1:x2] for x1, y1, x2, y2 in windows.tolist()])
    moved = alone.boxes_xyxy + np.tile(windows[alone.image_index, :2], 2)

    def rows(boxes, scores, labels):
        return sorted(map(tuple, np.column_stack([boxes, scores, labels]).tolist()))

    assert predicted.num_boxes == len(boxes) > 50
    assert rows(predicted.boxes_xyxy, predicted.scores, predicted.labels) == rows(moved, alone.scores, alone.labels)
    assert rows(predicted.boxes_xyxy, predicted.scores, predicted.labels) == rows(*(getattr(Eye().detect_images([image]), k) for k in (
        "boxes_xyxy", "scores", "labels"))), "and what is seen in the whole image"  # fmt: skip


def test_without_overlap_a_slice_says_what_the_tile_alone_says(tmp_path):
    detector = load_detector(tiny(tmp_path))
    image = smooth(np.random.default_rng(0), (200, 290))
    sliced = TiledDetector(detector, (100, 145), 0.0, whole=False, lowest=0.0)
    predicted, inside, cut = sliced.detect_images([image]), [], []
    for window in sliced.windows((200, 290)).tolist():
        x1, y1, x2, y2 = window
        moved, frames = to_image_coords(detector.detect_images([image[y1:y2, x1:x2]]), np.array([window]), (200, 290))
        whole = np.isnan(frames).all(1)
        cut.append(moved.boxes_xyxy[~whole])  # joined with what the neighbour says
        inside.append(moved.select(np.flatnonzero(whole)).nms(0.6))
    cut, compared = np.concatenate(cut), 0
    for tile in inside:
        for box, score, label in zip(tile.boxes_xyxy, tile.scores, tile.labels):
            if len(cut) and box_iou(box[None], cut).max() > 0:
                continue
            near = (abs(predicted.boxes_xyxy - box).max(1) < 0.01) & (predicted.labels == label)
            assert (abs(predicted.scores[near] - score) < 1e-4).sum() == 1, (box, score)
            compared += 1
    assert compared >= 10
    one = TiledDetector(detector, (500, 500), lowest=0.0).detect_images([image])
    direct = detector.detect_images([image])
    assert np.array_equal(one.boxes_xyxy, direct.boxes_xyxy) and np.array_equal(one.scores, direct.scores)


# from one end to the other


@pytest.fixture
def neo(tmp_path, monkeypatch, capsys):
    "The command line in a workspace of its own: exit status, standard output, standard error."
    place = tmp_path / "place"
    (place / "data_manifests").mkdir(parents=True)
    for name in ("settings.ini", "pyproject.toml", "nbs"):
        (place / name).symlink_to(ROOT / name)
    monkeypatch.chdir(place)
    monkeypatch.setenv("NEO_ROOT", str(place))
    for key in ("reports", "data"):
        monkeypatch.setenv(f"NEO_{key.upper()}", str(place / key))
    monkeypatch.setenv("TRACKIO_DIR", str(place / "trackio"))

    def call(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        return status, *capsys.readouterr()

    return call


SCENES = """format: scenes
root: crowd
classes: [person, head]
size: [180, 320]
splits:
  train: {num_images: 6, seed: 0}
  val: {num_images: 3, seed: 1}
"""


def test_a_data_set_in_tiles_is_a_data_set(neo, tmp_path):
    place = tmp_path / "place"
    (place / "data_manifests" / "crowd.yaml").write_text(SCENES)
    status, out, err = neo("data", "tile", "crowd", "--tile", 96, 128, "--overlap", 0.25, "--json")
    assert status == 0, err
    predicted = json.loads(out)
    from neo_nb.data.manifest import load_dataset

    for split in ("train", "val"):
        table, source = load_dataset("crowd-tiles", split), load_dataset("crowd", split)
        expected, counted = tile_table(source, (96, 128), 0.25, empty=0.15 if split == "train" else 1e9)
        assert len(table) == len(expected) == predicted[split]["tiles"] and predicted[split] == counted.__dict__
        assert table.boxes_xyxy == pytest.approx(expected.boxes_xyxy, abs=0.01)
        assert np.array_equal(table.labels, expected.labels) and np.array_equal(table.iscrowd, expected.iscrowd)
        assert np.array_equal(table.sizes, expected.sizes)
        for row in range(len(table)):
            assert read_image(table[row].path).shape[:2] == table[row].size
    assert predicted["val"]["empty_left_out"] == 0
    status, out, err = neo("data", "check", "crowd-tiles", "--json")
    assert status == 0, out
    status, _, err = neo("data", "tile", "crowd")
    assert status == 2 and "already" in err and "--to" in err
    assert neo("data", "tile", "crowd", "--split", "val", "--tile", 64, 64, "--to", "small")[0] == 0
    assert neo("data", "check", "small")[0] == 0


@pytest.mark.parametrize("words, told", [
    (("--tile", 8, 8), "at least 32"), (("--tile", 64, 64, "--overlap", 1), "0..1"), (("--tile", "64x48"), "which of them is the height"),
])  # fmt: skip
def test_tiles_that_cannot_be_are_refused_before_anything_starts(neo, tmp_path, words, told):
    (tmp_path / "place" / "data_manifests" / "crowd.yaml").write_text(SCENES)
    weights = tiny(tmp_path)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((100, 100, 3), np.uint8))
    for line in (
        ("data", "tile", "crowd"),
        ("predict", weights, tmp_path / "a.png"),
        ("evaluate", weights, "--data", "crowd"),
    ):
        status, out, err = neo(*line, *words)
        assert (status, out) == (2, "") and told in err and len(err.strip().splitlines()) == 1, (line, err)
    assert not list((tmp_path / "place").glob("reports/*"))


def test_predict_and_evaluate_in_tiles(neo, tmp_path):
    (tmp_path / "place" / "data_manifests" / "crowd.yaml").write_text(SCENES)
    weights = tiny(tmp_path)
    rng = np.random.default_rng(0)
    for name, size in (("a", (180, 320)), ("b", (64, 64))):
        cv2.imwrite(str(tmp_path / f"{name}.png"), smooth(rng, size))
    files = tmp_path / "a.png", tmp_path / "b.png"
    status, out, err = neo("predict", weights, *files, "--threshold", 0.001, "--tile", 96, 96, "--json")
    assert status == 0, err
    found = json.loads(out)
    sliced = TiledDetector(load_detector(weights), (96, 96), 0.2)
    for path, image in zip(files, found["images"]):
        direct = sliced([read_image(path)], threshold=0.001)
        assert direct.num_boxes == len(image["detections"]) > 0
        boxes = np.array([one["box"] for one in image["detections"]])
        assert boxes == pytest.approx(direct.boxes_xyxy, abs=0.02)
    status, out, err = neo("evaluate", weights, "--data", "crowd", "--tile", 96, 128, "--overlap", 0.25, "--json")
    assert status == 0, err
    metrics = json.loads(out)
    from neo_nb.data.manifest import load_dataset
    from neo_nb.evaluate.coco_metrics import coco_metrics

    table = load_dataset("crowd", "val")
    direct = TiledDetector(load_detector(weights), (96, 128), 0.25).predict(table, progress=False)
    assert metrics["AP"] == pytest.approx(coco_metrics(direct, table)["AP"], abs=1e-6)
