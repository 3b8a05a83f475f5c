"""Training under bad conditions: killed, halved, doubled, starved, and fed what is not finite."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_worker import images

from neo_nb.base.core import InputError
from neo_nb.train.checkpoint import load_state
from neo_nb.train.config import make_config
from neo_nb.train.trainer import Trainer, train
from neo_nb.train.update import NonFiniteLoss

WORKER = Path(__file__).with_name("train_worker.py")


def work(
    folder: Path, name: str, launch: list[str] | None = None, **order
) -> tuple[subprocess.CompletedProcess, dict]:
    order = {"images": str(folder / "images"), "run": str(folder / name), "config": {}} | order
    command = [sys.executable, *(launch or []), str(WORKER), json.dumps(order)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    done = folder / name / "done.json"
    return ended, json.loads(done.read_text()) if done.exists() else {}


def tensors(state: dict) -> dict[str, torch.Tensor]:
    """All tensors of a training state by their path."""
    found, rest = {}, [("", state)]
    while rest:
        path, value = rest.pop()
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict):
            rest += [(f"{path}/{k}", v) for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            rest += [(f"{path}/{i}", v) for i, v in enumerate(value)]
    return found


def test_a_killed_and_resumed_run_equals_the_straight_one_bit_for_bit(tmp_path):
    config = {"checkpoint_steps": 2, "num_workers": 1, "mosaic": 0.3, "grad_accum_steps": 1}
    straight, _ = work(tmp_path, "straight", config=config)
    assert straight.returncode == 0, straight.stderr[-2000:]
    killed, done = work(tmp_path, "killed", config=config, kill_after=3)
    assert killed.returncode == -9 and not done
    position = load_state(tmp_path / "killed/weights/last.pt")["position"]
    assert position == {"epoch": 0, "part": 0, "batch": 2, "step": 2}, "in the middle of an epoch"
    resumed, _ = work(tmp_path, "killed", config=config, resume=True)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    one, two = (load_state(tmp_path / name / "weights/last.pt") for name in ("straight", "killed"))
    assert one["position"] == two["position"] and one["ema_step"] == two["ema_step"] and one["best"] == two["best"]
    left, right = tensors(one), tensors(two)
    assert left.keys() == right.keys() and len(left) > 500
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
    for column in ("loss", "AP", "lr", "step"):
        assert [row[column] for row in one["rows"]] == [row[column] for row in two["rows"]]


def test_sigterm_saves_and_ends_cleanly_and_the_rest_can_be_resumed(tmp_path):
    ended, done = work(tmp_path, "run", kill_after=2, signal="SIGTERM")
    assert ended.returncode == 0 and done["interrupted"] and len(done["losses"]) <= 3, ended.stderr[-2000:]
    step = load_state(tmp_path / "run/weights/last.pt")["position"]["step"]
    resumed, rest = work(tmp_path, "run", resume=True)
    assert resumed.returncode == 0 and len(rest["losses"]) == 6 - step and not rest["interrupted"]


LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # on CPUs; GPUs: accelerate launch


def test_two_processes_see_the_loss_of_one_with_the_same_global_batch(tmp_path):
    norms = {"freeze_norms": True, "policy": "mild"}  # batch statistics are each process's own on CPUs
    one, alone = work(tmp_path, "one", config=norms | {"batch_size": 4}, no_denoising=True)
    two, pair = work(tmp_path, "two", LAUNCH, config=norms | {"batch_size": 2}, no_denoising=True)
    assert one.returncode == 0 and two.returncode == 0, (one.stderr + two.stderr)[-3000:]
    assert pair["losses"] == pytest.approx(alone["losses"], rel=2e-4) and len(alone["losses"]) == 6


def test_a_process_without_any_object_does_not_hang(tmp_path):
    everything_of_one_process = {"empty": [0, 2, 4, 6, 8, 10]}
    ended, done = work(tmp_path, "run", LAUNCH, config={"batch_size": 2}, **everything_of_one_process)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(done["losses"]) == 6


def test_too_little_memory_halves_the_batch_and_says_so(tmp_path):
    config = {"batch_size": 32, "size": (384, 512), "epochs": 1}
    ended, done = work(tmp_path, "run", config=config, count=32, megabytes=3000)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert done["micro"] < 32 and len(done["losses"]) == 1, "the same update, in parts"
    assert "out of memory with 32 images at once: going on with 16" in ended.stdout + ended.stderr


@pytest.fixture
def table(tmp_path):
    return images(tmp_path / "images")


def small(**more):
    return make_config(
        **(dict(size=(96, 128), epochs=1, passes_per_epoch=1, batch_size=4, tracker="none", cache=False) | more)
    )


def test_a_loss_that_is_not_finite_stops_with_image_ids_and_a_state(tmp_path, table):
    trainer = Trainer(small(), tmp_path / "run", table, table)
    with torch.no_grad():
        trainer.model.decoder.enc_score.bias[0] = torch.nan
    with pytest.raises(NonFiniteLoss, match=r"step 0: not finite: .*image ids \d+, \d+, \d+, \d+; state in"):
        trainer.fit()
    assert load_state(tmp_path / "run/weights/nonfinite.pt")["position"]["step"] == 0


def test_a_checkpoint_of_other_classes_is_refused(tmp_path, table):
    train(small(), tmp_path / "run", table, table)
    from dataclasses import replace

    other = replace(table, class_names=("tall", "broad"))
    with pytest.raises(InputError, match="class_names was"):
        train(small(), tmp_path / "run", other, other, resume=True)


def test_early_stopping_keeps_the_newest_and_a_warm_start_says_what_it_took(tmp_path, table, capsys):
    run = tmp_path / "run"
    result = train(small(epochs=6, patience=1, keep_last=1, lr=1e-9, backbone_lr=1e-9), run, table, table)
    assert result["epochs"] < 6
    assert len(list((run / "weights").glob("epoch_*.safetensors"))) == 1
    train(small(weights=str(run / "weights/last.safetensors")), tmp_path / "next", table, table)
    assert "tensors placed" in capsys.readouterr().out


def test_the_schedule_is_laid_into_the_time_there_is(tmp_path, table, capsys):
    more = {
        "epochs": 40,
        "passes_per_epoch": 2,
        "no_aug_epochs": 8,
        "lr": 1e-3,
        "backbone_lr": 1e-3,
        "minutes": 0.4,
    }
    trainer = Trainer(
        small(**more, schedule="cosine", final_lr_fraction=0.02, num_workers=0), tmp_path / "run", table, table
    )
    stages, update = [], trainer.train_step

    def look(batches, stop=False):
        stages.append(trainer._stage)
        return update(batches, stop)

    trainer.train_step = look
    result = trainer.fit()
    row, planned = result["last"], 40 * trainer.updates
    assert trainer.progress["step"] == trainer.total == row["updates"] < planned, "there was no time for all"
    assert result["ended"] == "time" and result["planned_epochs"] == 40
    assert result["fitted_epochs"] == row["epochs"] == row["epoch"] == len(trainer.history)
    assert row["lr"] < 0.1 * 1e-3, "the rate has fallen as it would have in 40 epochs"
    plain = stages.index("plain") / len(stages)
    assert 0.6 < plain < 0.95 and set(stages[stages.index("plain") :]) == {"plain"}
    assert result["minutes"] < 0.6
    assert f"of {planned:,} updates" in capsys.readouterr().out
    again = Trainer(small(**more, schedule="cosine", final_lr_fraction=0.02), tmp_path / "run", table, table)
    again.load(tmp_path / "run/weights/last.pt")
    assert (
        again.total == trainer.total and again.fit()["ended"] == "time" and len(again.history) == len(trainer.history)
    )


def test_enough_time_changes_nothing(tmp_path, table):
    config = {"epochs": 2, "policy": "mild", "no_aug_epochs": 1}
    train(small(**config), tmp_path / "free", table, table)
    timed = train(small(**config, minutes=60), tmp_path / "timed", table, table)
    one, two = (tensors(load_state(tmp_path / name / "weights/last.pt")) for name in ("free", "timed"))
    assert [key for key in one if not torch.equal(one[key], two[key])] == [] and timed["ended"] == "epochs"


def test_a_state_of_format_1_goes_on_as_one_of_today(tmp_path):
    table = images(tmp_path / "images")
    config = make_config(
        size=(64, 96), batch_size=2, epochs=2, passes_per_epoch=1, tracker="none", device="cpu", cache=False
    )
    first = Trainer(config, tmp_path / "new", table, table)
    first._enough = lambda: True  # as if it had been stopped after an epoch
    first.fit()
    path = tmp_path / "new/weights/last.pt"
    state = load_state(path)
    for key in ("micro", "total", "evaluations", "in_a_row"):
        del state[key]
    rows = [{k: v for k, v in row.items() if k != "skipped"} for row in state["rows"]]
    old = state | {"format": "neo_nb training state 1", "batch_size": 2, "grad_accum_steps": 1, "rows": rows}
    torch.save(old, tmp_path / "old.pt")
    ended = []
    for file in (path, tmp_path / "old.pt"):
        again = Trainer(config, tmp_path / file.stem, table, table)
        again.load(file)
        ended.append(again.fit()["last"])
    for column in ("step", "loss", "AP", "lr", "skipped"):
        assert ended[0][column] == ended[1][column], column
