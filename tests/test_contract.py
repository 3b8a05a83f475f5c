"""What a detector expects of its images is part of its file: read back whole, or the file is refused."""

import json
from dataclasses import replace

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from neo_nb.base.core import InputError
from neo_nb.deploy.detector import load_detector
from neo_nb.deploy.onnx import export_onnx
from neo_nb.models.hub import input_table
from neo_nb.models.weights import load_model, load_weights, model_record, read_preprocessing, save_weights
from neo_nb.models.zoo import create_model

LOOK = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "divisor": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A detector with a contract of its own, and its file."
    torch.manual_seed(0)
    model = create_model("rtdetr_nano", class_names=("cell",), num_queries=40).eval()
    model.preprocessing, model.size = replace(model.preprocessing, **LOOK), (90, 160)
    path = tmp_path_factory.mktemp("contract") / "model.safetensors"
    save_weights(model, path)
    return model, path


def changed(path, to, **contract):
    "The file with another contract in its record; a field that is None is taken out."
    with safe_open(path, framework="pt") as f:
        record, tensors = json.loads(f.metadata()["neo_nb"]), {key: f.get_tensor(key) for key in f.keys()}
    kept = record["contract"] | contract
    record["contract"] = {key: value for key, value in kept.items() if value is not None}
    save_file(tensors, to, metadata={"neo_nb": json.dumps(record)})
    return to


def test_the_contract_comes_back_and_the_detector_sees_what_it_saw(saved):
    model, path = saved
    again, _ = load_model(path)
    assert again.preprocessing == model.preprocessing
    images = torch.randint(0, 255, (1, 3, 90, 160), dtype=torch.uint8)
    with torch.no_grad():
        assert again.normalise(images).shape[-2:] == (128, 192)
        assert torch.equal(again(images).logits, model(images).logits)
    detector = load_detector(path)
    assert (detector.preprocessing, detector.divisor) == (model.preprocessing, 64)


def test_what_starts_from_it_takes_its_look_over_and_says_so(saved):
    model, path = saved
    new = create_model("rtdetr_nano", class_names=("cell",))
    report = load_weights(new, path)
    assert (new.preprocessing.mean, new.preprocessing.std, new.preprocessing.divisor) == (
        LOOK["mean"],
        LOOK["std"],
        32,
    )
    assert "input contract: mean (0.485, 0.456, 0.406) instead of (0.0, 0.0, 0.0)" in str(report)
    other = create_model("rtdetr_r18", class_names=("cell",))
    load_weights(other, path)  # of the backbone little fits
    assert other.preprocessing.mean == (0.0, 0.0, 0.0)


def test_an_older_record_opens(saved, tmp_path):
    path = changed(saved[1], tmp_path / "old.safetensors", color="rgb", std=None)
    assert load_model(path)[0].preprocessing == replace(saved[0].preprocessing, std=(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "contract, words",
    [
        (
            {"color": "bgr"},
            "made for images in the order 'bgr'; here they are rgb; turn the input channels of the first",
        ),
        ({"gamma": 2.2}, "the input contract has the field gamma, not known here"),
        ({"divisor": 48}, "pads to multiples of 48, its coarsest level has stride 32; the divisor must be a multiple"),
        ({"divisor": 0}, "pads to multiples of 0"),
        ({"divisor": "32"}, "has divisor = '32'"),
        ({"mean": [0.5, 0.5]}, r"has mean \(0.5, 0.5\)"),
        ({"std": [1.0, 0.0, 1.0]}, "std above 0"),
        ({"mean": 0.5}, "has mean = 0.5"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(saved, tmp_path, contract, words):
    path = changed(saved[1], tmp_path / "x.safetensors", **contract)
    for opened in (load_model, load_detector, lambda p: load_weights(create_model("rtdetr_nano", 1), p)):
        with pytest.raises(InputError, match=words) as caught:
            opened(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_onnx_keeps_the_contract_and_refuses_what_it_does_not_know(saved, tmp_path):
    path = export_onnx(saved[0], tmp_path / "model.onnx")
    detector = load_detector(path)
    assert (detector.preprocessing, detector.divisor) == (saved[0].preprocessing, 64)
    assert detector.session.get_inputs()[0].shape == [1, 3, 128, 192]
    for contract, words in (
        ({"color": "bgr"}, "'bgr'"),
        ({"gamma": 2.2}, "gamma, not known"),
        ({"divisor": 48}, "48"),
    ):
        proto, record = onnx.load(path), detector.record
        onnx.helper.set_model_props(
            proto, {"neo_nb": json.dumps(record | {"contract": record["contract"] | contract})}
        )
        onnx.save(proto, tmp_path / "other.onnx")
        with pytest.raises(InputError, match=words) as caught:
            load_detector(tmp_path / "other.onnx")
        assert "other.onnx" in str(caught.value)


def test_a_record_with_an_unknown_setting_of_the_network_is_refused(saved, tmp_path):
    record = model_record(saved[0])
    assert read_preprocessing(record) == saved[0].preprocessing
    assert "colour order" not in input_table(record) and "RGB" in input_table(record)
    with safe_open(saved[1], framework="pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}
    record["config"]["wings"] = 2
    save_file(tensors, tmp_path / "x.safetensors", metadata={"neo_nb": json.dumps(record)})
    with pytest.raises(InputError, match="the configuration has the field wings, not known here"):
        load_model(tmp_path / "x.safetensors")
