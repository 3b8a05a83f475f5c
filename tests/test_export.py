"""An ONNX file says what torch says: in batches of any number, in both operator sets, and the proof of it can fail."""

import numpy as np
import onnx
import pytest
import torch

from neo_nb.deploy.artifact import INPUTS, OUTPUTS, TorchArtifact, load_artifact
from neo_nb.deploy.onnx import Exported, compare, export_onnx
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
    artifact = load_artifact(path)
    assert artifact.batch is None and (artifact.record["batch"], artifact.record["opset"]) == ("dynamic", opset)
    assert {o.version for o in onnx.load(path).opset_import if o.domain in ("", "ai.onnx")} == {opset}
    for count in (1, 2, 5):
        given = inputs(count)
        with torch.no_grad():
            boxes, scores, labels = (x.numpy() for x in Exported(model, 60)(*given))
        said = artifact.session.run(OUTPUTS, {key: x.numpy() for key, x in zip(INPUTS, given)})
        assert [x.shape for x in said] == [(count, 60, 4), (count, 60), (count, 60)]
        np.testing.assert_allclose(said[1], scores, atol=1e-4)
        gaps = np.diff(scores, axis=1, prepend=2, append=-1)
        clear = np.minimum(-gaps[:, :-1], -gaps[:, 1:]) > 1e-4  # no neighbour that could change places with it
        assert clear.mean() > 0.8 and (said[2] == labels)[clear].all()
        assert np.abs(said[0] - boxes)[clear].max() < 0.02, "pixels"
    reference, images = TorchArtifact(model, SIZE), list(inputs(5)[0][:, :, : SIZE[0]].permute(0, 2, 3, 1).numpy())
    for count in (1, 2, 5):
        found = compare(reference(images), artifact(images, batch_size=count), min_score=0.02)
        assert found["agreement"] == 1 and found["score_difference"] < 1e-4 and found["detections"] > 100, found


def test_a_fixed_batch_is_written_in_the_operator_set_that_was_asked_for(tmp_path):
    path = export_onnx(opinionated("rtdetr_nano"), tmp_path / "one.onnx", size=SIZE, opset=17)
    assert {o.version for o in onnx.load(path).opset_import if o.domain in ("", "ai.onnx")} == {17}
