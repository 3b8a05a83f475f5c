"""Twelve layouts as the tools write them, each imported by one call, every file accounted for."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from neo_nb.base.core import InputError
from neo_nb.data.importer import import_dataset, import_lines
from neo_nb.data.manifest import load_dataset
from neo_nb.data.manifest_file import load_manifest
from neo_nb.data.split import split_dataset

H, W = 48, 64
BOX = (16, 12, 48, 36)  # of every image, xyxy
YOLO = "0.5 0.5 0.5 0.5"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    monkeypatch.setenv("NEO_ROOT", str(tmp_path))
    monkeypatch.setenv("NEO_DATA", str(tmp_path / "data"))
    (tmp_path / "data/set").mkdir(parents=True)
    return tmp_path / "data/set"


def image(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(abs(hash(name)) % 2**32).integers(0, 255, (H, W, 3), np.uint8)
        assert cv2.imwrite(str(root / name), pixels)


def write(root: Path, name: str, content) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content if isinstance(content, str) else json.dumps(content))


def coco(names, categories=("cat", "dog"), label=1, first=1, **more) -> dict:
    rows = [{"id": first + i, "file_name": n, "height": H, "width": W} for i, n in enumerate(names)]
    box = {"bbox": [16, 12, 32, 24], "area": 768, "iscrowd": 0, "segmentation": []}
    boxes = [{"id": first + i, "image_id": first + i, "category_id": label, **box} for i in range(len(names))]
    kinds = [{"id": i + 1, "name": n, "supercategory": ""} for i, n in enumerate(categories)]
    return {"info": {}, "licenses": [], "categories": kinds, "images": rows, "annotations": boxes} | more


def voc(name: str, label: str = "cat") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), BOX))
    return (
        f"<annotation>\n<folder>VOC2012</folder><filename>{name}</filename>\n"
        f"<size><width>{W}</width><height>{H}</height><depth>3</depth></size><segmented>0</segmented>\n"
        f"<object><name>{label}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>\n"
        f"<bndbox>{corners}</bndbox></object>\n</annotation>\n"
    )


# ---- the layouts: each writes a folder and says what an import must find


def ultralytics(root):
    image(root, "images/train/a.jpg", "images/more/b.jpg", "images/val/c.jpg", "images/val/unlisted.jpg")
    for name in ("train/a", "more/b", "val/c"):
        write(root, f"labels/{name}.txt", f"1 {YOLO}\n")
    write(root, "val.txt", "./images/val/c.jpg\n")
    names = {0: "cat", 1: "dog"}
    content = {"path": "../datasets/set", "train": ["images/train", "images/more"], "val": "val.txt", "test": None}
    write(root, "set.yaml", yaml.safe_dump(content | {"names": names}))
    return {"train": (2, 2), "val": (1, 1)}, {"ignored": 1}


def roboflow_coco(root):
    for split, names in (("train", "ab"), ("valid", "c"), ("test", "d")):
        files = [f"{n}_jpg.rf.0123456789abcdef.jpg" for n in names]
        image(root, *(f"{split}/{f}" for f in files))
        document = coco(files, ("animals", "cat", "dog"), 2)
        document["categories"] = [
            {"id": 0, "name": "animals", "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": "animals"},
            {"id": 2, "name": "dog", "supercategory": "animals"},
        ]
        write(root, f"{split}/_annotations.coco.json", document)
    write(root, "README.roboflow.txt", "exported")
    return {"train": (2, 2), "val": (1, 1), "test": (1, 1)}, {"other": 1, "remark": "'animals' is the root"}


def roboflow_yolo(root):
    for split, name in (("train", "a"), ("valid", "b"), ("test", "c")):
        image(root, f"{split}/images/{name}.jpg")
        write(root, f"{split}/labels/{name}.txt", f"0 {YOLO}")
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n"
    write(root, "data.yaml", text + "\nroboflow:\n  workspace: x\n  version: 1\n")
    return dict.fromkeys(("train", "val", "test"), (1, 1)), {
        "remark": "../valid/images of data.yaml is taken as valid/images"
    }


def vocdevkit(root):
    base = "VOCdevkit/VOC2012"
    for name, label in (("2007_1", "cat"), ("2007_2", "dog"), ("2007_3", "cat"), ("2007_4", "cat")):
        image(root, f"{base}/JPEGImages/{name}.jpg")
        write(root, f"{base}/Annotations/{name}.xml", voc(f"{name}.jpg", label))
    lists = {"train": "2007_1\n2007_2\n", "val": "2007_3\n", "trainval": "2007_1\n2007_2\n2007_3\n"}
    lists |= {"cat_train": "2007_1  1\n2007_2 -1\n"}
    for name, text in lists.items():
        write(root, f"{base}/ImageSets/Main/{name}.txt", text)
    return {"train": (2, 2), "val": (1, 1)}, {"ignored": 1, "lists": 2}


def cvat(root):
    image(root, "images/a.jpg", "images/b.jpg")
    head = "<?xml version='1.0' encoding='utf-8'?>\n<annotations><version>1.1</version><meta><task><labels>"
    head += "<label><name>cat</name><type>any</type></label><label><name>dog</name></label></labels></task></meta>\n"
    box = '<box label="dog" source="manual" occluded="0" xtl="16.00" ytl="12.00" xbr="48.00" ybr="36.00" z_order="0"/>'
    polygon = '<polygon label="cat" points="16.0,12.0;48.0,12.0;48.0,36.0" occluded="0" z_order="0"/>'
    rows = f'<image id="0" name="a.jpg" width="{W}" height="{H}">{box}<points label="cat" points="1,1"/></image>\n'
    rows += f'<image id="1" name="b.jpg" width="{W}" height="{H}">{polygon}</image>\n'
    write(root, "annotations.xml", f"{head}{rows}</annotations>")
    return {"train": (2, 2)}, {"boxes": 1}


def label_studio(root):
    image(root, "images/1a2b3c4d-a.jpg", "images/5e6f7a8b-b.jpg", "images/99aa88bb-c.jpg")
    value = {"x": 25, "y": 25, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["dog"]}
    size = {"original_width": W, "original_height": H, "image_rotation": 0}
    result = {"id": "x", "type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value, **size}
    cat = result | {"value": value | {"rectanglelabels": ["cat"]}}
    done = [{"id": 1, "result": [result], "was_cancelled": False, "updated_at": "2024-01-01"}]
    tasks = [
        {"id": 1, "data": {"image": "/data/upload/1/1a2b3c4d-a.jpg"}, "annotations": done, "predictions": []},
        {"id": 2, "data": {"image": "/data/upload/1/5e6f7a8b-b.jpg"}, "annotations": [{"id": 2, "result": [cat]}]},
        {"id": 3, "data": {"image": "/data/upload/1/99aa88bb-c.jpg"}, "annotations": []},
    ]
    write(root, "project-1-at-2024.json", tasks)
    return {"train": (2, 2)}, {"ignored": 1, "remark": "nobody has annotated it"}


def labelme(root):
    shapes = [
        {"label": "cat", "points": [[48, 36], [16, 12]], "shape_type": "rectangle", "group_id": None, "flags": {}}
    ]
    shapes += [{"label": "dog", "points": [[16, 12], [48, 12], [48, 36]], "shape_type": "polygon", "flags": {}}]
    for name in ("a", "b"):
        image(root, f"imgs/{name}.jpg")
        label = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"..\\imgs\\{name}.jpg"}
        write(root, f"json/{name}.json", label | {"imageData": None, "imageHeight": H, "imageWidth": W})
    return {"train": (2, 4)}, {}


def coco_2017(root):
    for split, names in (("train", ("000000000009", "000000000025")), ("val", ("000000000139",))):
        image(root, *(f"{split}2017/{n}.jpg" for n in names))
        write(root, f"annotations/instances_{split}2017.json", coco([f"{n}.jpg" for n in names]))
        write(root, f"annotations/captions_{split}2017.json", "not even JSON: it is not read")
        write(root, f"annotations/person_keypoints_{split}2017.json", "{}")
    return {"train": (2, 2), "val": (1, 1)}, {"lists": 4}


def one_json(root):
    image(root.parent / "photos", "2024/a.jpg", "2024/b.jpg", "c.jpg")
    write(root, "deep/down/labels_v3.json", coco(["2024/a.jpg", "2024/b.jpg"]))
    return {"train": (2, 2)}, {"ignored": 1, "images": str(root.parent / "photos")}


def several_json(root):
    image(root, *(f"images/{n}.jpg" for n in "abcd"))
    write(root, "annotations/anna.json", coco(["a.jpg", "b.jpg"]))
    write(
        root, "annotations/ben.json", coco(["b.jpg", "c.jpg"], ("dog", "cat"), 1)
    )  # b twice; the same ids, other order
    write(root, "annotations/cleo.json", coco(["d.jpg", "a.jpg"]))  # a once more, with the same box
    return {"train": (4, 5)}, {"boxes": 1, "remark": "train is 3 JSON files joined"}


def cameras(root):
    for camera in ("cam1", "cam2"):
        image(root, f"images/{camera}/0001.jpg", f"images/{camera}/0002.jpg")
        write(root, f"labels/{camera}/0001.txt", f"{int(camera[-1]) - 1} {YOLO}\n")
    write(root, "classes.txt", "cat\ndog\n")
    write(root, "notes.json", {"categories": [{"id": 0, "name": "cat"}], "info": {"contributor": "Label Studio"}})
    return {"train": (4, 2)}, {"lists": 1, "remark": "2 images have no label file"}


def unlabelled(root):
    image(root, "holiday/a.jpg", "holiday/b.jpg")
    return {"predict": (2, 0)}, {"classes": ()}


LAYOUTS = [ultralytics, roboflow_coco, roboflow_yolo, vocdevkit, cvat, label_studio, labelme, coco_2017, one_json]
LAYOUTS += [several_json, cameras, unlabelled]


def counts(manifest, images: Path | None = None) -> dict:
    """The account, after checking that it adds up and covers every file on the disk."""
    files = manifest.imported.files
    for tally in files.values():
        assert tally.seen == tally.read + sum(tally.refused.values()) + sum(tally.ignored.values())
    places = [manifest.folder, *([images] if images else [])]
    assert sum(tally.seen for tally in files.values()) == sum(f.is_file() for p in places for f in p.rglob("*"))
    return files


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_a_layout_is_imported_by_one_call(root, layout):
    expected, more = layout(root)
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*")}
    manifest = import_dataset(root, "own", images=more.get("images"))
    assert {f: f.stat().st_mtime_ns for f in root.rglob("*")} == before  # nothing is written into the data
    assert manifest.classes == list(more.get("classes", ("cat", "dog")))
    for split, (images, boxes) in expected.items():
        table = load_dataset("own", split, strict=True)
        assert (len(table), len(table.labels)) == (images, boxes)
        assert np.abs(table.boxes_xyxy - BOX).max(initial=0) < 0.01 and (table.sizes == (H, W)).all()
        assert all(table[row].path.is_file() for row in range(len(table)))
    assert list(manifest.splits) == list(expected)
    files = counts(manifest, Path(more["images"]) if "images" in more else None)
    assert files["images"].read == sum(images for images, _ in expected.values())
    assert sum(files["images"].ignored.values()) == more.get("ignored", 0) and not files["images"].refused
    if "annotation files" in files:
        assert sum(files["annotation files"].ignored.values()) == more.get("lists", 0)
    assert files["other files"].seen == more["other"] if "other" in more else True
    assert sum(manifest.imported.boxes.values()) == more.get("boxes", 0) and not manifest.imported.missing
    text = "\n".join(import_lines(manifest))
    assert more.get("remark", "") in text and f"classes  {len(manifest.classes)}" in text or not manifest.classes
    assert load_manifest("own") == manifest
    described = (root.parent.parent / "data_manifests/own.yaml").read_text()
    assert str(root.parent) not in described  # true on another machine, too


# ---- three with planted faults


def test_faulty_yolo_is_counted(root):
    roboflow_yolo(root)
    image(root, *(f"train/images/{n}.jpg" for n in ("six", "class9", "nan", "empty", "bare")))
    write(root, "train/labels/six.txt", f"0 {YOLO} 0.9\n0 {YOLO}\n")
    write(root, "train/labels/class9.txt", f"9 {YOLO}\n")
    write(root, "train/labels/nan.txt", "0 nan 0.5 0.5 0.5\n")
    write(root, "train/labels/empty.txt", "")
    write(root, "train/labels/orphan.txt", f"0 {YOLO}\n")
    write(root, "train/images/text.jpg", "no image")
    manifest = import_dataset(root, "own")
    files = counts(manifest)
    assert (files["images"].seen, files["images"].read) == (9, 5)
    assert files["images"].refused == {
        "not the number of columns that the format wants": 1,
        "a box of a class that is not listed": 1,
        "a box with a value that is no finite number": 1,
        "a file that is no image": 1,
    }
    labels = files["annotation files"]
    assert sum(labels.refused.values()) == 3 and labels.read == 5  # three of the splits, the empty one, data.yaml
    assert {f.name for f in (root.parent.parent / "data_manifests/own").iterdir()} == {
        Path(manifest.splits["train"].converted).name
    }  # val and test stand as they are
    assert len(load_dataset("own", "train", strict=True)) == 3
    assert "six.txt line 1: 6 columns" in "\n".join(import_lines(manifest))


def test_faulty_coco_is_counted(root):
    image(root, *(f"train/{n}.jpg" for n in "abc"))
    image(root, "val/gone.jpg", "val/e.jpg")
    document = coco([f"{n}.jpg" for n in ("a", "b", "c", "gone")])
    document["annotations"][1]["category_id"] = 77
    document["images"][2] |= {"height": 480, "width": 640}
    document["annotations"].append({"id": 99, "image_id": 1234, "category_id": 1, "bbox": [1, 1, 2, 2]})
    write(root, "train/_annotations.coco.json", document)
    write(root, "val/_annotations.coco.json", coco(["e.jpg"]))
    manifest = import_dataset(root, "own")
    files = counts(manifest)
    assert files["images"].refused == {
        "a box of a class that is not listed": 1,
        "an image of another size than its annotation says": 1,
    }
    assert manifest.imported.missing == {"named, but there is no such image": 1}  # val's gone.jpg is another one
    assert manifest.imported.boxes == {"a box of an image that is not listed": 1}
    assert load_dataset("own", "train", strict=True).file_names.tolist() == ["train/a.jpg"]
    assert manifest.splits["val"].converted is None
    with pytest.raises(InputError, match="none of its 1 images is here, such as e.jpg; say where the images are"):
        (root / "val/e.jpg").unlink()
        import_dataset(root, "own", overwrite=True)


def test_faulty_labelme_and_voc_are_counted(root):
    labelme(root)
    write(root, "json/c.json", '{"version": "5.5.0", "shapes": [{"label": "cat", "points": [[1')
    image(root, "imgs/c.jpg", "imgs/d.jpg")
    shape = {"label": "cat", "points": [[1, 1], ["x", 2]], "shape_type": "rectangle"}
    label = {"shapes": [shape], "imagePath": "../imgs/d.jpg", "imageHeight": H, "imageWidth": W}
    write(root, "json/d.json", label)
    write(root, "json/e.json", label | {"imagePath": "../imgs/gone.jpg", "shapes": []})
    manifest = import_dataset(root, "own")
    files = counts(manifest)
    assert (files["images"].read, sum(files["images"].refused.values())) == (2, 1)
    assert sum(files["annotation files"].refused.values()) == 2 and manifest.imported.missing
    devkit = root.parent / "voc"
    vocdevkit(devkit)
    write(devkit, "VOCdevkit/VOC2012/Annotations/2007_2.xml", voc("2007_2.jpg")[:120])
    manifest = import_dataset(devkit, "voc")
    files = counts(manifest)
    assert files["images"].refused == {"its annotation file: XML cut off or malformed": 1}
    assert files["annotation files"].refused == {"XML cut off or malformed": 1}
    assert {s: len(load_dataset("voc", s, strict=True)) for s in manifest.splits} == {"train": 1, "val": 1}


# ---- other forms of the same tools


def test_the_other_exports_of_cvat_and_label_studio(root):
    image(root, "darknet/obj_train_data/a.jpg", "darknet/obj_train_data/b.jpg")
    for name in "ab":
        write(root, f"darknet/obj_train_data/{name}.txt", f"1 {YOLO}\n")
    write(root, "darknet/obj.names", "cat\ndog\n")
    write(root, "darknet/obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    write(root, "darknet/train.txt", "data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n")
    manifest = import_dataset(root / "darknet", "darknet")
    assert (manifest.classes, manifest.splits["train"].fingerprint.boxes) == (["cat", "dog"], 2)
    image(root, "ultra/images/train/a.jpg")
    write(root, "ultra/labels/train/a.txt", f"0 {YOLO}\n")
    write(root, "ultra/train.txt", "images/train/a.jpg\n")
    write(root, "ultra/data.yaml", "path: ./\ntrain: train.txt\nnames:\n  0: cat\n  1: dog\n")
    manifest = import_dataset(root / "ultra", "ultra")
    assert manifest.splits["train"].converted is None and manifest.splits["train"].fingerprint.boxes == 1
    image(root, "cvat/images/default/a.jpg")
    write(root, "cvat/annotations/instances_default.json", coco(["a.jpg"]))
    assert import_dataset(root / "cvat", "cvat").splits["train"].images == "images/default"
    image(root, "short/1a2b3c4d-a.jpg")
    value = {"x": 25, "y": 25, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["cat"]}
    row = {"image": "/data/upload/1/1a2b3c4d-a.jpg", "id": 1, "annotation_id": 1}
    write(root, "short/min.json", [row | {"label": [value | {"original_width": W, "original_height": H}]}])
    import_dataset(root / "short", "short")
    assert np.abs(load_dataset("short").boxes_xyxy - BOX).max() < 0.01


def test_labels_without_images_say_so(root):
    write(root, "labels/a.txt", f"0 {YOLO}\n")
    write(root, "classes.txt", "cat\n")
    with pytest.raises(InputError, match="1 label files of YOLO and no image; say where the images are: --images DIR"):
        import_dataset(root, "own")
    image(root.parent / "elsewhere", "a.jpg")
    manifest = import_dataset(root, "own", images=root.parent / "elsewhere")
    assert manifest.splits["train"].fingerprint.boxes == 1


def test_images_without_labels_are_not_evaluated(root):
    from neo_nb.cli.commands import check_data

    unlabelled(root)
    import_dataset(root, "own")
    with pytest.raises(InputError, match="own/predict: its images have no labels; predict on them"):
        check_data("own", "predict")


# ---- splits


def test_import_with_shares_keeps_clips_and_copies_together(root):
    rng = np.random.default_rng(0)
    for clip in range(8):
        pixels = cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (W, H), interpolation=cv2.INTER_CUBIC)
        for frame in range(5):
            name = f"images/clip{clip}_frame_{frame:04}.jpg"
            (root / "images").mkdir(exist_ok=True)
            cv2.imwrite(str(root / name), np.roll(pixels, frame, 1))
            write(root, name.replace("images", "labels").replace("jpg", "txt"), f"{clip % 2} {YOLO}\n")
    for copy in range(4):
        (root / f"images/again{copy}.jpg").write_bytes((root / f"images/clip{copy}_frame_0002.jpg").read_bytes())
        write(root, f"labels/again{copy}.txt", f"{copy % 2} {YOLO}\n")
    write(root, "classes.txt", "cat\ndog\n")
    manifest = import_dataset(root, "own", val=0.25, test=0.125)
    assert (manifest.division.groups, manifest.division.cut) == (8, 0)
    tables = {split: load_dataset("own", split, strict=True) for split in ("train", "val", "test")}
    assert sum(map(len, tables.values())) == 44
    home = {Path(f).stem: split for split, t in tables.items() for f in t.file_names.tolist()}
    for clip in range(8):
        own = {home[f"clip{clip}_frame_{frame:04}"] for frame in range(5)}
        assert len(own | ({home[f"again{clip}"]} if clip < 4 else set())) == 1
    assert all(len(set(t.labels.tolist())) == 2 for s, t in tables.items() if s != "test")
    lists = {split: Path(entry.include).read_text() for split, entry in manifest.splits.items()}
    again = split_dataset("own", 0.25, 0.125)
    assert {split: Path(entry.include).read_text() for split, entry in again.splits.items()} == lists
    anew = import_dataset(root, "own", overwrite=True, val=0.25, test=0.125)
    assert {split: Path(entry.include).read_text() for split, entry in anew.splits.items()} == lists


@pytest.mark.parametrize("classes", [1, 80])
def test_shares_are_even_and_tiny_sets_divide(root, classes):
    names = [f"{i}.png" for i in range(160)]
    (root / "images").mkdir()
    pixels = np.random.default_rng(1).integers(0, 255, (160, 8, 8), np.uint8)
    for name, own in zip(names, pixels):
        cv2.imwrite(str(root / "images" / name), cv2.resize(own, (W, H), interpolation=cv2.INTER_NEAREST))
    document = coco(names, [f"c{i}" for i in range(classes)])
    for i, row in enumerate(document["annotations"]):
        row["category_id"] = 1 + i % classes
    write(root, "all.json", document)
    manifest = import_dataset(root, "own", val=0.25)
    boxes = manifest.splits["val"].fingerprint
    assert 35 <= boxes.images <= 45
    if classes == 80:  # two images of each: one goes to val for about half of the classes, never both
        assert sum(n > 0 for n in boxes.per_class.values()) >= 35 and max(boxes.per_class.values()) == 1
    write(root, "all.json", coco(names[:3]))
    tiny = import_dataset(root, "tiny", val=0.2, test=0.1)
    assert [entry.fingerprint.images for entry in tiny.splits.values()] == [1, 1, 1]


# ---- the command


def test_the_list_is_quick(root):
    script = "import sys; from neo_nb.cli.main import main; s = main(['data', 'list']); assert 'torch' not in sys.modules; sys.exit(s)"
    begun = time.process_time(), os.times().children_user
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.times().children_user - begun[1] < 2  # of a processor; about half of it on an idle machine


def test_the_command_says_it_in_lines(root, capsys):
    from neo_nb.cli.main import main

    cameras(root)
    assert main(["data", "import", str(root), "own", "--val", "0.25"]) == 0
    text = capsys.readouterr().out
    assert "YOLO without a YAML" in text and "images: 4 seen = 4 read + 0 refused + 0 ignored" in text
    assert "4 images in 4 groups" in text and "manifest: " in text
    assert main(["data", "split", "own", "--val", "2"]) == 2
    assert "no shares of the images" in capsys.readouterr().err
    assert main(["data", "import", str(root), "own"]) == 2
