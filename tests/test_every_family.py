"""The smallest model of each family that no walk of commands trains: learns, is measured, resumed to the bit, exported."""

import numpy as np
import pytest
import torch

from neo_nb.data.loader import read_image
from neo_nb.deploy.detector import TorchDetector
from neo_nb.deploy.onnx import compare, export_onnx
from neo_nb.deploy.onnx_detector import OnnxDetector
from neo_nb.deploy.onnx_maps import export_maps
from neo_nb.deploy.segmenter import TorchSegmenter, load_segmenter
from neo_nb.jobs.capabilities import TRAINED
from neo_nb.models.weights import load_model
from neo_nb.models.zoo import FAMILIES, task_of
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.callbacks import Callback
from neo_nb.train.config import make_config
from neo_nb.train.trainer import train

SIZE = (96, 160)
NAMES = TRAINED["tests/test_every_family.py"]
ANY_BATCH = ("conditional", "deformable", "dfine", "rfdetr", "fcos")  # The others' graphs fix the number of images
SCORE = {"detection": "AP", "segmentation": "AP", "pose": "AP", "semantic": "mIoU"}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return [make_scenes(count, SIZE, seed, folder / str(seed), extras=True) for count, seed in ((8, 0), (2, 1))]


class StopAfter(Callback):
    "Ends a training after its first epoch, as a signal would after the checkpoint."

    def on_evaluate(self, trainer, row, metrics):
        return "enough" if row["epoch"] == 1 else None


def test_one_of_every_family_is_trained_by_a_test():
    trained = {name for names in TRAINED.values() for name in names}
    assert not [family.name for family in FAMILIES if not trained & {*family.variants}]


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_is_measured_resumes_to_the_bit_and_is_exported(name, tables, tmp_path):
    config = make_config(
        model=name, size=SIZE, epochs=2, passes_per_epoch=2, batch_size=4, num_workers=0, cache=False, device="cpu",
        tracker="none", pretrained="none", policy="none", lr=1e-3, warmup=0,
    )  # fmt: skip
    whole = train(config, tmp_path / "whole", *tables)
    train(config, tmp_path / "parts", *tables, callbacks=[StopAfter()])
    train(config, tmp_path / "parts", *tables, resume=True)
    one, two = (torch.load(tmp_path / part / "weights/last.pt", weights_only=False) for part in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][key], two[part][key]) for key in one[part]), part
    first, last = one["rows"]
    assert last["loss"] < first["loss"] and 0 <= whole["last"][SCORE[task_of(name)]] <= 1

    model, _ = load_model(next((tmp_path / "whole/weights").glob("best*.safetensors")))
    images = [read_image(tables[1][row].path) for row in (0, 1)]
    images.append(np.ascontiguousarray(images[0][20:, :90]))  # of another shape: padded
    if model.task == "semantic":
        file = export_maps(model, tmp_path / "model.onnx")
        maps = [one.segment_images(images) for one in (TorchSegmenter(model), load_segmenter(file))]
        assert min((one == other).mean() for one, other in zip(*maps)) > 0.999
        return
    file = export_onnx(model, tmp_path / "model.onnx", batch="dynamic" if name.startswith(ANY_BATCH) else 1)
    found = [detector.detect_images(images) for detector in (TorchDetector(model), OnnxDetector(file))]
    told = compare(*found, min_score=float(np.sort(found[0].scores)[-10]) - 1e-4)
    assert told["detections"] > 9 and told["score_difference"] < 1e-4 and told["box_difference"] < 0.05, told
    # of ties the last bit decides which stay
    scores = [[np.sort(side.for_image(row).scores)[-10:] for row in range(3)] for side in found]
    assert told["agreement"] > 0.8 and all(np.abs(a - b).max() < 1e-4 for a, b in zip(*scores)), told
    assert found[0].per_box == found[1].per_box
