"""The detectors of torchvision: they learn drawn images, and their files say what they say."""

import numpy as np
import pytest
import torch

from neo_nb.data.loader import make_loader
from neo_nb.deploy.detector import TorchDetector
from neo_nb.deploy.onnx import compare, export_onnx
from neo_nb.deploy.onnx_detector import OnnxDetector
from neo_nb.models import create_model
from neo_nb.synthetic.crowds import make_scenes

NANOS = ("retinanet_nano", "fcos_nano", "faster_rcnn_nano", "cascade_rcnn_nano", "ssdlite_nano", "mask_rcnn_nano")
SIZE = (64, 96)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    table = make_scenes(8, SIZE, 0, tmp_path_factory.mktemp("scenes"), extras=True)
    return list(make_loader(table, size=SIZE, divisor=32, batch_size=4, quiet=True))


@pytest.mark.parametrize("name", NANOS)
def test_the_loss_of_eight_drawn_images_falls(name, batches):
    torch.manual_seed(0)
    model = create_model(name, 2).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    history = []
    for _ in range(8):
        for batch in batches:
            terms = model.loss(model(batch.images, batch.sizes, batch.targets), batch.targets)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            history.append(sum(terms.values()).item())
    assert set(model.main_terms) <= set(terms) and sum(history[-2:]) < 0.8 * sum(history[:2])
    with torch.no_grad():
        unseen = model.eval().loss(model(batch.images, batch.sizes), batch.targets)
    assert all(value.isfinite() for value in unseen.values())


@pytest.mark.parametrize("name", ("fcos_nano", "mask_rcnn_nano"))
def test_a_file_finds_what_the_model_finds(name, tmp_path):
    torch.manual_seed(0)
    few = {"proposals": 60, "candidates": 100} if "rcnn" in name else {}
    model = create_model(name, class_names=("a", "b"), **few).eval()
    model.size = (90, 150)
    for key, x in model.state_dict().items():
        if key.endswith(("score.weight", "cls_logits.weight", "bbox_pred.weight")):
            x.normal_(0, 0.05)
    file = export_onnx(model, tmp_path / "model.onnx", batch=1 if "rcnn" in name else "dynamic")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (*side, 3), np.uint8) for side in ((90, 150), (150, 90), (33, 41))]
    own, other = TorchDetector(model).detect_images(images), OnnxDetector(file).detect_images(images)
    found = compare(own, other, min_score=0.001)
    assert found["detections"] > 20 and found["agreement"] == 1 and found["score_difference"] < 1e-5
    if model.task == "segmentation":
        assert len(own.masks) == len(other.masks) == len(other.scores)
