"""Upright and lying images in batches apart: through training, evaluation, prediction, files and exports."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_rtdetr_properties import distance, lively

from neo_nb.base.annotations import Annotations
from neo_nb.base.core import InputError
from neo_nb.base.detections import Detections
from neo_nb.data.loader import make_loader, read_image
from neo_nb.deploy.detector import TorchDetector, load_detector
from neo_nb.deploy.onnx import export_onnx, verify_onnx
from neo_nb.deploy.tiled import TiledDetector
from neo_nb.models.hub import input_table
from neo_nb.models.weights import load_weights, model_record, read_preprocessing, read_record, save_weights
from neo_nb.models.zoo import create_model
from neo_nb.train.checkpoint import load_state
from neo_nb.train.config import make_config
from neo_nb.train.loop import build_model
from neo_nb.train.trainer import Trainer

LYING, UPRIGHT = (64, 96), (96, 64)
SIZES = [(80, 120), (120, 80), (100, 150), (150, 100), (90, 90), (128, 80), (60, 140)]  # (height, width) of files
families = pytest.mark.parametrize("name", ["rtdetr_nano", "detr_nano"])


def photos(folder: Path, count: int = 13) -> Annotations:
    "Noise with bright rectangles; upright, lying and square."
    folder.mkdir(parents=True, exist_ok=True)
    rng, boxes, offsets = np.random.default_rng(0), [], [0]
    sizes = [SIZES[i % len(SIZES)] for i in range(count)]
    for i, (height, width) in enumerate(sizes):
        image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for _ in range(1 + i % 3):
            x, y = int(rng.integers(width - 30)), int(rng.integers(height - 30))
            image[y : y + 28, x : x + 20] = rng.integers(120, 255, 3)
            boxes.append((x, y, x + 20, y + 28))
        offsets.append(len(boxes))
        cv2.imwrite(str(folder / f"{i}.png"), image)
    names, labels = [f"{i}.png" for i in range(count)], np.arange(len(boxes)) % 2
    return Annotations(range(count), names, sizes, offsets, boxes, labels, ("a", "b"), root=folder, name="mixed")


def settings(name: str = "rtdetr_nano", **more):
    given = {"model": name, "size": LYING, "epochs": 1, "passes_per_epoch": 1, "batch_size": 2, "num_queries": 20}
    given |= {"tracker": "none", "device": "cpu", "cache": False, "policy": "mild", "by_orientation": True}
    return make_config(**(given | more))


def rows(found: Detections, table: Annotations) -> list[np.ndarray]:
    "x1 y1 x2 y2 as fractions of the image, score, label: of each image."
    images = [found.for_image(row) for row in range(len(table))]
    sides = np.tile(table.sizes[:, ::-1], 2).astype(np.float32)
    return [
        np.concatenate([one.boxes_xyxy / sides[row], one.scores[:, None], one.labels[:, None]], 1)
        for row, one in enumerate(images)
    ]


def apart(one: Detections, other: Detections, table: Annotations) -> float:
    return max(distance(a, b) for a, b in zip(rows(one, table), rows(other, table), strict=True))


@pytest.fixture(scope="module", params=["rtdetr_nano", "detr_nano"])
def trained(request, tmp_path_factory):
    "A trainer after its run, the table, the run's folder, and the frames that training and evaluation saw."
    folder = tmp_path_factory.mktemp(request.param)
    table = photos(folder / "images")
    trainer = Trainer(settings(request.param), folder / "run", table, table)
    seen: dict[str, list] = {"train": [], "evaluate": []}

    def note(kind: str):
        return lambda module, given: seen[kind].append(tuple(given[0].shape[-2:]))

    hooks = [trainer.model.register_forward_pre_hook(note("train"))]
    hooks += [trainer.ema.model.register_forward_pre_hook(note("evaluate"))]
    trainer.fit()
    for hook in hooks:
        hook.remove()
    return trainer, table, folder / "run", seen


def test_training_and_evaluation_see_both_frames(trained):
    _, _, _, seen = trained
    assert set(seen["train"]) == {LYING, UPRIGHT}
    assert len(seen["train"]) == 6, "13 images in twos, the last one left out, as without"
    assert sorted(seen["evaluate"]) == [LYING] * 4 + [UPRIGHT] * 3, "7 lying or square images, 6 upright ones"


def test_an_image_is_answered_alone_as_among_others(trained):
    trainer, table, run, _ = trained
    detector = load_detector(run / "weights/last.safetensors")
    images = [read_image(table[row].path) for row in range(len(table))]
    together = detector.predict(table, batch_size=4, progress=False)
    assert together.num_images == 13 and set(together.image_index) == set(range(13))
    assert apart(detector.detect_images(images, batch_size=3), together, table) < 1e-4
    alone = [detector.detect_images([image]) for image in images]
    for row, one in enumerate(alone):
        assert apart(one, together.for_image(row), table.select([row])) < 1e-4
    order = np.random.default_rng(0).permutation(13)
    assert apart(detector.predict(table.select(order), progress=False), detector.detect_images([images[i] for i in order]),
                 table.select(order)) < 1e-4  # fmt: skip
    assert apart(trainer.predict(table), together, table) < 1e-3, "training measured what is deployed"
    plain = load_detector(run / "weights/last.safetensors")
    plain.by_orientation = False
    upright = table.select(table.sizes[:, 0] > table.sizes[:, 1])
    other = plain.predict(upright, progress=False)
    assert apart(other, detector.predict(upright, progress=False), upright) > 1e-3, "or nothing was compared"


def test_it_stands_in_the_record_and_comes_back(trained):
    trainer, _, run, _ = trained
    record = read_record(run / "weights/last.safetensors")
    assert record["contract"]["by_orientation"] is True and read_preprocessing(record).by_orientation
    assert "| images across the size | with its sides exchanged |" in input_table(record)
    again = load_detector(run / "weights/last.safetensors")
    assert again.preprocessing == trainer.model.preprocessing and again.by_orientation
    del record["contract"]["by_orientation"]  # as older versions wrote it
    assert read_preprocessing(record).by_orientation is False
    with pytest.raises(InputError, match="has by_orientation = 1"):
        read_preprocessing(record | {"contract": record["contract"] | {"by_orientation": 1}})


@families
def test_a_training_decides_for_itself_whatever_it_starts_from(name, tmp_path):
    table = photos(tmp_path / "images", 4)
    for theirs, own in ((True, False), (False, True)):
        model = create_model(name, class_names=("a", "b"), num_queries=20)
        model.preprocessing = replace(model.preprocessing, by_orientation=theirs)
        model.size = LYING
        save_weights(model, tmp_path / "start.safetensors")
        made = build_model(settings(name, weights=str(tmp_path / "start.safetensors"), by_orientation=own), table)
        assert made.preprocessing.by_orientation is own
        assert "by_orientation" not in str(load_weights(made, tmp_path / "start.safetensors"))


def test_the_size_has_the_proportions_of_the_images_whichever_way_they_stand(tmp_path):
    table = photos(tmp_path / "images", 4)  # two upright, two lying, all 2:3
    assert build_model(settings(size=None), table).size == (427, 640)
    assert build_model(settings(size=None, by_orientation=False), table).size == (591, 640)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("more", [{}, {"mosaic": 0.7, "mixup": 0.3, "scales": (1.0, 1.5)}])
def test_a_training_that_was_stopped_ends_as_the_straight_one_bit_for_bit(more, tmp_path, monkeypatch):
    table = photos(tmp_path / "images")
    config = settings(checkpoint_steps=2, batch_size=4, **more)
    straight = Trainer(config, tmp_path / "straight", table, table)
    straight.fit()
    stopped, update = Trainer(config, tmp_path / "stopped", table, table), Trainer.train_step

    def dies(self, *given):
        if self.progress["step"] == 2:
            raise RuntimeError("the power is gone")
        return update(self, *given)

    monkeypatch.setattr(Trainer, "train_step", dies)
    with pytest.raises(RuntimeError, match="the power is gone"):
        stopped.fit()
    monkeypatch.setattr(Trainer, "train_step", update)
    resumed = Trainer(config, tmp_path / "stopped", table, table)
    resumed.load(tmp_path / "stopped/weights/last.pt")
    assert resumed.progress["batch"] == 2
    resumed.fit()
    assert same(straight.model.state_dict(), resumed.model.state_dict())

    file = tmp_path / "stopped/weights/last.pt"
    with pytest.raises(InputError, match="by_orientation was True, is False"):
        Trainer(settings(batch_size=4, by_orientation=False), tmp_path / "other", table, table).load(file)
    state = load_state(file)
    del state["identity"]["by_orientation"]  # as older versions wrote it
    torch.save(state, tmp_path / "older.pt")
    Trainer(settings(batch_size=4, by_orientation=False), tmp_path / "older", table, table).load(tmp_path / "older.pt")


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one_process(tmp_path, world_size):
    table = photos(tmp_path, 23)
    given = dict(
        size=LYING, divisor=32, shuffle=True, seed=3, quiet=True, by_orientation=True, policy="mild", mosaic=0.4
    )
    given |= dict(sizes=[LYING, (96, 144)])
    whole = make_loader(table, batch_size=2 * world_size, **given)
    ranks = [make_loader(table, batch_size=2, rank=r, world_size=world_size, **given) for r in range(world_size)]
    for epoch in range(2):
        for loader in (whole, *ranks):
            loader.set_epoch(epoch)
        for batch, *parts in zip(whole, *ranks, strict=True):
            for rank, part in enumerate(parts):
                assert torch.equal(part.images, batch.images[rank::world_size])
                assert torch.equal(part.image_index, batch.image_index[rank::world_size])


def test_an_export_has_one_frame_and_is_held_to_the_model_in_that_frame(tmp_path):
    model = lively(1)
    model.preprocessing, model.size = replace(model.preprocessing, by_orientation=True), LYING
    assert model_record(model)["contract"]["by_orientation"] is True
    table = photos(tmp_path / "images", 7)
    images = [read_image(table[row].path) for row in range(7)]
    exported = load_detector(export_onnx(model, tmp_path / "model.onnx", batch="dynamic"))
    assert exported.record["contract"]["by_orientation"] is False and not exported.by_orientation
    assert model.preprocessing.by_orientation, "what was exported is what it was"
    proof = verify_onnx(tmp_path / "model.onnx", model, images, min_score=0.01, repeats=1)
    assert proof["verdict"] == "proven" and proof["detections"] > 20
    by_orientation = TorchDetector(model)
    assert apart(by_orientation(images), exported(images), table) > 1e-2, "other frames, other answers"
    turned = load_detector(export_onnx(model, tmp_path / "turned.onnx", size=UPRIGHT))
    lying, upright = (np.flatnonzero((table.sizes[:, 0] > table.sizes[:, 1]) == on) for on in (False, True))
    for file, some in ((exported, lying), (turned, upright)):  # a file for each does what training did
        part = [images[i] for i in some]
        assert apart(by_orientation(part), file(part), table.select(some)) < 1e-4


def test_tiles_are_turned_as_the_images_they_are(tmp_path):
    model = lively(2)
    model.preprocessing, model.size = replace(model.preprocessing, by_orientation=True), LYING
    inner = TorchDetector(model)
    table = photos(tmp_path / "images", 3)
    for tile in ((60, 90), (90, 60)):
        tiled = TiledDetector(inner, tile, whole=True)
        found = tiled.predict(table, progress=False)
        called = tiled.detect_images([read_image(table[row].path) for row in range(3)])
        assert found.num_boxes and apart(found, called, table) < 1e-4
        sides = np.tile(table.sizes[:, ::-1], 2)[found.image_index]
        assert (found.boxes_xyxy >= 0).all() and (found.boxes_xyxy <= sides).all()


def test_the_flag_is_a_setting_like_any_other():
    from neo_nb.train.config import TrainConfig

    notebook = json.loads((Path(__file__).parents[1] / "nbs/runs/train.ipynb").read_text())
    text = "".join("".join(cell["source"]) for cell in notebook["cells"])
    assert TrainConfig.model_fields["by_orientation"].default is False and "by_orientation = None  #" in text
