"""More objects than queries: counted before a training, refused, or let through when somebody says so."""

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from neo_nb.base.annotations import Annotations
from neo_nb.base.core import InputError
from neo_nb.runs.pilot import check_capacity
from neo_nb.train.config import make_config
from neo_nb.train.loop import overflow
from neo_nb.train.trainer import Trainer

COUNTS = (391, 1, 0, 40)


@pytest.fixture
def table(tmp_path) -> Annotations:
    "Four images with 391, 1, 0 and 40 small rectangles, and an ignore region that counts as none."
    rng = np.random.default_rng(0)
    boxes = []
    for i, count in enumerate(COUNTS):
        image = np.full((96, 160, 3), 90, np.uint8)
        corner = rng.integers(0, (150, 86), (count, 2))
        for x, y in corner.tolist():
            cv2.rectangle(image, (x, y), (x + 7, y + 7), (240, 40, 40), -1)
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
        boxes.append(np.concatenate([corner, corner + 8], 1))
    boxes.append(np.array([[0, 0, 160, 96]]))
    offsets = np.cumsum([0, *COUNTS[:3], COUNTS[3] + 1])
    crowd = np.arange(offsets[-1]) == offsets[-1] - 1
    return Annotations([10, 20, 30, 40], [f"{i}.png" for i in range(4)], [(96, 160)] * 4, offsets, np.concatenate(boxes),
                       [0] * offsets[-1], ("person",), root=tmp_path, name="crowd/train", iscrowd=crowd)  # fmt: skip


def trained(table: Annotations, folder: Path, **settings) -> Trainer:
    settings = {"size": (96, 160)} | settings
    config = make_config(epochs=1, passes_per_epoch=1, batch_size=2, tracker="none", cache=False,
                         device="cpu", no_aug_epochs=0, policy="none", **settings)  # fmt: skip
    trainer = Trainer(config, folder, table, table)
    trainer.fit()
    return trainer


def test_what_cannot_be_learned_is_counted(table):
    found = overflow(table, 300)
    assert (found["images"], found["worst"], found["image_id"], found["boxes"]) == (1, 391, 10, 91)
    assert found["share of images"] == 0.25 and found["share of boxes"] == pytest.approx(91 / sum(COUNTS))
    assert overflow(table, 391)["images"] == 0 and overflow(table.select([2]), 10)["share of boxes"] == 0


@pytest.mark.parametrize("model", ["rtdetr_nano", "detr_nano", "dinov3_detr_nano"])
def test_a_crowd_beyond_the_queries_is_refused_or_let_through(table, tmp_path, capsys, model):
    with pytest.raises(InputError, match=r"1 images \(25.0%\) .* 300 queries .* 10 with 391; 91 boxes \(21.06%\)"):
        trained(table, tmp_path / "refused", model=model, num_queries=300)
    capsys.readouterr()
    some = trained(table, tmp_path / "some", model=model, num_queries=100, allow_overflow=True)
    assert math.isfinite(some.history[0]["loss"]) and "291 boxes" in capsys.readouterr().out
    whole = {"size": (192, 320)}  # RT-DETR has no more queries than tokens: 315 at 96 x 160
    every = trained(table, tmp_path / "every", model=model, num_queries=400, **whole)
    assert math.isfinite(every.history[0]["loss"]) and every.history[0]["AP"] >= 0


def test_a_pilot_trains_and_its_page_says_so(table, tmp_path):
    pilot = trained(table, tmp_path / "pilot", model="rtdetr_nano", num_queries=100, pilot=True, freeze_epochs=3)
    assert math.isfinite(pilot.history[0]["loss"]) and pilot.config.freeze_epochs == 0
    assert pilot.loader.counts["images"] == 4, "the fullest image among them"
    found = check_capacity(table, pilot.model, pilot.config.allow_overflow)
    assert not found.passed and "291 boxes" in found.found


def test_the_regions_of_a_crowd_are_no_objects(table, tmp_path):
    many = replace(table, iscrowd=np.arange(len(table.labels)) % 2 == 0)
    assert overflow(many, 200)["images"] == 0
    assert math.isfinite(trained(many, tmp_path / "run", model="rtdetr_nano", num_queries=200).history[0]["loss"])
