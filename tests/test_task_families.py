"""Models that find more than boxes, through every command: train, resume, evaluate, export, predict, warm start."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command import neo as command
from test_runs import QUIET, epochs
from train_worker import stop_after_an_epoch

from neo_nb.base.boxes import box_iou
from neo_nb.base.core import InputError
from neo_nb.base.keypoints import COCO_PERSON
from neo_nb.base.masks import Masks
from neo_nb.data.batch import Targets
from neo_nb.data.coco import write_coco
from neo_nb.data.loader import make_loader, read_image
from neo_nb.data.manifest import load_dataset
from neo_nb.deploy.detector import TorchDetector, load_detector
from neo_nb.deploy.half import emulated_detector, to_half
from neo_nb.deploy.image_input import to_image_input
from neo_nb.deploy.onnx import export_onnx, prove
from neo_nb.deploy.torch_package import export_package
from neo_nb.models import create_model, load_model, load_weights, save_weights
from neo_nb.models.contract import TASKS
from neo_nb.models.zoo import task_of
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.checkpoint import load_state
from neo_nb.train.config import make_config
from neo_nb.train.trainer import Trainer, train

WALKED = ("rtdetr_nano_seg", "rtdetr_nano_pose", "rtmdet_ins_nano")
models = pytest.mark.parametrize("name", WALKED)
SIZE = (96, 160)


def neo(*words: object, cwd: Path):
    ended = command(*map(str, words), cwd=cwd, **QUIET)
    assert ended.returncode == 0, (words, ended.stdout[-2000:], ended.stderr[-4000:])
    return ended.stdout


def make(name: str, classes: tuple[str, ...] = ("person", "head"), **overrides: object):
    """A fresh model of any task."""
    skeleton = COCO_PERSON if task_of(name) == "pose" else None
    return create_model(name, class_names=classes, skeleton=skeleton, **overrides)


def few(name: str) -> dict[str, int]:
    """Few queries, for a model that has some."""
    return {"num_queries": 20} if name.startswith("rtdetr") else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A workspace with six drawn crowds as COCO has them: with masks and keypoints, and as boxes alone."""
    folder = tmp_path_factory.mktemp("tasks") / "workspace"
    (folder / "data_manifests").mkdir(parents=True)
    (folder / "settings.ini").write_text("[DEFAULT]\ndata = data\nreports = reports\n")
    table = make_scenes(6, SIZE, 5, folder / "data/people", extras=True)
    table = replace(table, file_names=np.array([Path(f).name for f in table.file_names]), semantic_files=None)
    boxes = replace(table, masks=None, keypoints=None, skeleton=None)
    for name, some in (("people", table), ("boxes", boxes)):
        write_coco(some, folder / f"data/{name}.json")
        split = {"annotations": f"{name}.json", "images": "people/images"}
        known = {"title": name, "format": "coco", "root": ".", "licence": "CC0-1.0", "classes": ["person", "head"]}
        known["splits"] = {"train": split, "val": split}
        (folder / f"data_manifests/{name}.yaml").write_text(yaml.safe_dump(known))
    return folder


def people(folder: Path, monkeypatch):
    monkeypatch.setenv("NEO_ROOT", str(folder))
    monkeypatch.setenv("NEO_DATA", str(folder / "data"))
    return load_dataset(str(folder / "data_manifests/people.yaml"), "train", extras=True)


@pytest.fixture(scope="module", params=WALKED)
def trained(request, folder) -> tuple[str, Path, Path]:
    """A model and a run of two epochs."""
    # a dense detector's fresh boxes are all alike, and which of them is suppressed hangs on the last bit
    passes = 6 if few(request.param) else 16
    small = f"--data people --passes-per-epoch {passes} --batch-size 3 --tracker none --target cpu --cache --epochs 2"
    neo("train", *small.split(), "--size", *SIZE, "--model", request.param, cwd=folder)
    return request.param, folder, max(folder.glob(f"reports/*-train-people-{request.param}"))


def test_a_training_measures_what_the_model_is_for(trained):
    name, _, run = trained
    assert epochs(run) == [1, 2]
    head, *rows = [line.split(",") for line in (run / "results.csv").read_text().splitlines()]
    assert {"AP", "box_AP", *(f"loss_{term}" for term in make(name).main_terms)} <= set(head)
    first, last = (float(row[head.index("loss")]) for row in rows)
    assert last < first
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["iou_type"] == TASKS[task_of(name)] and (run / "report.html").is_file()


def test_the_other_commands_take_the_run(trained):
    name, folder, run = trained
    number = run.name.partition("-")[0]
    found = json.loads(neo("evaluate", number, "--verify", "--json", cwd=folder))
    assert found["images"] == 6 and found["verification"]["AP"]["difference"] < 1e-6
    least = "0.0001" if few(name) else "0.01"
    assert "export proven" in neo("export", number, "--min-score", least, cwd=folder)
    file = max(folder.glob("reports/*/model.onnx"), key=lambda path: path.stat().st_mtime)
    detector, reference = load_detector(file), load_detector(run)
    assert detector.record["model"] == name and detector.task == task_of(name)
    image = folder / "data/people/images/00000.png"
    image = image if image.exists() else next((folder / "data/people/images").iterdir())
    one, two = (d(image, threshold=0.0).top_k(10) for d in (detector, reference))
    if task_of(name) == "segmentation":
        assert (np.abs(one.masks.areas - two.masks.areas) <= 2).all()
    else:
        assert np.abs(one.keypoints - two.keypoints).max() < 0.05 and detector.skeleton == COCO_PERSON
    assert one.per_box == two.per_box == detector.nothing(3).per_box
    neo("predict", file, image, cwd=folder)


def test_a_file_of_every_kind_finds_what_it_finds(trained, tmp_path):
    name, folder, run = trained
    model, _ = load_model(run / "weights/best.safetensors")
    images = [read_image(path) for path in sorted((folder / "data/people/images").iterdir())[:2]]
    images.append(np.ascontiguousarray(images[0][10:, :70]))  # of another shape: padded
    file = export_onnx(model, tmp_path / "model.onnx", batch=1)
    expected = TorchDetector(model).detect_images(images)
    least = float(np.sort(expected.scores)[-12]) - 1e-4
    kinds = {"fp16": emulated_detector(to_half(file, tmp_path / "half.onnx"))}
    kinds["image"] = load_detector(to_image_input(file, tmp_path / "image.onnx"))
    kinds["package"] = load_detector(export_package(model, tmp_path / "model.pt2"))
    if importlib.util.find_spec("openvino"):
        kinds["openvino"] = load_detector(file, runtime="openvino")
    for kind, detector in kinds.items():
        found = detector.detect_images(images)
        proof = prove(expected, found, "fp16" if kind == "fp16" else "fp32", least)
        assert proof["agreement"] > 0.8 and proof["detections"] > 9, (kind, proof)
        assert found.per_box == expected.per_box and detector.task == model.task
        for row in range(3):  # the surest of each
            one, two = (side.for_image(row).filter(least) for side in (expected, found))
            overlap = box_iou(one.boxes_xyxy, two.boxes_xyxy)
            for mine, other in zip(*np.nonzero(overlap > 0.99)):
                same = one.labels[mine] == two.labels[other] and abs(one.scores[mine] - two.scores[other]) < 1e-3
                if same and model.task == "segmentation":
                    parts = one.masks.decode(int(mine)), two.masks.decode(int(other))
                    assert (parts[0] != parts[1]).sum() <= 2 + 0.05 * parts[0].sum(), (kind, row, mine)
                elif same:
                    assert np.abs(one.keypoints[mine] - two.keypoints[other])[:, :2].max() < 1.0, (kind, row, mine)


def test_data_without_what_it_learns_is_refused(folder):
    ended = command(*"train --data boxes --model rtdetr_nano_seg --epochs 1".split(), cwd=folder, **QUIET)
    assert ended.returncode == 2 and "learns masks, and the annotations have none" in ended.stderr


@models
def test_a_run_that_is_cut_and_resumed_is_the_straight_one_bit_for_bit(name, folder, tmp_path, monkeypatch):
    more = {"model": name, "size": SIZE, "passes_per_epoch": 1, "batch_size": 2, "policy": "none", "tracker": "none"}
    more |= {"device": "cpu", "precision": "fp32", "grad_accum_steps": 2, "schedule": "constant", "warmup": 0.0}
    table = people(folder, monkeypatch)
    train(make_config(**more, epochs=2), tmp_path / "straight", table, table)
    first = Trainer(make_config(**more, epochs=2), tmp_path / "cut", table, table)
    stop_after_an_epoch(first)
    assert first.fit()["interrupted"]
    train(make_config(**more, epochs=2), tmp_path / "cut", table, table, resume=True)
    straight, cut = (load_state(tmp_path / side / "weights/last.pt")["model"] for side in ("straight", "cut"))
    for key, value in straight.items():
        assert torch.equal(value, cut[key]), key


@models
def test_weights_are_read_back_and_begin_as_a_detector_s(name, tmp_path):
    torch.manual_seed(0)
    model = make(name, **few(name)).eval()
    model.size = SIZE
    save_weights(model, tmp_path / "x.safetensors")
    again, record = load_model(tmp_path / "x.safetensors")
    assert record["task"] == again.task == task_of(name) and again.skeleton == model.skeleton
    images, sizes = torch.rand(2, 3, *SIZE), torch.tensor([SIZE] * 2)
    with torch.no_grad():
        for one, two in zip(*(m.detect(m(images), sizes, sizes) for m in (model, again))):
            assert torch.equal(one, two)
    detector = name.replace("_ins", "") if "_ins" in name else name.rpartition("_")[0]
    plain = create_model(detector, class_names=("person", "head"), **few(name))
    save_weights(plain, tmp_path / "plain.safetensors")
    report = load_weights(model, tmp_path / "plain.safetensors")
    assert report.fresh and all(key.startswith(("masks.", "poses.")) for key in report.fresh) and not report.unused


@models
def test_a_batch_is_the_sum_of_its_parts(name, folder, monkeypatch):
    torch.manual_seed(0)
    model = make(name).eval()
    batch = next(iter(make_loader(people(folder, monkeypatch), size=SIZE, divisor=32, batch_size=4, quiet=True)))

    def gradients(parts: list[slice]) -> torch.Tensor:
        model.zero_grad()
        counts = dict.fromkeys(model.loss_counts(batch.targets), 40.0)
        for part in parts:
            targets = batch.targets[part]
            outputs = model(batch.images[part], batch.sizes[part])
            sum(model.loss_sums(outputs, targets, **counts)[0].values()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, halves = gradients([slice(0, 4)]), gradients([slice(0, 1), slice(1, 4)])
    assert (whole - halves).norm() < 1e-4 * whole.norm()


@models
def test_a_detection_is_the_same_alone_and_among_images_of_other_shapes(name):
    torch.manual_seed(0)
    model = make(name).eval()
    model.size = SIZE
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (h, w, 3), np.uint8) for h, w in ((90, 160), (160, 90), (33, 200), (8, 8))]
    detector = TorchDetector(model)
    together = detector.detect_images(images)
    for number, image in enumerate(images):
        one, other = detector.detect_images([image]), together.for_image(number)
        assert np.abs(np.sort(one.scores) - np.sort(other.scores)).max() < 1e-5
        if one.masks is not None:
            assert (one.masks.sizes == image.shape[:2]).all()
            assert abs(np.sort(one.masks.areas) - np.sort(other.masks.areas)).max() <= 2
        else:
            assert (one.keypoints[..., :2] <= np.array(image.shape[1::-1]) + 1e-3).all()


@models
@pytest.mark.parametrize("objects", [1, 391])
def test_one_object_and_hundreds_in_bf16(name, objects):
    torch.manual_seed(0)
    model = make(name, **(few(name) and {"num_queries": 400})).train()
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.8, (objects, 2)) * [640, 384]
    corners = np.concatenate([low, low + rng.uniform(6, 60, (objects, 2))], 1)
    boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    rings = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in corners.tolist()]
    points = np.concatenate([rng.random((objects, 17, 2)), rng.integers(0, 3, (objects, 17, 1))], 2)
    target = Targets(
        torch.tensor(boxes / [640, 384, 640, 384]).float(), torch.zeros(objects, dtype=torch.int64), torch.zeros(0, 4),
        torch.tensor(points).float(), Masks.from_coco(rings, [(384, 640)] * objects),
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.rand(1, 3, 384, 640), None, (target,))
    terms = model.loss(outputs, (target,))
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_pose_needs_a_skeleton_and_nothing_else_takes_one():
    with pytest.raises(InputError, match="finds keypoints: which ones"):
        create_model("rtdetr_nano_pose", 2)
    with pytest.raises(InputError, match="finds no keypoints, a skeleton was given"):
        create_model("rtdetr_nano_seg", 2, skeleton=COCO_PERSON)
