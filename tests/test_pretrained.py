"""What a training begins with when nobody says: found quickly, named with its licence, and nothing where there is nothing."""

import json
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from test_parity import make_peer

from neo_nb.base.core import InputError
from neo_nb.models import pretrained
from neo_nb.models.pretrained import choose_model, find_start
from neo_nb.models.zoo import create_model
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.config import current_names, make_config
from neo_nb.train.loop import build_model, resolve_start

REPOSITORY = "PekingU/rtdetr_r18vd"
TINY = {"size": (64, 96), "epochs": 1, "passes_per_epoch": 1, "batch_size": 2, "tracker": "none", "device": "cpu"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    "The hub's cache with the detector's weights in it, as transformers saves them: 80 classes, persons among them."
    folder = tmp_path_factory.mktemp("hub")
    place = folder / f"models--{REPOSITORY.replace('/', '--')}"
    peer = make_peer("rtdetr_r18", "rt_detr")
    names = ["person"] + [f"thing {i}" for i in range(1, peer.config.num_labels)]
    peer.config.id2label, peer.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    peer.save_pretrained(place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    return folder


@pytest.fixture
def cached(cache, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        if hasattr(sys.modules[name], "HF_HUB_CACHE"):
            monkeypatch.setattr(sys.modules[name], "HF_HUB_CACHE", str(cache), raising=False)
    return cache


def test_the_published_detector_is_taken_from_the_cache_and_new_heads_are_named(cached, tmp_path, capsys):
    start = find_start("rtdetr_r18")
    assert (start.what, start.source, start.licence) == ("detector", REPOSITORY, "Apache-2.0")
    table = make_scenes(2, (64, 96), 0, tmp_path)  # persons and heads
    model = build_model(make_config(model="rtdetr_r18", **TINY), table)
    said = capsys.readouterr().out
    assert f"rtdetr_r18 starts from the detector {REPOSITORY}, licence Apache-2.0" in said
    assert "classes by name; 1 classes begin fresh (1 head)" in said
    by_hand = build_model(make_config(model="rtdetr_r18", weights=REPOSITORY, classes="by-name", **TINY), table)
    for key, tensor in by_hand.state_dict().items():
        if key.startswith("backbone.") and tensor.is_floating_point():
            assert torch.equal(model.state_dict()[key], tensor), key


def test_who_says_so_gets_something_else(cached):
    known = make_config(model="rtdetr_r18", **TINY)
    assert resolve_start(known).weights == REPOSITORY and resolve_start(known).classes == "known"
    assert resolve_start(make_config(model="rtdetr_r18", classes="fresh", **TINY)).classes == "fresh"
    assert resolve_start(make_config(model="rtdetr_r18", pretrained="none", **TINY)).weights is None
    other = resolve_start(make_config(model="rtdetr_r18", backbone="timm/tf_efficientnet_lite0", **TINY))
    assert (other.weights, other.pretrained) == (None, "package")


def test_nothing_is_said_plainly_and_in_time(monkeypatch, capsys):
    begin = time.perf_counter()
    config = resolve_start(make_config(**TINY))
    assert time.perf_counter() - begin < 1 and config.weights is None and config.model_overrides() == {}
    assert (
        "rtdetr_nano starts from nothing (nobody published weights of rtdetr_nano): expect" in capsys.readouterr().out
    )
    with pytest.raises(InputError, match="there are none"):
        resolve_start(make_config(classes="by-name", **TINY))
    monkeypatch.setattr(pretrained, "is_packaged", lambda backbone: False)
    assert choose_model(gpu=False)[0] == "rtdetr_nano" and "pip install" in choose_model(gpu=False)[1]
    assert 'pip install "neo_nb[pretrained]"' in str(find_start("rtdetr_lite0"))


def test_a_hub_that_accepts_and_stays_silent_is_passed_over(monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(pretrained, "PATIENCE", 0.5)
        begin = time.perf_counter()
        line = str(find_start("rtdetrv2_r18"))
    assert time.perf_counter() - begin < 8 and "starts from nothing" in line and "does not answer" in line, line


def test_runs_of_before_began_with_nothing():
    assert current_names({"pretrained": None})["pretrained"] == "none"
    assert "pretrained" not in current_names({"lr": 1e-3})


def test_a_name_of_a_run_and_the_record_of_weights_decide_the_model(tmp_path):
    from neo_nb.models.weights import save_weights

    save_weights(create_model("detr_nano", 2), tmp_path / "best.safetensors")
    assert choose_model(True, tmp_path / "best.safetensors")[0] == "detr_nano"
    assert json.dumps(dict(find_start("rtdetr_lite0").settings)) == '{"pretrained": "package"}'
