"""A teacher in training: the same update however it is batched, resumed exactly, and nothing of it in the weights."""

import pytest
import torch
from test_runs import place

from neo_nb.base.core import InputError
from neo_nb.data.manifest import load_dataset
from neo_nb.models import load_model
from neo_nb.models.teacher import check_teacher
from neo_nb.train.config import make_config
from neo_nb.train.trainer import Trainer, train

SMALL = {"size": (64, 96), "epochs": 2, "passes_per_epoch": 1, "batch_size": 4, "tracker": "none", "device": "cpu",
         "cache": False, "policy": "none", "teacher": "timm/tf_efficientnet_lite0", "teacher_weights": "package"}  # fmt: skip
families = pytest.mark.parametrize("model", ["rtdetr_nano", "detr_nano", "dinov3_rtdetr_nano"])


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    folder = place(tmp_path_factory.mktemp("teacher") / "workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEO_ROOT", str(folder))
        patch.setenv("NEO_DATA", str(folder / "data"))
        yield load_dataset(str(folder / "data_manifests/cells.yaml"), "train")


@families
def test_a_resumed_training_ends_where_an_unbroken_one_does(cells, tmp_path, model):
    whole = Trainer(make_config(model=model, **SMALL), tmp_path / "whole", cells, cells)
    begun = whole.teacher.project.weight.clone()
    whole.fit()
    assert not torch.equal(begun, whole.teacher.project.weight), "the projection learns"
    assert all(0 < row["loss_teacher"] < 2 for row in whole.history)

    half = Trainer(make_config(model=model, **SMALL), tmp_path / "half", cells, cells)
    half._enough = lambda: True  # ends after its first epoch
    half.fit()
    again = Trainer(make_config(model=model, **SMALL), tmp_path / "half", cells, cells)
    again.load(tmp_path / "half/weights/last.pt")
    again.fit()
    for one, two in ((whole.model, again.model), (whole.teacher, again.teacher)):
        pairs = zip(one.state_dict().items(), two.state_dict().items())
        assert [name for (name, a), (_, b) in pairs if not torch.equal(a, b)] == []

    weights, record = load_model(tmp_path / "half/weights/last.safetensors")
    assert not any("teacher" in name or "project." in name for name in weights.state_dict() if "backbone" in name)
    assert "teacher" not in record["config"]


def test_a_teacher_changes_the_encoder_and_not_what_is_behind_it(cells, tmp_path):
    found = {}
    for name, teacher in (("alone", None), ("taught", SMALL["teacher"])):
        config = make_config(model="detr_nano", **(SMALL | {"teacher": teacher, "max_grad_norm": 0.0}))
        trainer = Trainer(config, tmp_path / name, cells, cells)
        trainer.model.train()
        trainer._gradients([next(iter(trainer.loader))], False, {})
        found[name] = {key: p.grad for key, p in trainer.model.named_parameters() if p.grad is not None}
    changed = [key for key, gradient in found["alone"].items() if not torch.equal(gradient, found["taught"][key])]
    assert changed and all(".decoder." not in key and "class_labels" not in key for key in changed)
    assert any(".encoder." in key for key in changed)


@pytest.mark.parametrize("batches", [(2, 2), (1, 4)])
def test_however_an_update_is_batched(cells, tmp_path, batches):
    size, steps = batches
    settings = SMALL | {"max_grad_norm": 0.0}
    one = Trainer(make_config(model="detr_nano", **settings), tmp_path / "one", cells, cells)
    many = Trainer(make_config(model="detr_nano", **settings), tmp_path / "many", cells, cells)
    many.micro = size
    gradients = []
    for trainer in (one, many):
        trainer.model.train().requires_grad_(True)
        for module in trainer.model.modules():
            module.eval() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) else None
        trainer._gradients([next(iter(trainer.loader))], False, {})
        parameters = [*trainer.model.parameters(), *trainer.beside]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, 0) > 0.99999
    assert torch.allclose(*gradients, atol=1e-4)


def test_a_teacher_that_cannot_be_had_is_refused_before_a_run_begins(cells, tmp_path):
    with pytest.raises(InputError, match="no such teacher"):
        check_teacher("resnet18", "hub")
    with pytest.raises(InputError, match="no such file"):
        check_teacher("timm/resnet18", str(tmp_path / "none.pth"))
    with pytest.raises(InputError, match="cannot go on with other settings: teacher was"):
        train(make_config(model="detr_nano", **SMALL), tmp_path / "run", cells, cells)
        train(
            make_config(model="detr_nano", **(SMALL | {"teacher": None})), tmp_path / "run", cells, cells, resume=True
        )
