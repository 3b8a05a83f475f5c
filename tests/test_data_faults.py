"""Faulty files, one clear line each; and real images."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from test_round_trip import FORMATS

from neo_nb.base.annotations import Annotations, fingerprint
from neo_nb.base.core import InputError
from neo_nb.data.coco import write_coco
from neo_nb.data.dice import write_dice
from neo_nb.data.importer import import_dataset
from neo_nb.data.manifest import changes_of, load_dataset, load_manifest, read_split
from neo_nb.data.validate import CHECKS, check_dataset
from neo_nb.data.voc import read_voc, write_voc
from neo_nb.data.yolo import read_yolo, write_yolo


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A workspace whose data set `small` lies in all four formats, every file as small as can be."""
    monkeypatch.setenv("NEO_ROOT", str(tmp_path))
    monkeypatch.setenv("NEO_DATA", str(tmp_path / "data"))
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    root = tmp_path / "data/small"
    (root / "images/val").mkdir(parents=True)
    for i, name in enumerate(("a", "b")):
        cv2.imwrite(str(root / f"images/val/{name}.jpg"), np.full((48, 64, 3), 99 * i, np.uint8))
    table = Annotations(
        image_ids=[1, 2],
        file_names=["images/val/a.jpg", "images/val/b.jpg"],
        sizes=[(48, 64)] * 2,
        offsets=[0, 2, 3],
        boxes_xyxy=[(1, 2, 11, 12), (3, 4, 33, 34), (5, 6, 25, 26)],
        labels=[0, 1, 0],
        class_names=("RBC", "WBC"),
        root=root,
    )
    write_coco(table, root / "coco.json")
    write_dice(table, root / "dice.json")
    write_voc(table, root / "xml")
    write_yolo({"val": table}, root, images="none")
    entries = {
        "coco": {"annotations": "coco.json"},
        "dice": {"annotations": "dice.json"},
        "voc": {"annotations": "xml"},
        "yolo": {"annotations": "data.yaml"},
    }
    for kind, entry in entries.items():
        content = {"format": kind, "root": "small", "classes": ["RBC", "WBC"], "splits": {"val": entry}}
        (tmp_path / f"data_manifests/{kind}.yaml").write_text(yaml.safe_dump(content))
    return root


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, (old, text)
    path.write_text(text.replace(old, new, 1))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


JSON_BOX = '"bbox": [1, 2, 10, 10]'
FAULTS = {
    # name: (format, what is done to the data, what is said, the check that finds it)
    "coco cut off": ("coco", lambda r: cut(r / "coco.json"), "coco.json line 1: the file is cut off", "json-broken"),
    "coco empty file": ("coco", lambda r: (r / "coco.json").write_text(""), "cut off", "json-broken"),
    "coco another json": ("coco", lambda r: (r / "coco.json").write_text("{}"), "no list 'images'", "json-keys"),
    "coco gone": ("coco", lambda r: (r / "coco.json").unlink(), "coco.json: no such file", "file-missing"),
    "coco NaN": (
        "coco",
        lambda r: change(r / "coco.json", JSON_BOX, '"bbox": [NaN, 2, 10, 10]'),
        "coco.json image 1 annotation 1: bbox has a value that is no finite number",
        "box-not-finite",
    ),
    "coco infinite": (
        "coco",
        lambda r: change(r / "coco.json", JSON_BOX, '"bbox": [1e999, 2, 10, 10]'),
        "no finite number",
        "box-not-finite",
    ),
    "coco text in box": (
        "coco",
        lambda r: change(r / "coco.json", JSON_BOX, '"bbox": ["1", 2, 10, 10]'),
        "no finite number",
        "box-not-finite",
    ),
    "coco 6 numbers": (
        "coco",
        lambda r: change(r / "coco.json", JSON_BOX, '"bbox": [1, 2, 10, 10, 0, 0]'),
        "image 1 annotation 1: bbox must be",
        "column-count",
    ),
    "coco class": (
        "coco",
        lambda r: change(r / "coco.json", '"category_id": 2', '"category_id": 3'),
        "image 1 annotation 2: category_id 3 is none of the classes (1, 2)",
        "unknown-class",
    ),
    "coco image": (
        "coco",
        lambda r: change(r / "coco.json", '"image_id": 2', '"image_id": 7'),
        "image_id 7 is none of the 2 images",
        "unknown-image",
    ),
    "dice cut off": ("dice", lambda r: cut(r / "dice.json"), "dice.json line 1: the file is cut off", "json-broken"),
    "dice NaN": (
        "dice",
        lambda r: change(r / "dice.json", JSON_BOX, '"bbox": [1, NaN, 10, 10]'),
        "dice.json image 1 annotation 1: bbox",
        "box-not-finite",
    ),
    "dice class": (
        "dice",
        lambda r: change(r / "dice.json", '"category_id": 2', '"category_id": 3'),
        "category_id 3 is none",
        "unknown-class",
    ),
    "yolo 6 columns": (
        "yolo",
        lambda r: (r / "labels/val/b.txt").write_text("0 .5 .5 .1 .1\n0 .5 .5 .1 .1 .9\n"),
        "labels/val/b.txt line 2: 6 columns; expected 5",
        "column-count",
    ),
    "yolo commas": (
        "yolo",
        lambda r: (r / "labels/val/b.txt").write_text("0,.5,.5,.1,.1\n"),
        "b.txt line 1: 1 column, with commas",
        "column-count",
    ),
    "yolo class": (
        "yolo",
        lambda r: (r / "labels/val/b.txt").write_text("2 .5 .5 .1 .1\n"),
        "b.txt line 1: class 2 is outside 0..1",
        "unknown-class",
    ),
    "yolo negative class": (
        "yolo",
        lambda r: (r / "labels/val/b.txt").write_text("-1 .5 .5 .1 .1\n"),
        "class -1 is outside 0..1",
        "unknown-class",
    ),
    "yolo NaN": (
        "yolo",
        lambda r: (r / "labels/val/b.txt").write_text("\r\n1 nan .5 .1 .1\r\n"),
        "b.txt line 2: a value is no finite number",
        "box-not-finite",
    ),
    "yolo range": (
        "yolo",
        lambda r: (r / "labels/val/b.txt").write_text("1 .5 1.003 .1 .1\n"),
        "b.txt line 1: cy = 1.003 is outside 0..1 (tolerance 0.001)",
        "box-range",
    ),
    "yolo no image": (
        "yolo",
        lambda r: (r / "images/val/b.jpg").write_text("<html>"),
        "b.jpg: not an image that can be read",
        "image-unreadable",
    ),
    "voc cut off": ("voc", lambda r: cut(r / "xml/images/val/a.xml"), "a.xml line", "xml-broken"),
    "voc NaN": (
        "voc",
        lambda r: change(r / "xml/images/val/a.xml", "<xmin>3<", "<xmin>nan<"),
        "a.xml line 9: bndbox needs",
        "box-not-finite",
    ),
    "voc class": (
        "voc",
        lambda r: change(r / "xml/images/val/a.xml", "WBC", "Wbc"),
        "a.xml line 9: class 'Wbc' is none of RBC, WBC",
        "unknown-class",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_clear_line(workspace, fault):
    kind, harm, message, check = FAULTS[fault]
    assert len(load_dataset(kind, "val").boxes_xyxy) == 3
    harm(workspace)
    with pytest.raises(InputError) as raised:
        load_dataset(kind, "val")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    report = check_dataset(kind, progress=False)
    errors = [p for p in report.problems if p.severity == "error"]
    assert [p.check for p in errors] == [check] and set(p.check for p in report.problems) <= set(CHECKS)
    assert errors[0].message in str(raised.value)
    json.loads(report.to_json())


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_beside_a_faulty_one_stay(workspace, kind):
    name = {"coco": "coco class", "dice": "dice class", "yolo": "yolo 6 columns", "voc": "voc class"}[kind]
    FAULTS[name][1](workspace)
    problems = []
    table = read_split(load_manifest(kind), "val", problems)
    assert len(table) == 2 and len(table.boxes_xyxy) in (2, 3)
    assert len(problems) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_missing_image_folder(workspace, kind):
    (workspace / "images").rename(workspace / "elsewhere")
    if kind == "yolo":
        with pytest.raises(InputError, match="image folder .* does not exist"):
            load_dataset(kind, "val")
    else:  # the folder is the root here: the doctor names each image
        checks = [p.check for p in check_dataset(kind, progress=False).problems]
        assert checks.count("image-missing") == 2
    path = next((workspace.parent.parent / "data_manifests").glob(f"{kind}.yaml"))
    content = yaml.safe_load(path.read_text())
    content["splits"]["val"]["images"] = "nowhere"
    path.write_text(yaml.safe_dump(content))
    if kind != "yolo":
        with pytest.raises(InputError, match="image folder .*nowhere does not exist"):
            load_dataset(kind, "val")
    content["root"] = "elsewhere"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=f"the data of {kind} are not here; set NEO_DATA"):
        load_dataset(kind, "val")


def test_boxes_without_area_are_loaded_and_told_once(workspace, caplog):
    change(workspace / "coco.json", JSON_BOX, '"bbox": [1, 2, 0, 10]')
    change(workspace / "coco.json", '"bbox": [3, 4, 30, 30]', '"bbox": [60, 4, 30, 30]')
    for _ in range(2):
        table = load_dataset("coco", "val")
    assert len(table.boxes_xyxy) == 3
    lines = [r.getMessage() for r in caplog.records if "faulty" in r.getMessage()]
    assert len(lines) <= 1  # once per process, and another test may have said it
    counts = check_dataset("coco", progress=False).to_dict()["checks"]
    assert counts == {"box-degenerate": 1, "box-beyond-image": 1}


def test_import_and_change_are_named(workspace):
    manifest = import_dataset(workspace / "coco.json", "own")
    assert manifest.splits["train"].fingerprint.boxes == 3
    assert changes_of(manifest, "train", load_dataset("own")) == []
    change(workspace / "coco.json", '"category_id": 2', '"category_id": 1')
    message = changes_of(manifest, "train", load_dataset("own"))
    assert message == ["boxes of RBC 2 → 3", "boxes of WBC 1 → 0", "labels or ignore flags differ"]
    with pytest.raises(InputError, match="boxes of RBC 2 → 3"):
        load_dataset("own", strict=True)
    assert "fingerprint-differs" in {p.check for p in check_dataset("own", progress=False).problems}


def test_the_same_image_in_two_splits(workspace):
    content = yaml.safe_load((workspace.parent.parent / "data_manifests/coco.yaml").read_text())
    content["splits"]["train"] = content["splits"]["val"]
    (workspace.parent.parent / "data_manifests/twice.yaml").write_text(yaml.safe_dump(content))
    report = check_dataset("twice", progress=False)
    assert [p.check for p in report.problems] == ["image-in-two-splits"] * 2
    assert "same file as train image 1; val image 1" in report.problems[0].message


def test_images_of_every_kind(workspace):
    """Truncated, not an image, another size, 16 bits, CMYK, on its side."""
    from PIL import Image

    root = workspace / "images/val"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (48, 64, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(root / "cut.jpg")
    cut(root / "cut.jpg")
    Image.fromarray(pixels).save(root / "cut.png")
    cut(root / "cut.png")
    Image.fromarray(pixels).save(root / "turned.jpg", exif=turned)
    Image.fromarray(pixels).convert("CMYK").save(root / "cmyk.jpg")
    cv2.imwrite(str(root / "deep.png"), rng.integers(0, 65535, (48, 64), np.uint16))
    Image.fromarray(pixels[:40]).save(root / "small.png")
    (root / "text.jpg").write_text("text")
    names = ["cut.jpg", "cut.png", "turned.jpg", "cmyk.jpg", "deep.png", "small.png", "text.jpg", "none.jpg"]
    n = len(names)
    table = Annotations(
        range(1, n + 1), names, [(48, 64)] * n, range(n + 1), [(1, 1, 9, 9)] * n, [0] * n, ("RBC",), root=root
    )
    write_coco(table, workspace / "odd.json")
    content = {
        "format": "coco",
        "root": "small",
        "splits": {"val": {"annotations": "odd.json", "images": "images/val"}},
    }
    (workspace.parent.parent / "data_manifests/odd.yaml").write_text(yaml.safe_dump(content))
    found = {(Path(p.where).name, p.check) for p in check_dataset("odd", progress=False).problems}
    assert found == {
        ("cut.jpg", "image-truncated"),
        ("cut.png", "image-truncated"),
        ("turned.jpg", "image-rotated"),
        ("cmyk.jpg", "image-depth"),
        ("deep.png", "image-depth"),
        ("small.png", "image-size"),
        ("text.jpg", "image-unreadable"),
        ("none.jpg", "image-missing"),
    }


# ---- real images


@pytest.fixture
def real(monkeypatch):
    """The workspace of this checkout with real images in it."""
    here = Path(__file__).parents[1]
    data = Path(os.environ.get("NEO_DATA") or here / "../shared/data").resolve()
    if not (data / "bccd").is_dir():
        pytest.skip(f"no real images at {data / 'bccd'}: set NEO_DATA to the folder that holds bccd")
    monkeypatch.setenv("NEO_ROOT", str(here))
    monkeypatch.setenv("NEO_DATA", str(data))
    return data / "bccd"


def test_bccd_is_counted_and_its_faulty_boxes_named(real):
    report = check_dataset("bccd", progress=False)
    assert [report.splits[s]["images"] for s in ("train", "val", "test")] == [205, 87, 72]
    assert sum(facts["boxes"] for facts in report.splits.values()) == 4888
    assert report.ok
    faulty = {(p.check, Path(p.where.split(" image")[0]).name, p.image_id) for p in report.problems}
    assert faulty == {
        ("box-degenerate", "instances_train.json", 171),
        ("box-degenerate", "instances_val.json", 69),
    }


def test_bccd_says_the_same_in_three_formats(real):
    for split, count in (("train", 205), ("val", 87), ("test", 72)):
        coco = load_dataset("bccd", split, strict=True)
        voc = read_voc(real / "annotations_voc" / split, real / "images" / split, class_names=coco.class_names)
        yolo = read_yolo(real / "data.yaml", split)
        assert len(coco) == len(voc) == len(yolo) == count
        assert [Path(f).name for f in yolo.file_names] == coco.file_names.tolist() == voc.file_names.tolist()
        for other, tolerance in ((voc, 0.51), (yolo, 0.002)):
            assert other.offsets.tolist() == coco.offsets.tolist()
            assert other.labels.tolist() == coco.labels.tolist()
            assert np.abs(other.boxes_xyxy - coco.boxes_xyxy).max() < tolerance


def test_bccd_is_imported_from_its_folder(real, tmp_path, monkeypatch):
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    monkeypatch.setenv("NEO_ROOT", str(tmp_path))
    for kind in ("coco", "yolo", "voc"):
        manifest = import_dataset(real, kind, kind)
        assert manifest.root == "bccd"
        assert {s: e.fingerprint.images for s, e in manifest.splits.items()} == {"train": 205, "val": 87, "test": 72}
    assert import_dataset(real, "auto").format == "coco"
    assert fingerprint(load_dataset("auto", "val")) == fingerprint(load_dataset("coco", "val"))
