"""A crowd and a frozen backbone: overfitted, beyond 300 objects, and through the pilot of the recipe `crowds`."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from command import neo as command
from learn_by_heart import crowded, learn
from safetensors.torch import load_file
from test_runs import QUIET, place

from neo_nb.base.annotations import Annotations
from neo_nb.data.manifest import load_dataset
from neo_nb.models import load_model
from neo_nb.train.checkpoint import load_state
from neo_nb.train.config import make_config
from neo_nb.train.trainer import Trainer
from neo_nb.train.update import DoesNotFit

SMALL = {
    "passes_per_epoch": 1,
    "tracker": "none",
    "device": "cpu",
    "cache": True,
    "policy": "none",
    "no_aug_epochs": 0,
}


def trained(table: Annotations, folder: Path, **settings) -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(make_config(**(SMALL | settings)), folder, table, table)
    trainer.fit()
    return trainer


def test_crowded_scenes_are_learned_by_heart(tmp_path):
    "RT-DETR on a frozen backbone, whole; DETR, which needs thousands of updates, so far that it is on its way."
    table = crowded(tmp_path / "images")
    assert learn(table, tmp_path / "rtdetr", "dinov3_rtdetr_nano").history[-1]["AP50"] >= 0.9
    one = table.select(np.arange(1))
    found = learn(one, tmp_path / "detr", "dinov3_detr_nano", epochs=2, passes_per_epoch=400, schedule="constant")
    first, last = found.history
    assert last["loss"] < 0.8 * first["loss"] and last["F1"] > 0.15, (first, last)


def test_391_objects_are_learned_with_900_queries(tmp_path):
    rng = np.random.default_rng(0)
    image = np.full((288, 480, 3), 90, np.uint8)
    cells = [(x, y) for x in range(0, 460, 18) for y in range(0, 272, 17)]
    corner = np.array(cells)[rng.permutation(len(cells))[:391]] + rng.integers(0, 6, (391, 2))
    boxes = np.concatenate([corner, corner + rng.integers(8, 13, (391, 2))], 1)
    labels = rng.integers(0, 2, 391)
    for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
        cv2.rectangle(image, (x1, y1), (x2 - 1, y2 - 1), ((240, 40, 40), (40, 220, 60))[label], -1)
    cv2.imwrite(str(tmp_path / "0.png"), image)
    table = Annotations([1], ["0.png"], [(288, 480)], [0, 391], boxes, labels, ("person", "head"), root=tmp_path,
                        name="crowd/train")  # fmt: skip
    found = trained(table, tmp_path / "run", model="dinov3_rtdetr_nano", size=(288, 480), epochs=1,
                    passes_per_epoch=60, batch_size=1, ema=0.95, num_queries=900, max_dets=900)  # fmt: skip
    assert found.history[-1]["AP50"] > 0.3 and found.history[-1]["recall"] > 0.5


def test_the_pilot_goes_the_whole_way(tmp_path):
    """`neo train --pilot` with a small DINOv3 in the hub's layout: complete, and nothing of the backbone moves."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=4)).save_pretrained(tmp_path / "dinov3")
    workspace = place(tmp_path / "workspace")
    words = ("train", "--data", "cells", "--recipe", "crowds", "--model", "dinov3_detr", "--pilot", "--target", "cpu",
             "--pretrained", tmp_path / "dinov3", "--size", 96, 128)  # fmt: skip
    curves = {"NEO_PROJECT": "pilots", "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = command(*map(str, words), cwd=workspace, **(QUIET | curves))
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = workspace.glob("reports/0001-pilot-*")

    pilot = json.loads((run / "pilot.json").read_text())
    stations = {row["name"]: row for row in pilot["checks"]}
    assert pilot["go"] and "pilot: go" in done.stdout
    assert list(stations) == "data capacity learning evaluation checkpoint tracking pace memory queries".split()
    assert "300 queries" in stations["capacity"]["found"] and "project pilots" in stations["tracking"]["found"]
    report = (run / "report.html").read_text()
    assert all(f"<h2>{title}</h2>" in report for title in ("Result", "In crowds", "In Trackio", "Configuration"))
    assert "Go</p>" in (run / "pilot.html").read_text() and 'href="pilot.html"' in report

    given = load_file(tmp_path / "dinov3/model.safetensors")
    model, _ = load_model(run / "weights/best.safetensors")
    vit = model.network.model.backbone
    own = {key.removeprefix("model."): x for key, x in vit.model.state_dict().items()}
    assert all(torch.equal(own[key], x) for key, x in given.items() if not key.endswith("mask_token"))
    assert len(model.network.model.encoder.layers) == 6
    learning = sum(p.requires_grad for p in model.parameters())
    assert len(load_state(run / "weights/last.pt")["optimizer"]["state"]) == learning
    assert not any(p.requires_grad for p in vit.parameters())


def test_where_an_image_does_not_fit_the_smaller_size_goes_on(tmp_path, monkeypatch):
    table = load_dataset("scenes", "train").select(np.arange(6))
    settings = {"model": "dinov3_detr_nano", "epochs": 2, "batch_size": 2, "size": (96, 160), "allow_overflow": True}
    whole = Trainer._part

    def short_of_memory(self, batch, counts):
        if batch.images.shape[-2:] == (96, 160) and self.progress["step"] >= 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, batch, counts)

    monkeypatch.setattr(Trainer, "_part", short_of_memory)
    with pytest.raises(DoesNotFit, match="with 1 image at once"):
        trained(table, tmp_path / "none", **settings)
    with pytest.raises(DoesNotFit, match="with 1 image at once"):
        trained(table, tmp_path / "larger", **settings, smaller_size=(160, 160))
    found = trained(table, tmp_path / "some", **settings, smaller_size=(64, 112))
    assert found.model.size == (64, 112) and found.progress["step"] == 6 and found.micro == 2
    assert math.isfinite(found.history[-1]["loss"])
    model, record = load_model(tmp_path / "some/weights/last.safetensors")
    assert record["size"] == [64, 112] and model.size == (64, 112)
    again = Trainer(make_config(**(SMALL | settings), smaller_size=(64, 112)), tmp_path / "some", table, table)
    again.load(tmp_path / "some/weights/last.pt")
    assert again.model.size == (64, 112)
