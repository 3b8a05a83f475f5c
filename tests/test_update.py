"""An update is one, however it is cut: into parts, processes, or by too little memory; and it is whole or nothing."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from update_worker import all_targets, gradients, make_loop, starve

from neo_nb.train.checkpoint import load_state
from neo_nb.train.config import make_config
from neo_nb.train.loop import chunks
from neo_nb.train.trainer import Trainer
from neo_nb.train.update import NonFiniteLoss

WORKER = Path(__file__).with_name("update_worker.py")


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Norm of the difference as a share of the first one's norm."""
    assert one.keys() == two.keys() and len(one) > 90
    a, b = (torch.cat([x[key].flatten().double() for key in one]) for x in (one, two))
    return ((a - b).norm() / a.norm()).item()


def by_two(folder: Path, **order) -> list[dict]:
    """What `update_worker` finds in each of two processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, str(WORKER), json.dumps({"folder": str(folder)} | order)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("num_denoising", [100, 20])  # the 60 objects are asked about, or a part of them
def test_a_batch_of_four_is_two_twos_and_four_ones(tmp_path, num_denoising):
    whole = all_targets(tmp_path)
    four, two, one = (
        gradients(make_loop(tmp_path, batch_size=size, grad_accum_steps=4 // size, num_denoising=num_denoising), whole)
        for size in (4, 2, 1)
    )
    assert difference(four, two) < 1e-5 and difference(four, one) < 1e-5


def test_too_little_memory_cuts_an_odd_batch_and_changes_nothing_else(tmp_path):
    counts = (1, 60, 1, 0, 3)
    whole = all_targets(tmp_path, counts)
    plain, starved = make_loop(tmp_path, counts), make_loop(tmp_path, counts)
    tried = starve(starved, 3)
    assert difference(gradients(plain, whole), gradients(starved, whole)) < 1e-5
    assert tried == [5, 2, 3] and starved.micro == 3
    assert starved.progress == plain.progress and len(starved.loader) == len(plain.loader) == 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, list[dict]]:
    """What two processes found, each with half of the images."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, by_two(folder)


def test_two_processes_with_two_images_are_one_with_four(pair):
    folder, (first, second) = pair
    alone = gradients(make_loop(folder), all_targets(folder))
    assert difference(alone, first["gradients"]) < 1e-5 and difference(first["gradients"], second["gradients"]) == 0


def test_one_process_without_memory_cuts_the_batches_of_all(pair):
    folder, (first, second) = pair
    assert (first["tried"], second["tried"]) == ([2, 1, 1], [2, 1, 1]) and first["micro"] == second["micro"] == 1
    alone = gradients(make_loop(folder), all_targets(folder))
    assert difference(alone, first["starved"]) < 1e-5 and difference(first["starved"], second["starved"]) == 0


def test_processes_draw_their_own_noise_and_keep_the_same_weights_and_statistics(pair):
    _, (first, second) = pair
    assert first["noise"] != second["noise"]
    for name in ("state", "average"):
        differ = [key for key, value in first[name].items() if not torch.equal(value, second[name][key])]
        assert differ == []
    start = make_loop(pair[0], batch_size=2, freeze_norms=False).model.state_dict()
    moved = [k for k, v in start.items() if k.startswith("backbone.") and not torch.equal(v, first["state"][k])]
    assert len(moved) > 60, "the backbone that was let go has moved, in both alike"


def test_a_process_that_sees_no_number_ends_all_with_its_images(pair):
    _, (first, second) = pair
    ids = ", ".join(map(str, second["images"]))
    assert first["message"] == second["message"] and f"image ids {ids};" in first["message"]
    assert first["message"].startswith("NonFiniteLoss: step 0: not finite: the matching cost is not finite")


def trainer(folder: Path, **more) -> Trainer:
    loop = make_loop(folder, (2, 1, 3, 1, 2, 1))
    config = loop.config.model_dump() | {"batch_size": 1, "overfit_batches": 6, "freeze_norms": False} | more
    return Trainer(make_config(**config), folder / "run", loop.train_table, loop.train_table)


def poison(trainer: Trainer, first: int, count: int) -> list[list[int]]:
    """Make a gradient infinite in some updates; the list has the images of each of these."""
    images, step = [], {"now": False}
    trainer.model.decoder.enc_score.weight.register_hook(lambda g: g * math.inf if step["now"] else g)
    update = trainer.train_step

    def poisoned(batches, stop=False):
        step["now"] = first <= trainer.progress["step"] < first + count
        if step["now"]:
            images.append([row for batch in batches for row in batch.image_index.tolist()])
        return update(batches, stop)

    trainer.train_step = poisoned
    return images


def finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values())


def test_one_infinite_gradient_is_left_out_and_counted(tmp_path, capsys):
    one = trainer(tmp_path)
    images = poison(one, 2, 1)
    before, plain = [], one.train_step

    def look(batches, stop=False):
        before.append({k: v.clone() for k, v in (one.model.state_dict() | prefixed(one)).items()})
        return plain(batches, stop)

    one.train_step = look
    result = one.fit()
    assert result["skipped"] == 1 and [row["skipped"] for row in one.history] == [1] and one.progress["step"] == 6
    counted = [k for k in before[2] if not torch.equal(before[2][k], before[3][k])]
    assert all(key.endswith("num_batches_tracked") for key in counted), "the third update has changed nothing"
    assert finite(one.model.state_dict()) and finite(one.ema.model.state_dict())
    assert math.isfinite(one.history[0]["loss"])
    assert f"step 2: the gradient is not finite: update left out; image ids {images[0][0]}" in capsys.readouterr().out
    header = (tmp_path / "run/results.csv").read_text().splitlines()
    assert dict(zip(header[0].split(","), header[1].split(",")))["skipped"] == "1"


def prefixed(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {f"average.{k}": v for k, v in trainer.ema.model.state_dict().items()}


def test_infinite_gradients_in_a_row_end_the_run_before_the_first_is_saved(tmp_path):
    one = trainer(tmp_path)
    images = poison(one, 1, 5)
    with pytest.raises(NonFiniteLoss) as error:
        one.fit()
    assert f"step 3: not finite: the gradient, 3 updates in a row; image ids {images[2][0]}; state in" in str(
        error.value
    )
    state = load_state(tmp_path / "run/weights/nonfinite.pt")
    assert finite(state["model"]) and finite(state["ema"]) and finite(state["sums"])
    assert state["position"] == {"epoch": 0, "part": 0, "batch": 3, "step": 3}
    again = trainer(tmp_path)
    again.load(tmp_path / "run/weights/nonfinite.pt")
    assert next(chunks(loader_at(again), 1))[0].image_index.tolist() == images[2]
    assert again.fit()["epochs"] == 1


def loader_at(trainer: Trainer):
    trainer.loader.set_epoch(0, trainer.progress["batch"])
    return trainer.loader


def test_a_scaler_that_still_falls_is_no_reason_to_end(tmp_path):
    one = trainer(tmp_path)
    one.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    poison(one, 0, 4)
    assert one.fit()["skipped"] == 4
    two = trainer(tmp_path)
    two.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    poison(two, 0, 6)
    with pytest.raises(NonFiniteLoss, match="the gradient, 3 updates in a row"):
        two.fit()
