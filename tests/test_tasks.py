"""Masks, keypoints and maps of classes: every format there and back, and the way through loader, tiles and drawing."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from neo_nb.base.annotations import Annotations, fingerprint, load_annotations, save_annotations
from neo_nb.base.core import InputError
from neo_nb.base.detections import Detections
from neo_nb.base.draw import draw_masks
from neo_nb.base.keypoints import COCO_PERSON
from neo_nb.base.masks import Masks
from neo_nb.base.semantic_maps import attach_maps, write_map
from neo_nb.data.coco import read_coco, write_coco
from neo_nb.data.dice import read_dice, write_dice, write_nested_dice
from neo_nb.data.exports import read_labelme
from neo_nb.data.folder import walk
from neo_nb.data.labelme import write_labelme
from neo_nb.data.loader import make_loader
from neo_nb.data.manifest import load_all, load_dataset
from neo_nb.data.tiles import tile_table
from neo_nb.data.yolo import read_yolo, write_yolo
from neo_nb.evaluate.operating_point import evaluate
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.micro_batches import split, to_device

SIZES = [(64, 96), (120, 70), (40, 40)]  # landscape, portrait, and an image without objects


def polygon(rng: np.random.Generator, box: np.ndarray, points: int = 7) -> list[float]:
    "A ring inside a box that touches all its sides."
    x1, y1, x2, y2 = box.tolist()
    inner = np.stack([rng.uniform(x1, x2, points), rng.uniform(y1, y2, points)], 1)
    ring = np.concatenate(
        [[[x1, (y1 + y2) / 2], [(x1 + x2) / 2, y1], [x2, (y1 + y2) / 2], [(x1 + x2) / 2, y2]], inner]
    )
    angle = np.arctan2(ring[:, 1] - (y1 + y2) / 2, ring[:, 0] - (x1 + x2) / 2)
    return ring[np.argsort(angle)].ravel().tolist()


def table_of(root, count: int, seed: int = 0) -> Annotations:
    "Objects of all kinds on a landscape and a portrait image, none on a third; `count` in all."
    rng = np.random.default_rng(seed)
    for number, (h, w) in enumerate(SIZES):
        cv2.imwrite(str(root / f"{number}.png"), np.zeros((h, w, 3), np.uint8))
    counts = [count // 2, count - count // 2, 0]
    sizes = np.repeat(SIZES, counts, axis=0).reshape(-1, 2)
    low = rng.uniform(0, 0.6, (count, 2)) * sizes[:, ::-1]
    boxes = np.concatenate([low, low + rng.uniform(4, 15, (count, 2))], 1).astype(np.float32)
    shapes = []
    for row, (box, (h, w)) in enumerate(zip(boxes, sizes)):
        kind = row % 4
        pixels = np.zeros((h, w), bool)
        x1, y1, x2, y2 = np.round(box).astype(int)
        pixels[y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1)) < 0.8
        middle = float(box[[0, 2]].mean())
        halves = [[box[0], box[1], middle, box[1], box[0], box[3]], [box[2], box[1], box[2], box[3], middle, box[3]]]
        rings = [[float(v) for v in ring] for ring in halves]
        packed = Masks.from_arrays([pixels]).to_coco()[0] if pixels.any() else None
        shapes.append([[polygon(rng, box)], rings, packed, None][kind])
    points = np.zeros((count, 17, 3), np.float32)
    points[..., :2] = rng.uniform(0, 40, (count, 17, 2)).round(2)
    points[..., 2] = rng.integers(0, 3, (count, 17))
    points[np.arange(count) % 5 == 4] = 0  # nobody labelled these
    points[points[..., 2] == 0] = 0
    return Annotations([5, 3, 9], [f"{i}.png" for i in range(3)], SIZES, np.cumsum([0, *counts]), boxes,
                       np.arange(count) % 2, ("head", "person"), root=root, name="every/kind",
                       iscrowd=np.arange(count) % 8 == 6, masks=Masks.from_coco(shapes, sizes), keypoints=points,
                       skeleton=COCO_PERSON)  # fmt: skip


def coco(table, folder):
    return read_coco(write_coco(table, folder / "coco.json"), table.root)


def dice(table, folder):
    return read_dice(write_dice(table, folder / "dice.json"), table.root)


def nested(table, folder):
    return read_dice(write_nested_dice({"train": table}, folder / "nested.json"), table.root)


def labelme(table, folder):
    files = write_labelme(table, table.root)
    return read_labelme([file.name for file in files], walk(table.root))["train"]


@pytest.mark.parametrize("count", [0, 1, 8, 391])
@pytest.mark.parametrize("there_and_back", [coco, dice, nested, labelme], ids=lambda f: f.__name__)
def test_masks_and_keypoints_come_back_exactly(there_and_back, count, tmp_path):
    (tmp_path / "images").mkdir()
    table = table_of(tmp_path / "images", count)
    again = there_and_back(table, tmp_path)
    for key in ("file_names", "sizes", "offsets", "labels", "iscrowd"):
        assert np.array_equal(getattr(again, key), getattr(table, key)), key
    assert np.abs(again.boxes_xyxy - table.boxes_xyxy).max(initial=0) < 1e-4
    if count:
        assert again.masks.to_coco() == table.masks.to_coco()
        assert table.masks.areas.tolist() == [table.masks.decode(row).sum() for row in range(count)]
        assert again.class_names == table.class_names
    assert again.masks is None or np.array_equal(again.masks.present, table.masks.present)
    if count and (table.keypoints[..., 2] > 0).any():
        assert np.array_equal(again.keypoints, table.keypoints) and again.skeleton == table.skeleton


@pytest.mark.parametrize("count", [0, 1, 8, 391])
@pytest.mark.parametrize("task", ["segment", "pose"])
def test_yolo_comes_back_to_the_pixel(task, count, tmp_path):
    (tmp_path / "images").mkdir()
    table = table_of(tmp_path / "images", count)
    again = read_yolo(write_yolo({"val": table}, tmp_path / "yolo", task=task), "val")
    rows = [np.argsort(t.box_ids) for t in (again, table)]
    assert np.array_equal(again.sizes, table.sizes) and len(again.labels) == count
    assert np.array_equal(again.iscrowd[rows[0]], table.iscrowd[rows[1]])
    if task == "pose":
        assert np.abs(again.keypoints[rows[0]] - table.keypoints[rows[1]]).max(initial=0) < 1e-4
        assert again.skeleton == table.skeleton
        assert np.abs(again.boxes_xyxy[rows[0]] - table.boxes_xyxy[rows[1]]).max(initial=0) < 1e-3
        return
    for a, b in zip(*(r.tolist() for r in rows)):
        assert again.masks[a].present == table.masks[b].present
        assert (again.masks.decode(a) ^ table.masks.decode(b)).sum() <= 2, "the same pixels"
        lengths = [[len(r) for r in t.masks.outlines(row)] for t, row in ((again, a), (table, b))]
        assert lengths[0] == lengths[1], "as many rings of as many points"


def test_yolo_without_the_file_beside_is_what_other_tools_see(tmp_path):
    (tmp_path / "images").mkdir()
    table = table_of(tmp_path / "images", 6)
    table = replace(table, iscrowd=np.zeros(6, bool))
    file = write_yolo({"val": table}, tmp_path / "yolo", task="segment")
    (tmp_path / "yolo/neo/val.json").unlink()
    again = read_yolo(file, "val")
    assert np.array_equal(again.labels, table.labels)
    for row in range(6):  # seams without width may touch a pixel or two where the halves' corners lie between pixels
        assert (again.masks.decode(row) ^ table.masks.decode(row)).sum() <= 4


@pytest.mark.parametrize("fault, change", [
    ("x and y make it even", {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}),
    ("3 are needed", {"segmentation": [[1, 2, 3, 4]]}),
    ("but it is [64, 96]", {"segmentation": {"size": [96, 64], "counts": [96 * 64]}}),
    ("x y visibility of 17 points; found 6", {"keypoints": [1, 2, 2, 3, 4, 1]}),
    ("the visibility of a keypoint is 0, 1 or 2, found 5", {"keypoints": [1, 2, 5] * 17}),
])  # fmt: skip
@pytest.mark.parametrize("way", ["coco", "dice", "nested"])
def test_a_fault_is_said_with_its_place_and_the_box_stays(way, fault, change, tmp_path):
    (tmp_path / "images").mkdir()
    table = table_of(tmp_path / "images", 8)
    if way == "nested":
        file = write_nested_dice({"train": table}, tmp_path / "x.json")
        document = json.loads(file.read_text())
        document["images"][0]["annotations"][1] |= change
    else:
        file = {"coco": write_coco, "dice": write_dice}[way](table, tmp_path / "x.json")
        document = json.loads(file.read_text())
        document["annotations"][1] |= change
    file.write_text(json.dumps(document))
    read = read_coco if way == "coco" else read_dice
    with pytest.raises(InputError, match="x.json image 5 annotation 2"):
        read(file, table.root)
    problems = []
    again = read(file, table.root, problems=problems)
    assert len(again.labels) == 8 and len(problems) == 1 and fault in problems[0].message
    assert read(file, table.root, extras=False).masks is None  # the boxes alone do not look at it


def test_a_mask_that_reaches_out_of_its_image_is_told(tmp_path):
    table = table_of(tmp_path, 2)
    far = replace(table, masks=Masks.from_coco([[[-9, 2, 50, 2, 50, 30]], None], table.sizes[:2]))
    problems = []
    again = read_coco(write_coco(far, tmp_path / "x.json"), tmp_path, problems=problems)
    assert [p.check for p in problems] == ["mask-beyond-image"] and "9 pixels out" in problems[0].message
    assert again.masks.to_coco() == far.masks.to_coco()


def test_a_table_is_saved_mapped_and_printed_with_all_it_has(tmp_path):
    table = table_of(tmp_path, 391)
    save_annotations(table, tmp_path / "table")
    again = load_annotations(tmp_path / "table")
    assert fingerprint(again) == fingerprint(table) != fingerprint(replace(table, masks=None))
    assert isinstance(again.masks.points, np.memmap) and isinstance(again.keypoints, np.memmap)
    assert np.shares_memory(again[1].masks.points, again.masks.points)


def said(batch) -> list:
    "All of a batch, to the bit."
    parts = [t.numpy().tobytes() for t in batch.tensors().values()]
    for target in batch.targets:
        parts += [t.numpy().tobytes() for t in target.tensors().values()]
        parts += [c.tobytes() for c in target.masks.columns().values()]
    return parts


def test_batches_with_masks_are_the_same_whoever_makes_them(tmp_path):
    table = make_scenes(8, (90, 160), 3, tmp_path, extras=True)
    options = dict(
        size=(96, 160), divisor=32, batch_size=4, policy="strong", mosaic=0.5, mixup=0.5, seed=1, quiet=True
    )
    alone, helped = (make_loader(table, **options, num_workers=n) for n in (0, 1))
    batches = list(alone)
    assert [said(b) for b in batches] == [said(b) for b in helped]
    halves = split(batches[0], 2)
    own = [t.classes for half in halves for t in half.targets]
    assert all(map(torch.equal, own, [t.classes for t in batches[0].targets]))
    assert said(to_device(batches[0], torch.device("cpu"))) == said(batches[0])
    cached = make_loader(table, **(options | dict(policy="none", mosaic=0, mixup=0)), cache=True)
    plain = make_loader(table, **(options | dict(policy="none", mosaic=0, mixup=0)))
    for a, b in zip(cached, plain):
        for one, other in zip(a.targets, b.targets):
            assert np.abs(one.masks.points - other.masks.points).max(initial=0) < 1e-3


def test_a_manifest_loads_boxes_alone_unless_asked(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NEO_DATA", str(tmp_path))
    (tmp_path / "d").mkdir()
    table = table_of(tmp_path / "d", 8)
    write_coco(table, tmp_path / "d/train.json")
    (tmp_path / "d/maps").mkdir()
    for number, (h, w) in enumerate(SIZES[:2]):
        cv2.imwrite(str(tmp_path / f"d/maps/{number}.png"), np.full((h, w), number, np.uint8))
    split = "{annotations: train.json, images: ., maps: maps}"
    text = f"format: coco\nroot: d\nmap_classes: [ground, thing]\nsplits: {{train: {split}}}\n"
    (tmp_path / "d.yaml").write_text(text)
    plain = load_dataset(tmp_path / "d.yaml")
    assert plain.masks is plain.keypoints is plain.semantic_files is None
    rich = load_dataset(tmp_path / "d.yaml", extras=True)
    assert rich.masks.to_coco() == table.masks.to_coco() and rich.skeleton == COCO_PERSON
    assert rich.semantic_files.tolist() == ["maps/0.png", "maps/1.png", ""]
    document = json.loads((tmp_path / "d/train.json").read_text())
    document["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    (tmp_path / "d/train.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="3 are needed; fix it, or read the boxes alone"):
        load_dataset(tmp_path / "d.yaml", extras=True)
    assert load_all(tmp_path / "d.yaml").masks is None and "boxes alone are read" in caplog.text


def test_an_object_is_as_large_as_its_mask(tmp_path):
    triangle = Masks.from_coco([[[10.0, 10, 50, 10, 10, 50]]], [(64, 96)])
    table = Annotations(
        [1], ["0.png"], [(64, 96)], [0, 1], [[10, 10, 50, 50]], [0], ["x"], root=tmp_path, masks=triangle,
        areas=triangle.areas,
    )  # fmt: skip
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((64, 96, 3), np.uint8))
    assert 700 < triangle.areas[0] < 900
    for way in (coco, dice, nested, labelme):
        assert abs(way(table, tmp_path).areas[0] - triangle.areas[0]) < 1, way
    again = read_yolo(write_yolo({"train": table}, tmp_path / "yolo"), "train")
    assert abs(again.areas[0] - triangle.areas[0]) < 50  # corners are rounded


def test_a_tile_knows_what_it_shows_of_a_mask():
    size = (60, 120)
    corner = np.zeros(size, bool)
    corner[5:55, 5:15] = corner[45:55, 5:58] = True  # an L that does not reach the right tile
    corner[45:50, 58:62] = True
    whole = Masks.from_arrays([corner])
    table = Annotations([1], ["a"], [size], [0, 1], [[5, 5, 100, 55]], [0], ["x"], masks=whole)
    tiles, _ = tile_table(table, (60, 60), overlap=0.0)
    left, right = (tiles.areas[tiles.image_index == row] for row in (0, 1))
    assert left[0] == corner[:, :60].sum() and right[0] == corner[:, 60:].sum()
    corner[:, 60:] = False
    table = replace(table, masks=Masks.from_arrays([corner]))
    tiles, _ = tile_table(table, (60, 60), overlap=0.0)
    assert tiles.iscrowd.tolist() == [False, True]  # a box in the second tile, and nothing of the object


def test_splits_of_different_kinds_are_refused_before_anything_is_written(tmp_path):
    table = table_of(tmp_path, 8)
    with_masks, with_boxes = replace(table, keypoints=None, skeleton=None), replace(table, masks=None, keypoints=None)
    with pytest.raises(InputError, match="train: segment, val: detect"):
        write_yolo({"train": with_masks, "val": with_boxes}, tmp_path / "yolo")
    assert not (tmp_path / "yolo").exists()
    nothing = with_boxes.select_boxes(np.zeros(8, bool))  # a split without labels is of any kind
    file = write_yolo({"train": with_masks, "test": nothing}, tmp_path / "yolo")
    assert len(read_yolo(file, "test").labels) == 0 < len(read_yolo(file, "train").masks)


def test_who_finds_nothing_is_measured():
    table = table_of_masks()
    nothing = Detections.empty(len(table), table.class_names)
    for iou_type in ("segm", "keypoints"):
        numbers = evaluate(nothing, table, iou_type=iou_type)
        assert numbers["AP"] == 0 and numbers["FN"] == len(table.labels)


def table_of_masks() -> Annotations:
    pixels = np.zeros((40, 40), bool)
    pixels[5:20, 5:20] = True
    points = np.full((1, 17, 3), 9, np.float32)
    points[..., 2] = 2
    return Annotations([1], ["a"], [(40, 40)], [0, 1], [[5, 5, 20, 20]], [0], ["x"], masks=Masks.from_arrays([pixels]),
                       keypoints=points, skeleton=COCO_PERSON)  # fmt: skip


def test_a_mask_without_a_pixel_is_drawn_as_nothing():
    blank = Masks.from_arrays([np.zeros((40, 40), bool)])
    assert blank.present.all()
    canvas = np.full((40, 40, 3), 9, np.uint8)
    assert (draw_masks(canvas, blank, [0]) == canvas).all()


def test_two_images_do_not_share_a_map(tmp_path):
    write_map(np.zeros((40, 40), np.uint8), tmp_path / "maps/1.png")
    table = Annotations([1, 2], ["a/1.jpg", "b/1.jpg"], [(40, 40)] * 2, [0, 0, 0], np.zeros((0, 4)), [], ["x"])
    with pytest.raises(InputError, match="is the map of image 1 and of image 2"):
        attach_maps(replace(table, root=tmp_path), tmp_path / "maps", ["ground"])


def test_a_keypoint_that_is_none_ends_with_its_name(tmp_path):
    table = table_of(tmp_path, 8)
    labelme(table, tmp_path)
    file = next(path for path in sorted(tmp_path.rglob("*.json")) if "nose" in path.read_text())
    file.write_text(file.read_text().replace('"label": "nose"', '"label": "chin"', 1))
    with pytest.raises(InputError, match="no keypoint is called 'chin'"):
        read_labelme([str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*.json"))], walk(tmp_path))
