"""Eight bits after training: what is in integers, what is not, what nothing may be calibrated on, and the gate."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from test_cli import neo, refused, runs, workplace  # noqa: F401  fixtures
from test_export import SIZE, opinionated, photos

from neo_nb.base.annotations import Annotations
from neo_nb.base.core import InputError
from neo_nb.deploy.detector import TorchDetector, load_detector
from neo_nb.deploy.half import to_half
from neo_nb.deploy.int8_onnx import Int8File, Judge, choose_kept, count_products, draw_images, group_of, measure_groups
from neo_nb.deploy.onnx import CALIBRATED, NotProven, export_onnx, prove, settle, verdict_text
from neo_nb.models.weights import save_weights
from neo_nb.models.zoo import create_model


def written(folder: Path, count: int, dark: bool = False) -> Annotations:
    "Photos as files, without objects."
    folder.mkdir(parents=True)
    images = [image // (40 if dark else 1) for image in photos(count)]
    names = [f"{row}.png" for row in range(count)]
    for name, image in zip(names, images):
        cv2.imwrite(str(folder / name), image[..., ::-1])
    sizes = [image.shape[:2] for image in images]
    nothing = np.zeros(count + 1, int), np.zeros((0, 4)), []
    return Annotations(range(count), names, sizes, *nothing, ("person", "head"), root=folder, name="photos/train")


def labelled(detector, table: Annotations, each: int = 5) -> Annotations:
    "The surest of what a detector finds, as objects: its own AP is near 1."
    found = detector.predict(table, progress=False).top_k(each)
    order = np.argsort(found.image_index, kind="stable")
    offsets = np.r_[0, np.cumsum(np.bincount(found.image_index, minlength=len(table)))]
    boxes = {"boxes_xyxy": found.boxes_xyxy[order], "labels": found.labels[order]}
    columns = {key: getattr(table, key) for key in ("image_ids", "file_names", "sizes", "class_names", "root", "name")}
    return Annotations(**columns, offsets=offsets, **boxes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A model, its float file, and images with objects."
    place = tmp_path_factory.mktemp("int8")
    model = opinionated("rtdetr_nano")
    full = export_onnx(model, place / "full.onnx", size=SIZE, fingerprint="print", metrics={"threshold": 0.4})
    return model, full, labelled(load_detector(full), written(place / "photos", 12))


@pytest.fixture(scope="module")
def net(made):
    "The file with ranges."
    found = Int8File(made[1])
    found.calibrate(draw_images(made[2], 8, 4)[0])
    return found


def weights_of(proto: onnx.ModelProto) -> dict[str, bool]:
    "Product with weights → whether they are stored as integers."
    stored = {constant.name for constant in proto.graph.initializer}
    rounded = {
        node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    return {
        node.name: node.input[1] in rounded for node in proto.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")
    }


@pytest.mark.parametrize("name", ["rtdetr_nano", "detr_nano"])
def test_products_run_as_integers_and_the_ends_of_heads_do_not(made, net, tmp_path, name):
    full = made[1]
    if name == "detr_nano":
        torch.manual_seed(0)
        full = export_onnx(create_model(name, 2).eval(), tmp_path / "full.onnx", size=SIZE, batch=2, opset=17)
        net = Int8File(full)
        net.calibrate(made[2][:3])  # the last batch is not full
    small = net.write(tmp_path / "small.onnx")
    stored = weights_of(onnx.load(small))
    assert all(stored[name] for name in net.layers) and not any(stored[name] for name in net.fixed)
    whole, floats = count_products(small)
    folded = name == "detr_nano"  # one of its products takes the learned queries, and is worked out beforehand
    assert whole == len(net.layers) - folded > 40 and count_products(full)[0] == 0, (whole, floats)
    kept = " ".join(net.fixed.values())
    heads = ("enc_box.4", "enc_score", "cross.offsets", "query_position.0")
    for part in ("bbox_predictor.layers.2", "class_labels") if name == "detr_nano" else heads:
        assert part in kept, f"{part} is not among {kept}"
    assert small.stat().st_size < 0.5 * full.stat().st_size
    found = load_detector(small).detect_images(photos(3))
    assert found.num_images == 3 and np.isfinite(found.boxes_xyxy).all() and np.isfinite(found.scores).all()


def test_the_file_says_what_it_is_and_opens_with_the_same_call(made, net, tmp_path):
    _, full, table = made
    part = [name for name in net.groups if name != "backbone.stem.0"]
    detector, own = load_detector(net.write(tmp_path / "small.onnx", part)), load_detector(full)
    assert (detector.precision, detector.kind, detector.threshold) == ("int8", "onnx", 0.4)
    for name in ("class_names", "category_ids", "size", "preprocessing", "max_dets", "batch"):
        assert getattr(detector, name) == getattr(own, name), name
    assert {k: v for k, v in detector.record.items() if k in own.record and k != "precision"} == own.record
    assert {"backbone.stem.0.0", *net.fixed.values()} == set(detector.record["in_float"])
    assert detector.record["int8"] == {"calibrated on": "photos/train", "images": 8, "rule": "minmax"}
    with pytest.raises(InputError, match="the file computes in int8, fp16 was requested"):
        load_detector(tmp_path / "small.onnx", precision="fp16")
    with pytest.raises(InputError, match="the file is in int8 already"):
        Int8File(tmp_path / "small.onnx")
    with pytest.raises(InputError, match="the file is in int8 already"):
        to_half(tmp_path / "small.onnx", tmp_path / "half.onnx")
    with pytest.raises(InputError, match="no such group of layers: 'backbone.stem'"):
        net.quantise(["backbone.stem"])


@pytest.mark.parametrize("rule", ["percentile", "entropy"])
def test_the_same_images_make_the_same_file(made, tmp_path, rule):
    files = []
    for number in range(2):
        again = Int8File(made[1])
        again.calibrate(draw_images(made[2], 2, 2, seed=3)[0], rule)
        files.append(again.write(tmp_path / f"{number}.onnx").read_bytes())
    assert files[0] == files[1]


def test_nothing_is_calibrated_on_what_judges(made, net):
    table = made[2]
    for split in ("val", "test", "golden", "Validation"):
        other = replace(table, name=f"photos/{split}")
        with pytest.raises(InputError, match="would see what the file is judged by"):
            draw_images(other)
        with pytest.raises(InputError, match="would see what the file is judged by"):
            Int8File(made[1]).calibrate(other)
    first, second = (draw_images(table, 6, 3, seed=seed)[0].file_names.tolist() for seed in (0, 1))
    assert first != second and first == draw_images(table, 6, 3)[0].file_names.tolist()
    with pytest.raises(InputError, match="none of the held-out images has an object"):
        Judge(net, replace(table[:2], offsets=np.zeros(3, int), boxes_xyxy=np.zeros((0, 4)), labels=[], iscrowd=None,
                           areas=None, box_ids=None, lines=None))  # fmt: skip


def test_what_costs_most_stays_in_float_until_the_loss_is_inside_the_limit(made, net):
    judge = Judge(net, made[2][8:])
    assert judge.ap > 0.9 and judge.cost([]) == {"AP lost": 0.0, "differ": 0.0}
    some = [name for name in net.groups if name.startswith("backbone.stem")]
    effects = measure_groups(judge, some)
    assert sorted(effects.index) == sorted(some) and (effects["differ"].diff().dropna() <= 0).all()
    assert effects["layers"].sum() == sum(group_of(layer) in some for layer in net.layers.values())
    nothing, steps = choose_kept(judge, effects, limit=1.0)
    assert nothing == [] and len(steps) == 1
    kept, steps = choose_kept(judge, effects[:2], limit=-1.0)  # which no file reaches
    assert kept == effects.index[:2].tolist() and len(steps) == 3


def test_a_file_that_finds_something_else_fails_the_gate(made, net, tmp_path):
    """Ranges from black images cut everything that is bright."""
    model, full, table = made
    expected = TorchDetector(model, SIZE).predict(table, progress=False)
    good = load_detector(net.write(tmp_path / "good.onnx")).predict(table, progress=False)
    blind = Int8File(full)
    blind.calibrate(written(tmp_path / "dark", 3, dark=True))
    file = blind.write(tmp_path / "model.unproven.onnx")
    bad = load_detector(file).predict(table, progress=False)
    proof = prove(expected, bad, CALIBRATED, ap=(0.58, 0.58))
    assert proof["agreement"] < 0.6 < prove(expected, good, CALIBRATED)["agreement"]
    with pytest.raises(NotProven, match="differs: .*needed 75"):
        settle(file, proof["verdict"], verdict_text(proof))
    lost = prove(expected, expected, CALIBRATED, ap=(0.58, 0.56))
    assert (lost["verdict"], lost["min_iou"]) == ("differs", 0.5), "more AP is lost than the limit"


def trained(folder: Path) -> Path:
    "A data set of photos with a manifest, and the weights that find its objects."
    model = opinionated("rtdetr_nano", decoder_layers=1)
    model.size = SIZE
    table = labelled(TorchDetector(model, SIZE), written(folder / "images", 9))
    entries = {}
    for split, rows in (("train", range(6)), ("val", range(6, 9))):
        boxes = [
            {"id": 100 * row + place, "image_id": row + 1, "category_id": int(label) + 1, "iscrowd": 0,
             "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)], "area": float((x2 - x1) * (y2 - y1))}
            for row in rows for place, ((x1, y1, x2, y2), label) in enumerate(zip(table[row].boxes_xyxy, table[row].labels))
        ]  # fmt: skip
        images = [{"id": row + 1, "file_name": f"{row}.png", "height": SIZE[0], "width": SIZE[1]} for row in rows]
        categories = [{"id": number + 1, "name": name} for number, name in enumerate(table.class_names)]
        (folder / f"{split}.json").write_text(
            json.dumps({"images": images, "annotations": boxes, "categories": categories})
        )
        entries[split] = f"{{annotations: {split}.json, images: images}}"
    lines = "\n".join(f"  {split}: {entry}" for split, entry in entries.items())
    (folder / "photos.yaml").write_text(f"format: coco\nroot: {folder}\nclasses: [person, head]\nsplits:\n{lines}\n")
    save_weights(model, folder / "found.safetensors", data=str(folder / "photos.yaml"))
    return folder


def test_the_command_writes_the_file_and_says_what_it_cost(neo, workplace):  # noqa: F811
    place = trained(workplace / "photos")
    words = ("export", place / "found.safetensors", "--data", place / "photos.yaml", "--precision", "int8")
    refused(neo(*words, "--calibration-split", "val"), "calibration on val would see what the file is judged by")
    refused(neo(*words, "--calibration", "mse"), "no such rule of calibration: 'mse'", "entropy")
    assert runs(workplace) == []
    status, out, err = neo(*words)
    assert status in (0, 1), err  # three images are few to lose less than .01 AP on
    (run,) = [p.parent for p in workplace.rglob("int8.json")]
    known, about = (json.loads((run / name).read_text()) for name in ("int8.json", "export.json"))
    assert (status == 0) == (about["verdict"] == "proven") == (run / "model.onnx").exists(), (status, about["told"])
    assert ("INT8 is worth it here" in known["told"]) == known["worth"]
    assert [row["precision"] for row in known["precisions"]] == ["fp32", "fp16", "int8"]
    row = known["precisions"][2]
    assert row["integer products"] > 0 and row["MB"] < known["precisions"][0]["MB"]
    assert known["images"] + known["held out"] == 6 and known["calibrated on"].endswith("/train")
    page = (run / "report.html").read_text()
    assert known["told"][:20] in page and "Each group of layers alone in integers" in page
    if status == 0:
        assert known["told"] in out and "of the time" in out
