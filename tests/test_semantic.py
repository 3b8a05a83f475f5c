"""Models that give a class to each pixel: a training to its end, by command and resumed, and what stops one before it begins."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from command import neo

from neo_nb.base.core import InputError
from neo_nb.base.semantic_maps import read_map, write_map
from neo_nb.models.contract import TASKS
from neo_nb.models.zoo import FAMILIES, VARIANTS, create_model, list_models, task_of
from neo_nb.runs.results import open_evaluation
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.callbacks import Callback
from neo_nb.train.config import MAPS, make_config
from neo_nb.train.trainer import train

SETTINGS = dict(
    model="segformer_nano", size=(96, 160), epochs=2, passes_per_epoch=1, batch_size=4, num_workers=0, cache=False,
    device="cpu", tracker="none", pretrained="none",
)  # fmt: skip


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return [make_scenes(count, (96, 160), seed, folder / str(seed), extras=True) for count, seed in ((12, 0), (4, 1))]


class StopAfter(Callback):
    "Ends a training after its first epoch, as a signal would after the checkpoint."

    def on_evaluate(self, trainer, row, metrics):
        return "enough" if row["epoch"] == 1 else None


def test_the_models_of_maps_are_known_by_their_names():
    found = [family for family in FAMILIES if family.model.task == "semantic"]
    assert [f"{family.name}_*" for family in found] == list(MAPS)
    assert sorted(name for pattern in MAPS for name in list_models(pattern)) == sorted(
        name for family in found for name in family.variants
    )
    assert {task_of(name) for name in VARIANTS} <= set(TASKS)
    for pattern in MAPS:
        assert make_config(model=pattern.replace("*", "nano")).monitor == "mIoU"


def test_a_training_learns_is_measured_and_resumes_to_the_bit(tables, tmp_path):
    config = make_config(**SETTINGS)
    whole = train(config, tmp_path / "whole", *tables)
    first = train(config, tmp_path / "parts", *tables, callbacks=[StopAfter()])
    assert (whole["epochs"], first["epochs"], first["ended"]) == (2, 1, "enough")
    again = train(config, tmp_path / "parts", *tables, resume=True)
    states = [torch.load(tmp_path / name / "weights" / "last.pt", weights_only=False) for name in ("whole", "parts")]
    for part in ("model", "ema"):
        assert all(torch.equal(states[0][part][key], states[1][part][key]) for key in states[0][part]), part
    timed = ("minutes", "images_per_second")
    rows = [{k: v for k, v in found["last"].items() if k not in timed} for found in (whole, again)]
    assert rows[0] == rows[1] and {"mIoU", "pixel_accuracy", "loss_ce", "val_loss_ce"} <= set(rows[0])
    history = (tmp_path / "whole" / "results.csv").read_text().splitlines()
    assert len(history) == 3 and whole["best"]["mIoU"] == max(row["mIoU"] for row in states[0]["rows"])
    assert states[0]["rows"][1]["loss"] < states[0]["rows"][0]["loss"]


def test_two_halves_of_an_update_have_the_gradient_of_the_whole(tables, tmp_path):
    from neo_nb.train.trainer import Trainer

    found = []
    for batch, steps in ((4, 1), (2, 2)):
        config = make_config(
            **(SETTINGS | dict(batch_size=batch, grad_accum_steps=steps, policy="none", no_aug_epochs=0))
        )
        trainer = Trainer(config, tmp_path / str(batch), *tables)
        for module in trainer.model.modules():  # what a norm sees of a half is another thing
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        trainer.loader.set_epoch(0)
        batches = [part for part, _ in zip(trainer.loader, range(steps))]
        trainer._before = trainer.statistics.read()
        trainer._gradients(batches, False, {})
        found.append([p.grad.clone() for p in trainer.model.parameters()])
    for one, two in zip(*found):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [pattern.replace("*", "nano") for pattern in MAPS])
def test_every_family_gives_maps_as_large_as_the_files(name):
    model = create_model(name, 5).eval()
    images, sizes = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96], [50, 96]])
    with torch.no_grad():
        maps = model.segment(model(images, sizes), sizes, torch.tensor([[128, 192], [31, 60]]))
    assert [(tuple(m.shape), m.dtype) for m in maps] == [((128, 192), torch.uint8), ((31, 60), torch.uint8)]
    assert max(int(m.max()) for m in maps) < 5
    with pytest.raises(InputError, match="finds no boxes"):
        model.detect(None, sizes, sizes)


def test_what_is_missing_is_said_before_a_training_begins(tables, tmp_path):
    config = make_config(**SETTINGS)
    plain = replace(tables[0], semantic_files=None, semantic_names=())
    with pytest.raises(InputError, match="the annotations have none"):
        train(config, tmp_path, plain, tables[1])
    files = tables[1].semantic_files.copy()
    files[2] = ""
    with pytest.raises(InputError, match="1 of 4 images have no map of classes, the first is"):
        train(config, tmp_path, tables[0], replace(tables[1], semantic_files=files))
    others = replace(tables[1], semantic_names=tables[1].semantic_names[::-1])
    with pytest.raises(InputError, match="they need those of the model"):
        train(config, tmp_path, tables[0], others)
    files = tables[0].semantic_files.tolist()
    bad = read_map(tables[0][0].semantic_file)
    bad[3, 4] = 9
    files[0] = str(write_map(bad, tmp_path / "bad.png"))
    with pytest.raises(InputError, match=r"class 9 is outside 0..3, and not 255"):
        train(config, tmp_path, replace(tables[0], semantic_files=files), tables[1])
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_the_commands_train_evaluate_and_predict(tmp_path):
    manifest = tmp_path / "streets.yaml"
    manifest.write_text(
        "title: few\nformat: scenes\nroot: scenes\nlicence: CC0-1.0\nclasses: [person, head]\nsize: [96, 160]\n"
        "splits: {train: {num_images: 8, seed: 0}, val: {num_images: 3, seed: 1}}\n"
    )
    known = {"NEO_DATA": str(tmp_path / "data"), "NEO_REPORTS": str(tmp_path / "reports"), "NEO_TARGET": "cpu"}
    words = "--model segformer_nano --epochs 1 --passes-per-epoch 1 --size 96 160 --device cpu --tracker none".split()
    found = neo("train", "--data", str(manifest), *words, **known)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "mIoU" in found.stdout and "obstacle" in found.stdout
    run = next((tmp_path / "reports").glob("0001-*"))
    page = (run / "report.html").read_text()
    assert (
        "mean IoU of the classes" in page
        and "image, truth, prediction" in page
        and "the maps that it learned from" in page
    )
    found = neo("evaluate", "1", "--data", str(manifest), **known)
    assert found.returncode == 0, found.stderr[-2000:]
    second = next((tmp_path / "reports").glob("0002-*"))
    one, two = (json.loads((path / "metrics.json").read_text()) for path in (run, second))
    assert one == two and np.sum(two["confusion"]) > 0 and two["images"] == 3
    images = sorted((tmp_path / "data").rglob("*.jpg"))[:2]
    found = neo("predict", str(run), *map(str, images), **known)
    assert found.returncode == 0, found.stderr[-2000:]
    third = next((tmp_path / "reports").glob("0003-*"))
    told = json.loads((third / "maps.json").read_text())
    for row in told["images"]:
        drawn = cv2.imread(str(third / row["map"]), cv2.IMREAD_UNCHANGED)
        assert list(drawn.shape) == row["size"] == [96, 160] and drawn.max() < 4
    assert len(list((third / "images").glob("*.jpg"))) == 2 and (third / "report.html").is_file()
    for precision, least in (("fp16", 0.99),):
        found = neo("export", "1", "--precision", precision, "--data", str(manifest), "--json", **known)
        assert found.returncode == 0, found.stderr[-2000:]
        file = max((tmp_path / "reports").glob("*/model.onnx"), key=lambda file: file.parent.name)
        told = json.loads((file.parent / "export.json").read_text())
        assert told["passed"] and told["agreement"] >= least and told["precision"] == precision
        assert "load_segmenter" in (file.parent / "report.html").read_text()
    found = neo("evaluate", str(file), "--data", str(manifest), **known)
    assert found.returncode == 0, found.stderr[-2000:]
    found = neo("predict", str(file), str(images[0]), **known)
    assert found.returncode == 0 and "a map each" in found.stdout, found.stderr[-2000:]
    for words, why in (
        (("export", "1", "--to", "torch"), "maps are written as ONNX files"),
        (("predict", str(run), str(images[0]), "--threshold", ".5"), "a model of maps does not take --threshold"),
        (("predict", str(run), str(images[0]), "--image-seconds", "1"), "does not take --image-seconds"),
        (("errors", str(run)), "no boxes"),
    ):
        found = neo(*words, **known)
        assert found.returncode == 2 and why in found.stderr, found.stderr[-500:]
    with pytest.raises(InputError, match="a map for each image and no boxes"):
        open_evaluation(second)
