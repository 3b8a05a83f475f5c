"""HGNetv2: names of both published layouts, freezing, channels and sizes over random shapes."""

import random

import pytest
import torch

from neo_nb.models.backbones import freeze, freeze_norms
from neo_nb.models.hgnet import HGNETS, HGNetV2, hgnet_keys
from neo_nb.models.rtdetr.convert import INSIDE, PARTS, convert_key

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SMALL = {"stem": (8, 12), "inner": (4, 6, 8, 10), "blocks": (1, 2, 2, 1), "widths": (16, 24, 32, 40)}


def published(name: str, layout: str) -> list[str]:
    """Every tensor's name, written down from the stage table: of the reference implementation, or of transformers."""
    reference = layout == "reference"
    conv, norm = ("conv", "bn") if reference else ("convolution", "normalization")
    stem, stage = "backbone.stem", "backbone.stages"
    if not reference:
        stem, stage = "backbone.model.embedder", "backbone.model.encoder.stages"
    bricks = [f"{stem}.stem{part}" for part in ("1", "2a", "2b", "3", "4")]
    for i, blocks in enumerate(HGNETS[name]["blocks"]):
        bricks += [f"{stage}.{i}.downsample"] * (i > 0)
        for j in range(blocks):
            block = f"{stage}.{i}.blocks.{j}"
            for k in range(6):
                bricks += [f"{block}.layers.{k}{part}" for part in ([".conv1", ".conv2"] if i >= 2 else [""])]
            ends = ("_squeeze_conv", "_excitation_conv") if reference else (".0", ".1")
            bricks += [f"{block}.aggregation{end}" for end in ends]
    names = []
    for brick in bricks:
        padded = reference and brick.endswith(("stem2a", "stem2b"))  # its convolution stands behind the padding
        names += [f"{brick}.{conv}{'.1' * padded}.weight", *(f"{brick}.{norm}.{part}" for part in NORM)]
    return names


@pytest.mark.parametrize("layout", ["reference", "transformers"])
@pytest.mark.parametrize("name", list(HGNETS))
def test_every_published_name_has_one_place(name, layout):
    with torch.device("meta"):
        own = {f"backbone.{key}" for key in HGNetV2(**HGNETS[name]).state_dict()}
    theirs = published(name, layout)
    found = [hgnet_keys(key) for key in theirs]
    assert len(set(theirs)) == len(theirs) == len(own)
    assert set(found) == own
    assert [hgnet_keys(key) for key in found] == found  # our own names stay


def test_names_of_the_rest_are_left_alone():
    strides = [8, 16, 32]
    rest = [
        "backbone.model.embedder.embedder.0.convolution.weight",
        "backbone.model.encoder.stages.1.layers.0.layer.1.normalization.running_var",
        "backbone.model.encoder.stages.1.layers.0.shortcut.1.convolution.weight",
        "backbone.conv1.conv1_2.norm.weight",
        "backbone.res_layers.1.blocks.0.short.conv.conv.weight",
        "backbone.stages.1.0.shortcut.1.0.weight",
        "encoder.downsample_convs.0.conv.weight",
        "decoder.decoder.layers.0.linear1.weight",
    ]
    for name in rest:
        assert hgnet_keys(name) == name and convert_key(hgnet_keys(name), strides) == convert_key(name, strides)


def test_the_other_tables_leave_these_names_alone():
    import re

    for layout in ("reference", "transformers"):
        for key in published("hgnetv2_l", layout):
            ours = hgnet_keys(key)
            after = ours
            for pattern, to in [*PARTS, *INSIDE]:
                after = re.sub(pattern, to, after)
            assert after == ours


@pytest.mark.parametrize("seed", range(12))
def test_sizes_and_channels_at_any_shape(seed):
    draw = random.Random(seed)
    strides = draw.choice([(4,), (8,), (4, 8), (8, 16), (8, 16, 32), (4, 8, 16, 32), (16, 32)])
    height, width = draw.randint(32, 130), draw.randint(32, 130)
    model = HGNetV2(**SMALL, strides=strides).eval()
    with torch.no_grad():
        maps = model(torch.rand(2, 3, height, width))
    assert len(model.stages) == (4, 8, 16, 32).index(max(strides)) + 1
    for x, channels, stride in zip(maps, model.channels, model.strides, strict=True):
        assert x.shape == (2, channels, -(-height // stride), -(-width // stride))  # rounded up, step by step


@pytest.mark.parametrize("seed", range(4))
def test_one_image_is_as_in_a_batch_and_strides_choose_alone(seed):
    torch.manual_seed(seed)
    model = HGNetV2(**SMALL, strides=(4, 8, 16, 32)).eval()
    fewer = HGNetV2(**SMALL, strides=(8, 32)).eval()
    fewer.load_state_dict(model.state_dict())
    images = torch.rand(3, 3, 64, 96)
    with torch.no_grad():
        whole, single, chosen = model(images), model(images[1:2]), fewer(images)
    for a, b in zip(whole, single):
        torch.testing.assert_close(a[1:2], b, atol=1e-5, rtol=1e-4)
    assert torch.equal(whole[1], chosen[0]) and torch.equal(whole[3], chosen[1])


@pytest.mark.parametrize("at", [-1, 0, 1, 2])
def test_frozen_parts_do_not_move(at):
    torch.manual_seed(0)
    model = HGNetV2(**SMALL)
    parts = [model.stem, *model.stages]
    for part in parts[: at + 1]:
        freeze(part)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    sum(x.square().mean() for x in model(torch.rand(2, 3, 64, 96))).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    for i in range(len(parts)):
        prefix = "stem." if i == 0 else f"stages.{i - 1}."
        moved = [k for k, v in model.state_dict().items() if k.startswith(prefix) and not torch.equal(v, before[k])]
        assert bool(moved) == (i > at), (prefix, moved[:3])


def test_frozen_norms_and_channels_last():
    model = HGNetV2(**SMALL)
    freeze_norms(model)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.rand(1, 3, 64, 96)
    plain = model(images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fast = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    for a, b in zip(plain, fast):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
