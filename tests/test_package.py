"""Files beside plain ONNX: packages of torch for every family, and ONNX files that take an image as it is."""

import cv2
import numpy as np
import pytest
import torch
from test_export import SIZE, opinionated

from neo_nb.data.resize import prepare
from neo_nb.deploy.detector import TorchDetector, load_detector
from neo_nb.deploy.half import emulated_detector, to_half
from neo_nb.deploy.image_input import to_image_input
from neo_nb.deploy.onnx import compare, export_onnx
from neo_nb.deploy.torch_package import export_package
from neo_nb.models import create_model


def photos(*shapes: tuple[int, int]) -> list[np.ndarray]:
    "Bright rectangles on a dark ground."
    rng, made = np.random.default_rng(0), []
    for height, width in shapes:
        image = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
        for _ in range(12):
            y, x = rng.integers(0, (height - 10, width - 10))
            image[y : y + height // 5, x : x + width // 5] = rng.integers(40, 256, 3)
        made.append(cv2.GaussianBlur(image, (0, 0), 1))
    return made


def test_a_package_on_a_frozen_backbone_finds_what_torch_finds(tmp_path):  # the chapter packs the other families
    torch.manual_seed(0)
    model = create_model("dinov3_rtdetr_nano", class_names=("person", "head"), num_queries=20).eval()
    with torch.no_grad():
        for key, weights in model.named_parameters():
            if key.startswith(tuple(model.class_heads)):
                torch.nn.init.normal_(weights, std=0.1 * (weights.ndim > 1))
    detector = load_detector(export_package(model, tmp_path / "model.pt2", size=SIZE))
    images = photos((100, 200), (300, 220), (90, 160))
    expected = TorchDetector(model, SIZE).detect_images(images)
    for batch_size in (1, 3):
        found = compare(expected, detector.detect_images(images, batch_size), min_score=0)
        assert found["agreement"] == 1 and found["score_difference"] < 1e-4 and found["detections"] == 60, found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A file of two images at a time, in the older operator set."
    file = tmp_path_factory.mktemp("onnx") / "plain.onnx"
    return export_onnx(opinionated("rtdetr_nano"), file, size=SIZE, batch=2, opset=17)


def test_a_file_that_takes_images_finds_what_the_plain_one_finds(tmp_path, plain):
    whole = load_detector(to_image_input(plain, tmp_path / "whole.onnx"))
    assert whole.session.get_inputs()[0].shape == [2, "height", "width", 3]
    images = photos((100, 200), (300, 220), (100, 200), (90, 160), (700, 1300), (100, 200))
    expected, found = (one.detect_images(images) for one in (load_detector(plain), whole))
    said = compare(expected, found, min_score=0.02)
    assert said["agreement"] == 1 and said["detections"] > 100, said
    assert said["score_difference"] < 0.02  # one level of 255, where an average ends in a half
    one = whole.make_batch([images[4]])
    assert np.array_equal(one.images[0].permute(1, 2, 0).numpy(), images[4])  # nothing was scaled here


def test_half_precision_takes_images_too(tmp_path, plain):
    half = to_half(plain, tmp_path / "half.onnx")
    whole = to_image_input(half, tmp_path / "whole.onnx")
    images = photos((180, 320), (90, 160))  # both are scaled without a rounding in doubt
    assert load_detector(whole).record["kept_fp32"] == load_detector(half).record["kept_fp32"]
    expected, found = (emulated_detector(file).detect_images(images) for file in (half, whole))
    said = compare(expected, found, min_score=0.02)
    assert said["agreement"] == 1 and said["detections"] > 50, said


@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
def test_the_graph_scales_as_the_training_does(resize):
    import onnxruntime
    from onnx import helper

    from neo_nb.deploy.image_input import prepare_graph

    model = helper.make_model(
        prepare_graph((90, 160), 32, resize), opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 400, (40, 2)).tolist():
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = prepare([image], (90, 160), 32, resize)
        images, sizes, originals = session.run(None, {"image": image[None]})
        assert sizes.tolist() == expected.sizes.tolist() and originals.tolist() == [[height, width]]
        apart = np.abs(images.astype(int) - expected.images.numpy())
        assert apart.max() <= 1 and (apart > 0).mean() < 0.03, (height, width, apart.max(), (apart > 0).mean())
