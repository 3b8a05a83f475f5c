"""An ONNX file says what torch says: in batches of any number, in both operator sets, and the proof of it can fail."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_cli import coco, neo, workplace  # noqa: F401  fixtures

from neo_nb.deploy.detector import INPUTS, OUTPUTS, TorchDetector, load_detector
from neo_nb.deploy.onnx import (
    BOUNDS,
    Exported,
    NotProven,
    compare,
    export_onnx,
    prove,
    settle,
    verdict_text,
    verify_onnx,
)
from neo_nb.models.weights import save_weights
from neo_nb.models.zoo import create_model

SIZE = (90, 160)


def opinionated(name: str, seed: int = 0, **settings):
    "A detector whose scores differ: of equals, which come first would be a matter of the last bit."
    torch.manual_seed(seed)
    model = create_model(name, class_names=("person", "head"), num_queries=60, **settings)
    for head in (model.decoder.enc_score, *model.decoder.score):
        torch.nn.init.normal_(head.weight, std=0.3)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = None  # the statistics become those of the images below, as in a trained network
    with torch.no_grad():
        model.train()(*inputs(8, seed=100)[:2])
    return model.eval()


def inputs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "Bright rectangles on a dark ground, of the network's own size; 90 rows are padded to 96."
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 40, (count, 3, 96, 160), dtype=np.uint8)
    for image in images:
        for _ in range(12):
            (y, x), (height, width) = rng.integers(0, (80, 150)), rng.integers(6, 40, 2)
            image[:, y : y + height, x : x + width] = rng.integers(40, 256, 3)[:, None, None]
    images[:, :, SIZE[0] :] = 0
    return torch.from_numpy(images), torch.tensor([SIZE] * count), torch.tensor([(2 * SIZE[0], 2 * SIZE[1])] * count)


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("name", ["rtdetr_nano", "rtdetrv2_r18"])
def test_a_dynamic_batch_of_any_number_says_what_torch_says(tmp_path, name, opset):
    model = opinionated(name)
    path = export_onnx(model, tmp_path / "any.onnx", size=SIZE, batch="dynamic", opset=opset)
    detector = load_detector(path)
    assert detector.batch is None and (detector.record["batch"], detector.record["opset"]) == ("dynamic", opset)
    assert {o.version for o in onnx.load(path).opset_import if o.domain in ("", "ai.onnx")} == {opset}
    for count in (1, 2, 5):
        given = inputs(count)
        with torch.no_grad():
            boxes, scores, labels = (x.numpy() for x in Exported(model, 60)(*given))
        predicted = detector.session.run(OUTPUTS, {key: x.numpy() for key, x in zip(INPUTS, given)})
        assert [x.shape for x in predicted] == [(count, 60, 4), (count, 60), (count, 60)]
        np.testing.assert_allclose(predicted[1], scores, atol=1e-4)
        gaps = np.diff(scores, axis=1, prepend=2, append=-1)
        clear = np.minimum(-gaps[:, :-1], -gaps[:, 1:]) > 1e-4  # no neighbour that could change places with it
        assert clear.mean() > 0.8 and (predicted[2] == labels)[clear].all()
        assert np.abs(predicted[0] - boxes)[clear].max() < 0.02, "pixels"
    reference, images = TorchDetector(model, SIZE), list(inputs(5)[0][:, :, : SIZE[0]].permute(0, 2, 3, 1).numpy())
    for count in (1, 2, 5):
        found = compare(
            reference.detect_images(images), detector.detect_images(images, batch_size=count), min_score=0.02
        )
        assert found["agreement"] == 1 and found["score_difference"] < 1e-4 and found["detections"] > 100, found


def test_a_fixed_batch_is_written_in_the_operator_set_that_was_asked_for(tmp_path):
    path = export_onnx(opinionated("rtdetr_nano"), tmp_path / "one.onnx", size=SIZE, opset=17)
    assert {o.version for o in onnx.load(path).opset_import if o.domain in ("", "ai.onnx")} == {17}


# the proof


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A detector and its file."
    model = opinionated("rtdetr_nano")
    return model, export_onnx(model, tmp_path_factory.mktemp("made") / "model.unproven.onnx", size=SIZE)


def photos(count: int) -> list[np.ndarray]:
    return list(inputs(count)[0][:, :, : SIZE[0]].permute(0, 2, 3, 1).numpy())


def changed(path: Path, to: Path, change) -> Path:
    "The file with other weights: each tensor of a head through `change`."
    proto = onnx.load(path)
    heads = [t for t in proto.graph.initializer if "score" in t.name and "bias" in t.name]
    assert heads, [t.name for t in proto.graph.initializer][:50]
    for tensor in heads:
        tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(proto, to)
    return to


def test_a_file_that_finds_the_same_is_proven_and_gets_its_name(made, tmp_path):
    model, path = made
    proof = verify_onnx(path, model, photos(4), repeats=1)
    assert (proof["verdict"], proof["agreement"], proof["odd"]) == ("proven", 1.0, [])
    assert proof["detections"] > 50 and proof["score_difference"] < BOUNDS["fp32"].score / 10
    copy = tmp_path / "x.unproven.onnx"
    copy.write_bytes(path.read_bytes())
    assert settle(copy, proof["verdict"], verdict_text(proof)) == tmp_path / "x.onnx"
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]


def test_a_file_with_other_weights_fails_and_the_message_says_what_where_and_what_to_do(made, tmp_path):
    model, path = made
    other = changed(path, tmp_path / "model.unproven.onnx", lambda bias: bias + np.float32(0.05))
    proof = verify_onnx(other, model, photos(4), repeats=1)
    assert proof["verdict"] == "differs" and proof["apart"] > 20 and proof["agreement"] < 0.9
    assert 0.001 < proof["score_difference"] < 0.02, "too little for AP to see"
    with pytest.raises(NotProven) as caught:
        settle(other, proof["verdict"], verdict_text(proof, ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]))
    message = str(caught.value)
    assert "\n" not in message and str(other) in message and other.exists() and not (tmp_path / "model.onnx").exists()
    for words in ("differs: ", f"of {proof['detections']} detections above 0.05 agree", ".jpg: ", "both have ",
                  ", ONNX with 0.", "the file is kept as", "what to do: look at the images named"):  # fmt: skip
        assert words in message, (words, message)
    assert prove(*detections(model, other), precision="bf16")["verdict"] == "proven", "within what bf16 may do"


def detections(model, path: Path) -> tuple:
    return TorchDetector(model, SIZE).detect_images(photos(4)), load_detector(path).detect_images(photos(4))


def shifted(model, by: float):
    "The same detector, less sure of everything."
    for head in (model.decoder.enc_score, *model.decoder.score):
        head.bias.data += by
    return model


def test_where_nothing_is_found_nothing_is_proven(made, tmp_path):
    model = shifted(opinionated("rtdetr_nano"), -12)
    path = export_onnx(model, tmp_path / "model.unproven.onnx", size=SIZE)
    proof = prove(*detections(model, path))
    assert (proof["verdict"], proof["detections"]) == ("not proven", 0)
    with pytest.raises(NotProven, match="nothing was compared; the file is kept as .*prove it on images with objects"):
        settle(path, proof["verdict"], verdict_text(proof))
    assert prove(*detections(model, made[1]))["verdict"] == "differs", "only one of them finds nothing"


def test_a_weak_detector_that_agrees_is_proven(tmp_path):
    model = shifted(opinionated("rtdetr_nano"), -5)
    path = export_onnx(model, tmp_path / "model.unproven.onnx", size=SIZE)
    proof = prove(*detections(model, path))
    assert proof["verdict"] == "proven" and 0 < proof["detections"] < 40
    assert settle(path, proof["verdict"], verdict_text(proof)).name == "model.onnx"


def test_the_command_says_not_proven_and_fails(neo, workplace):  # noqa: F811
    torch.manual_seed(0)
    model = create_model("rtdetr_nano", class_names=("cell",)).eval()  # untrained: no score is above .02
    model.size = (96, 160)
    save_weights(model, workplace / "new.safetensors", data="one")
    status, out, err = neo("export", workplace / "new.safetensors", "--data", coco(workplace / "one"))
    assert status == 1 and "not proven: neither torch nor ONNX found anything above 0.05" in err, err
    file = next(workplace.rglob("model.unproven.onnx"))
    assert str(file) in err and not list(workplace.rglob("model.onnx"))
    metrics, about = (json.loads((file.parent / name).read_text()) for name in ("metrics.json", "export.json"))
    assert metrics["proof"] == about["verdict"] == "not proven" and not about["passed"]
    assert about["difference"] == 0, "which an allowed difference in AP would have let pass"
    assert "not proven" in (file.parent / "report.html").read_text()
    status, out, err = neo("export", workplace / "new.safetensors", "--data", workplace / "one/one.yaml",
                           "--min-score", "0.001")  # fmt: skip
    assert status == 0 and "export proven: " in out, err
    assert next(workplace.rglob("model.onnx"))
