"""The same detections in every form: alone and in a batch of mixed shapes, eager, deployed and as an ONNX file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_rtdetr_properties import distance, drawn, lively

from neo_nb.base.detections import Detections
from neo_nb.base.geometry import fit, pad_to
from neo_nb.deploy.detector import TorchDetector
from neo_nb.deploy.onnx import export_onnx
from neo_nb.deploy.onnx_detector import OnnxDetector

FAMILIES = {
    "nano": ("rtdetr_nano", {}),
    "four levels": ("rtdetr_nano", {"strides": (4, 8, 16, 32)}),
    "second version": ("rtdetrv2_r18", {}),
    "discrete sampling": ("rtdetrv2_r18", {"sampling": "discrete"}),
    "hgnetv2": ("rtdetr_hgnetv2_l", {"freeze_bn": False, "freeze_at": -1}),
    "timm": ("rtdetr_timm", {"backbone": "timm/resnet18"}),
}


class Eager(TorchDetector):
    "A detector that is not deployed first."

    @property
    def network(self) -> torch.nn.Module:
        return self.model


def mixed(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    "Images of many shapes: upright, lying, narrow, tiny, larger than the network's input."
    sizes = [(40, 400), (300, 60), (33, 41), (500, 380), *(tuple(rng.integers(30, 420, 2)) for _ in range(count))]
    return [drawn(rng, int(h), int(w)).permute(1, 2, 0).numpy().copy() for h, w in sizes[:count]]


def rows(detections: Detections, images: list[np.ndarray]) -> list[np.ndarray]:
    "x1 y1 x2 y2 as fractions of the image, score, label: of each image."
    found = []
    for index, image in enumerate(images):
        one = detections.for_image(index)
        boxes = one.boxes_xyxy / np.tile(image.shape[1::-1], 2)
        found.append(np.concatenate([boxes, one.scores[:, None], one.labels[:, None]], 1))
    return found


@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_finds_the_same(family, resize, tmp_path):
    if resize == "stretch" and family != "nano":
        pytest.skip("the geometry is not the family's")
    name, overrides = FAMILIES[family]
    rng = np.random.default_rng(list(FAMILIES).index(family))
    size = tuple(int(side) for side in rng.integers(97, 210, 2))
    model, images = lively(1, name, **overrides), mixed(rng, 7)
    model.preprocessing, model.size = replace(model.preprocessing, resize=resize), size
    contents = {pad_to(fit(image.shape[:2], size, resize), 32) for image in images}
    assert resize == "stretch" or len(contents) > 2  # images that would have frames of their own
    alone = rows(Eager(model).detect_images(images, batch_size=1), images)
    assert sum(map(len, alone)) > 50
    export_onnx(model, tmp_path / "model.onnx", batch=3)
    forms = {
        "a batch of mixed shapes": Eager(model).detect_images(images, batch_size=7),
        "fused": TorchDetector(model).detect_images(images, batch_size=4),
        "ONNX": OnnxDetector(tmp_path / "model.onnx").detect_images(images),
    }
    for form, found in forms.items():
        apart = [distance(one, other) for one, other in zip(alone, rows(found, images))]
        assert max(apart) < 1e-4, f"{form}: {apart}"
