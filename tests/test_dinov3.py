"""A frozen DINOv3 from a folder in the hub's layout: taken over whole, moved by nothing, needed no more afterwards."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_runs import place

from neo_nb.base.core import InputError
from neo_nb.data.manifest import load_dataset
from neo_nb.models import load_model
from neo_nb.models.dinov3 import load_vit, make_vit, sizes_of
from neo_nb.models.zoo import check_model
from neo_nb.train.checkpoint import load_state
from neo_nb.train.config import make_config
from neo_nb.train.trainer import Trainer

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}


@pytest.fixture
def published(tmp_path):
    "A small DINOv3 as transformers publishes it."
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(1)
    DINOv3ViTModel(DINOv3ViTConfig(**SIZES, num_register_tokens=4)).save_pretrained(tmp_path / "dinov3")
    return tmp_path / "dinov3"


@pytest.fixture
def cells(tmp_path, monkeypatch):
    folder = place(tmp_path / "workspace")
    monkeypatch.setenv("NEO_ROOT", str(folder))
    monkeypatch.setenv("NEO_DATA", str(folder / "data"))
    return load_dataset(str(folder / "data_manifests/cells.yaml"), "train")


def test_features_are_those_of_transformers_on_the_same_weights(published):
    from transformers import DINOv3ViTBackbone

    theirs = DINOv3ViTBackbone.from_pretrained(published, out_features=["stage3"]).eval()
    ours = make_vit(sizes_of(published)).eval()
    load_vit(ours, published)
    image = torch.rand(1, 3, 80, 112)
    with torch.no_grad():
        assert torch.equal(ours(image).feature_maps[0], theirs(image).feature_maps[0])


def test_training_moves_nothing_of_it_and_keeps_it_once(published, cells, tmp_path):
    config = make_config(model="dinov3_detr_nano", pretrained=str(published), size=(64, 96), epochs=2, passes_per_epoch=1,
                         batch_size=2, tracker="none", device="cpu", cache=False)  # fmt: skip
    trainer = Trainer(config, tmp_path / "run", cells, cells)
    frozen = {id(p) for p in trainer.model.network.model.backbone.parameters()}
    assert not any(id(p) in frozen for group in trainer.optimizer.param_groups for p in group["params"])
    assert (
        trainer.ema.model.network.model.backbone.model.norm.weight
        is trainer.model.network.model.backbone.model.norm.weight
    )
    trainer.fit()
    assert all(p.grad is None for p in trainer.model.network.model.backbone.parameters())
    state = load_state(tmp_path / "run/weights/last.pt")
    moved = sum(p.requires_grad for p in trainer.model.parameters())
    assert len(state["optimizer"]["state"]) == moved

    given = load_file(published / "model.safetensors")
    shutil.rmtree(published)  # the run holds all that it needs
    model, record = load_model(tmp_path / "run/weights/best.safetensors")
    assert tuple(record["config"]["vit"])[:4] == tuple(SIZES.values()) and model.preprocessing.divisor == 16
    own = {key.removeprefix("model."): x for key, x in model.network.model.backbone.model.state_dict().items()}
    assert all(torch.equal(own[key], x) for key, x in given.items() if not key.endswith("mask_token"))
    assert not any(p.requires_grad for p in model.network.model.backbone.parameters())


def test_a_folder_of_something_else_is_refused_before_a_run_begins(published, tmp_path):
    check_model("dinov3_detr", pretrained=str(published))
    with pytest.raises(InputError, match="config.json: cannot be read"):
        check_model("dinov3_detr", pretrained=str(tmp_path / "none"))
    with pytest.raises(InputError, match="nobody published weights of dinov3/nano"):
        check_model("dinov3_detr_nano", pretrained="hub")
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"hidden_size": 60}))
    with pytest.raises(InputError, match="tensors do not fit"):
        load_vit(make_vit(sizes_of(published)), published)


def test_low_rank_updates_learn_layer_by_layer_and_go_on_only_where_they_have_a_place(tmp_path):
    from neo_nb.models import create_model, load_weights, save_weights

    torch.manual_seed(0)
    tuned = create_model("dinov3_rtdetr_nano", class_names=("cell",), lora=4)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if ".lora_b" in name:
                p.normal_(std=0.1)
    images, found, calls = torch.rand(1, 3, 64, 96), [], []
    for layer in tuned.backbone.vit.modules():
        if type(layer).__name__ == "DINOv3ViTAttention":
            layer.register_forward_hook(lambda *_: calls.append(1))
    for on in (False, True):
        tuned.set_grad_checkpointing(on)
        tuned.train().zero_grad()
        torch.manual_seed(1)
        calls.clear()
        tuned(images).boxes.sum().backward()
        found.append((len(calls), {n: p.grad for n, p in tuned.named_parameters() if ".lora_" in n}))
    assert (found[0][0], found[1][0]) == (4, 8), "computed again in the backward pass"
    assert all(torch.allclose(found[0][1][name], grad, atol=1e-6) for name, grad in found[1][1].items())

    tuned.preprocessing = replace(tuned.preprocessing, resize="stretch")
    save_weights(tuned, tmp_path / "tuned.safetensors")
    load_weights(create_model("dinov3_rtdetr_nano", class_names=("cell",), lora=4), tmp_path / "tuned.safetensors")
    for rank in (0, 2):
        other = create_model("dinov3_rtdetr_nano", class_names=("cell",), lora=rank)
        with pytest.raises(InputError, match="low-rank updates of rank 4"):
            load_weights(other, tmp_path / "tuned.safetensors")
    save_weights(create_model("dinov3_rtdetr_nano", class_names=("cell",)), tmp_path / "plain.safetensors")
    report = load_weights(tuned, tmp_path / "plain.safetensors")
    assert "resize letterbox instead of stretch" in report.contract
