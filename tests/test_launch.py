"""Several processes for one training: the same folder, the same errors, the same way to stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from train_worker import images

from neo_nb.base.core import InputError
from neo_nb.data.coco import write_coco
from neo_nb.train.checkpoint import load_state
from neo_nb.train.config import make_config
from neo_nb.train.launch import ProcessFailed, train_processes

TINY = {"size": (96, 128), "epochs": 1, "passes_per_epoch": 1, "batch_size": 2, "tracker": "none", "cache": False}
TINY |= {"device": "cpu", "no_aug_epochs": 1, "model": "rtdetr_nano"}


def small(folder: Path, **change) -> dict:
    """Settings, and a data set of a few drawn images with its manifest."""
    table = images(folder / "images", 8)
    write_coco(table, folder / "a.json")
    entry = "{annotations: a.json, images: images}"
    text = f"format: coco\nroot: {folder}\nclasses: [tall, wide]\nsplits:\n  train: {entry}\n  val: {entry}\n"
    (folder / "small.yaml").write_text(text)
    return {"config": make_config(**(TINY | change)), "run": folder / "run", "data": folder / "small.yaml"}


def ours(folder: Path) -> list[int]:
    """Processes of a training in this folder that are still there and no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, state = (path / "cmdline").read_text(), (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if "neo_nb.train.launch" in words and state != "Z" and str(os.getpid()) != path.name:
            found.append(int(path.name))
    return [pid for pid in found if (Path("/proc") / str(pid) / "cwd").resolve() == folder]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Each test's processes have its folder as theirs, and are gone when it ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    )
    yield
    for _ in range(100):
        if not ours(tmp_path.resolve()):
            return
        time.sleep(0.1)
    pytest.fail(f"processes outlived their training: {ours(tmp_path.resolve())}")


def test_two_processes_train_and_leave_a_run(tmp_path, capsys):
    asked = small(tmp_path, epochs=2)
    found = train_processes(**asked, processes=2)
    assert found["epochs"] == 2 and not found["interrupted"] and found["best"]["AP"] >= 0
    identity = load_state(tmp_path / "run/weights/last.pt")["identity"]
    assert (identity["processes"], identity["global batch"]) == (2, 4)
    assert len((tmp_path / "run/results.csv").read_text().splitlines()) == 3
    assert capsys.readouterr().out.count("epoch   1/2") == 1, "one process speaks, and it is heard here"


def test_bad_input_in_a_process_is_bad_input_here(tmp_path):
    with pytest.raises(InputError, match="no such model: 'rtdetr_nanno'"):
        train_processes(**small(tmp_path, model="rtdetr_nanno"), processes=2)


def test_a_loss_that_is_no_number_is_one_error(tmp_path):
    from neo_nb.train.update import NonFiniteLoss

    with pytest.raises(NonFiniteLoss, match="image ids"):
        train_processes(**small(tmp_path, lr=1e30, backbone_lr=1e30, max_grad_norm=0, warmup=0, epochs=4), processes=2)


def soon(folder: Path, act, beyond: int = 0) -> threading.Thread:
    """Do something as soon as a training has saved its state after more than so many updates."""

    def wait() -> None:
        last = folder / "run/weights/last.pt"
        for _ in range(18000):
            if last.exists() and load_state(last)["position"]["step"] > beyond:
                return act()
            time.sleep(0.1)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_process_that_is_killed_ends_the_training(tmp_path):
    def kill_one() -> None:
        rank = {p: Path(f"/proc/{p}/environ").read_bytes().split(b"\0") for p in ours(tmp_path.resolve())}
        os.kill(next(p for p, words in rank.items() if b"RANK=1" in words), signal.SIGKILL)

    soon(tmp_path, kill_one)
    with pytest.raises(ProcessFailed, match="process 2 of 2 was ended by SIGKILL, perhaps for lack of memory"):
        train_processes(**small(tmp_path, epochs=4000, checkpoint_steps=1), processes=2)


def test_a_signal_saves_and_a_resume_goes_on(tmp_path):
    asked, steps = small(tmp_path, epochs=4000, checkpoint_steps=1), 0
    for resume in (False, True):
        soon(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM), steps)
        assert train_processes(**asked, processes=2, resume=resume)["interrupted"]
        before, steps = steps, load_state(tmp_path / "run/weights/last.pt")["position"]["step"]
        assert steps > before


def test_no_process_outlives_the_one_that_wanted_it(tmp_path):
    asked = small(tmp_path, epochs=4000, checkpoint_steps=1)
    settings = asked["config"].model_dump_json()
    code = (
        "from neo_nb.train.config import TrainConfig\nfrom neo_nb.train.launch import train_processes\n"
        f"config = TrainConfig.model_validate_json({settings!r})\n"
        f"train_processes(config, {str(asked['run'])!r}, {str(asked['data'])!r}, 2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    soon(tmp_path, process.kill).join()
    process.wait(timeout=60)
    for _ in range(300):
        if not ours(tmp_path.resolve()):
            break
        time.sleep(0.1)
    assert not ours(tmp_path.resolve())
    assert load_state(tmp_path / "run/weights/last.pt")["position"]["step"] >= 1, "whole, and to be gone on with"
