"""Training in equal time, and the detector it is compared with: what makes a comparison a fair one."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from neo_nb.data.batch import Targets
from neo_nb.models.rtdetr import hybrid_encoder
from neo_nb.models.transformers_reference import PEERS, TransformersDetector
from neo_nb.models.zoo import VARIANTS, create_model
from neo_nb.recipes.equal_time import (
    COMPETITORS,
    TimedTrainer,
    _peer,
    equal_time,
    final,
    published_position_embedding,
    read_equal_time,
)
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.config import make_config
from neo_nb.train.optim import Ema, lr_factor

NANO = VARIANTS["rtdetr_nano"]
TINY = {"size": (64, 96), "batch_size": 2}
MANIFEST = """title: a few
format: scenes
root: few
licence: CC0-1.0
classes: [person, head]
size: [64, 96]
splits: {train: {num_images: 8, seed: 0}, val: {num_images: 4, seed: 1}}
"""


@pytest.fixture
def few(tmp_path, monkeypatch):
    "A data set of a few small scenes, by the path of its manifest."
    monkeypatch.setenv("NEO_DATA", str(tmp_path))
    (tmp_path / "few.yaml").write_text(MANIFEST)
    return str(tmp_path / "few.yaml")


def _processes() -> list[str]:
    "The command lines of all that runs."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="ignore"))
        except OSError:
            continue  # it has just ended
    return found


def some_targets():
    "One image with two objects, one with none."
    boxes = torch.tensor([[0.4, 0.5, 0.2, 0.3], [0.7, 0.2, 0.1, 0.1]])
    none = torch.zeros(0, 4)
    empty = Targets(none, torch.zeros(0, dtype=torch.int64), none)
    return Targets(boxes, torch.tensor([0, 2]), none), empty


@pytest.mark.parametrize("kind", PEERS)
def test_the_peer_is_transformers_network_and_loss_unchanged(kind):
    torch.manual_seed(0)
    peer, objects = TransformersDetector(3, NANO, kind), some_targets()
    images = torch.rand(2, 3, 96, 160)
    torch.manual_seed(1)
    outputs = peer(images, None, objects)
    torch.manual_seed(1)
    labels = [{"class_labels": t.labels, "boxes": t.boxes} for t in objects]
    theirs = peer.peer(pixel_values=images.contiguous(memory_format=torch.channels_last), labels=labels)
    torch.testing.assert_close(sum(peer.loss(outputs).values()), theirs.loss)
    torch.testing.assert_close(outputs.boxes, theirs.pred_boxes)


@pytest.mark.parametrize("kind", PEERS)
def test_the_peer_s_weights_are_averaged_once_an_update(kind):
    peer = TransformersDetector(3, NANO, kind)
    before = {name: p.detach().clone() for name, p in peer.named_parameters()}
    ema = Ema(peer, 0.5, ramp=1e-9)
    ema.ramp = 1e-9  # at once at its full decay
    with torch.no_grad():
        for p in peer.parameters():
            p += 1
    ema.update(peer)
    for name, p in ema.model.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.5)


def test_the_peer_has_our_size_and_its_backbone_its_own_rate(few):
    from neo_nb.data.manifest import load_dataset
    from neo_nb.train.optim import make_optimizer

    config, table = make_config(backbone_lr=1e-6, **TINY), load_dataset(few, "train")
    peer, ours = _peer(config, "rt_detr_v2", table), create_model("rtdetr_nano", 2)
    assert (peer.size, peer.class_names) == (TINY["size"], table.class_names)
    counts = [sum(p.numel() for p in m.parameters()) for m in (ours, peer)]
    assert abs(counts[1] / counts[0] - 1) < 0.01
    rates = {
        g["name"]: (g["base_lr"], sum(p.numel() for p in g["params"]))
        for g in make_optimizer(peer, config).param_groups
    }
    assert sum(n for _, n in rates.values()) == counts[1]
    assert all((lr == 1e-6) == name.startswith("backbone") for name, (lr, _) in rates.items()) and len(rates) == 4


def test_the_published_position_changes_rectangles_only(monkeypatch):
    torch.manual_seed(0)
    model = create_model("rtdetr_nano", 2).eval()
    photos = {"square": torch.rand(1, 3, 128, 128), "wide": torch.rand(1, 3, 96, 192)}
    with torch.no_grad():
        before = {name: model(x).decoder.proposal_logits for name, x in photos.items()}
        monkeypatch.setattr(hybrid_encoder, "position_embedding", published_position_embedding)
        after = {name: model(x).decoder.proposal_logits for name, x in photos.items()}
    assert torch.equal(before["square"], after["square"])
    assert not torch.allclose(before["wide"], after["wide"], atol=1e-4)


def test_the_schedule_ends_when_the_time_does(tmp_path):
    table = make_scenes(8, (64, 96), 0, tmp_path / "scenes")
    config = make_config(epochs=8, no_aug_epochs=2, lr=1e-3, tracker="none", device="cpu", cache=True, **TINY)
    trainer, plain = TimedTrainer(config, tmp_path / "run", table, table), []
    update = trainer.train_step
    trainer.train_step = lambda batches: (plain.append(trainer._stage == "plain"), update(batches))[1]
    rows = trainer.train_for(minutes=0.1, evaluations=4)
    assert [round(row["cpu_minutes"] / 0.025) for row in rows] == [1, 2, 3, 4]
    assert [row["updates"] for row in rows] == sorted(row["updates"] for row in rows)
    assert lr_factor(trainer.progress["step"] - 1, trainer.total, config) < config.final_lr_fraction + 0.05
    share = plain.index(True) / len(plain)
    assert 0.6 < share < 0.9 and all(plain[plain.index(True) :]), share
    assert trainer.ema.ramp == pytest.approx(
        max(config.ema_warmup * trainer.total, 1)
    )  # a slow machine has few updates


def test_a_comparison_that_was_cut_leaves_nothing_half_and_goes_on(few, tmp_path):
    code = f"from neo_nb.recipes.equal_time import equal_time; equal_time(['ours'], {few!r}, [0], 10, {str(tmp_path / 'equal')!r}, jobs=1)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    log, deadline = tmp_path / "equal" / "ours-0.log", time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    left = [line for line in _processes() if "_work()" in line and str(tmp_path) in line]
    assert process.returncode and not left, left
    assert log.exists() and not list((tmp_path / "equal").glob("*.result.json"))
    assert len(read_equal_time(tmp_path / "equal")) == 0


def test_seeds_are_trainings_of_their_own(few, tmp_path):
    entrant = {"name": "the published", "position": "published"}
    frame = equal_time([entrant], few, [0, 1], 0.02, tmp_path / "equal", jobs=2, evaluations=1, settings=TINY)
    assert list(frame.competitor) == ["the published"] * 2 and sorted(frame.seed) == [0, 1]
    assert frame.loss.nunique() == 2 and final(frame).loc["the published", "seeds"] == 2
    job = json.loads((tmp_path / "equal" / "the_published-1.json").read_text())
    assert job["config"]["seed"] == 1 and job["competitor"]["position"] == "published"
    assert Path(tmp_path / "equal" / "equal_time.csv").read_text().count("\n") == 3


def test_every_competitor_can_be_looked_up():
    assert set(COMPETITORS) == {"ours", "published position", "transformers", "transformers v1"}
