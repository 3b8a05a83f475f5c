"""Families whose network is transformers': they learn, export, and open what transformers saved."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from neo_nb.data.batch import Targets
from neo_nb.deploy.detector import TorchDetector, load_detector
from neo_nb.deploy.onnx import VERDICTS, export_onnx, verify_onnx
from neo_nb.models import create_model, load_weights
from neo_nb.models.zoo import family_of

NAMES = ("conditional_detr_nano", "deformable_detr_nano", "dfine_nano", "rfdetr_tiny")
SIZE = (64, 96)
families = pytest.mark.parametrize("name", NAMES)


def drawn(count: int = 8) -> tuple[Tensor, tuple[Targets, ...]]:
    """Images with one to three rectangles of two colours, and one image without any."""
    rng = np.random.default_rng(0)
    images, targets = rng.integers(90, 130, (count, 3, *SIZE), np.uint8), []
    for number, image in enumerate(images):
        boxes, labels = [], []
        for _ in range(number % 4):
            height, width = rng.integers(12, 30, 2)
            y, x = rng.integers(0, SIZE[0] - height), rng.integers(0, SIZE[1] - width)
            label = int(rng.integers(2))
            image[:, y : y + height, x : x + width] = np.array([[250, 20, 20], [20, 20, 250]])[label][:, None, None]
            boxes.append([(x + width / 2) / SIZE[1], (y + height / 2) / SIZE[0], width / SIZE[1], height / SIZE[0]])
            labels.append(label)
        columns = torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(labels, dtype=torch.int64)
        targets.append(Targets(*columns, torch.zeros(0, 4)))
    return torch.from_numpy(images), tuple(targets)


@pytest.fixture(scope="module", params=NAMES)
def learned(request):
    """A model after a few dozen updates on the drawn images, and its loss before and after."""
    torch.manual_seed(0)
    more = {"num_denoising": 20} if request.param.startswith("dfine") else {}
    model = create_model(request.param, class_names=("red", "blue"), decoder_layers=2, **more).train()
    model.size = SIZE
    images, targets = drawn()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    told = []
    for _ in range(50 if request.param == "rfdetr_tiny" else 30):
        loss = sum(model.loss(model(images, None, targets), targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        told.append(loss.item())
    return model.eval(), told


def test_the_loss_falls(learned):
    model, told = learned
    assert np.isfinite(told).all()
    assert np.mean(told[-5:]) < 0.7 * np.mean(told[:5]), told


def test_an_onnx_file_detects_what_the_model_detects(learned, tmp_path):
    model, _ = learned
    path = export_onnx(model, tmp_path / "x.onnx", batch="dynamic")
    photos = [image.permute(1, 2, 0).numpy() for image in drawn()[0][1:4]]
    photos.append(np.ascontiguousarray(photos[0][:40]))  # of another shape: padded
    scores = TorchDetector(model).detect_images(photos).scores
    least = float(np.sort(scores)[-12]) - 1e-4  # what it is sure of: the rest are ties that the last bit decides
    told = verify_onnx(path, model, photos, min_score=least, repeats=1)
    assert told["verdict"] == VERDICTS[0] and told["detections"] > 9, told


def test_a_folder_that_transformers_saved_opens_and_goes_on(learned, tmp_path):
    model, _ = learned
    model.network.config.id2label = {0: "red", 1: "blue"}
    model.network.save_pretrained(tmp_path / "hf")
    detector = load_detector(tmp_path / "hf", size=SIZE)
    image = drawn()[0][3].permute(1, 2, 0).numpy()
    expected = TorchDetector(model).detect_images([image])
    assert detector.class_names == ("red", "blue")
    assert np.abs(np.sort(detector.detect_images([image]).scores) - np.sort(expected.scores)).max() < 1e-5
    other = family_of(model.model_name).model(1, replace(model.config))
    other.class_names = ("blue",)
    report = load_weights(other, tmp_path / "hf", "by-name")
    assert report.placed > 100 and not report.fresh


@pytest.mark.parametrize("name", [name for name in NAMES if "detr_" in name and not name.startswith("rfdetr")])
def test_layers_computed_twice_give_the_same_gradients(name):
    images, targets = drawn()
    told = []
    for twice in (False, True):
        torch.manual_seed(0)
        model = create_model(name, 2).train()
        model.set_grad_checkpointing(twice)
        sum(model.loss(model(images, None, targets), targets).values()).backward()
        told.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert told[0].keys() == told[1].keys()
    assert all(torch.allclose(told[0][key], told[1][key], atol=1e-5) for key in told[0])


@families
def test_a_crowd_in_half_precision_has_finite_gradients(name):
    model = create_model(name, 2, num_queries=391).train()
    boxes = torch.cat([torch.rand(391, 2) * 0.9, 0.02 + torch.rand(391, 2) * 0.08], 1)
    targets = (Targets(boxes, torch.arange(391) % 2, torch.zeros(0, 4)), Targets.empty())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.rand(2, 3, 192, 192), None, targets)
    sum(model.loss(outputs, targets).values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.capacity == 391
