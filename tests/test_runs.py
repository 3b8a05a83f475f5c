"""Runs that are copied, moved, resumed twice at once, and resumed with other settings. Real trainings, very small."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from command import neo

from neo_nb.runs.run import read_record

EPOCHS = 6
SMALL = [
    "--data",
    "cells",
    "--model",
    "rtdetr_nano",
    "--epochs",
    EPOCHS,
    "--passes-per-epoch",
    "1",
    "--batch-size",
    "2",
]
SMALL += ["--size", "64", "96", "--tracker", "none", "--target", "cpu", "--num-workers", "0", "--num-queries", "20"]
QUIET = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}


def state(folder: Path) -> dict:
    """Every file: its bytes, and when they were written."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files
    }


def epochs(run: Path) -> list[int]:
    """Those of results.csv."""
    path = run / "results.csv"
    return [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:]] if path.exists() else []


def place(folder: Path) -> Path:
    """A workspace with a data set of four images."""
    rng, images, boxes = np.random.default_rng(0), [], []
    (folder / "data_manifests").mkdir(parents=True)
    (folder / "data/cells/images").mkdir(parents=True)
    (folder / "settings.ini").write_text("[DEFAULT]\ndata = data\nreports = reports\n")
    for i in range(4):
        cv2.imwrite(str(folder / f"data/cells/images/{i}.jpg"), rng.integers(0, 255, (64, 96, 3), np.uint8))
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 96})
        boxes.append(
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [8 * i, 9, 30, 20], "area": 600, "iscrowd": 0}
        )
    whole = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cell"}]}
    (folder / "data/cells/a.json").write_text(json.dumps(whole))
    entry = "{annotations: a.json, images: images}"
    text = f"format: coco\nroot: cells\nclasses: [cell]\nsplits:\n  train: {entry}\n  val: {entry}\n"
    (folder / "data_manifests/cells.yaml").write_text(text)
    return folder


def call(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    return neo(*map(str, words), cwd=cwd, **QUIET)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A workspace whose only run was stopped after its first epoch; it began from the weights of another file there."""
    folder = place(tmp_path_factory.mktemp("once") / "workspace")
    from neo_nb.models.weights import save_weights
    from neo_nb.models.zoo import create_model

    model = create_model("rtdetr_nano", class_names=("cell",), num_queries=20)
    model.size = (64, 96)
    save_weights(model, folder / "start.safetensors")
    process = neo("train", *map(str, SMALL), "--weights", "start.safetensors", cwd=folder, wait=False, **QUIET)
    for _ in range(12000):
        if any(p.exists() for p in folder.glob("reports/*/weights/last.pt")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=600)
    [run] = folder.glob("reports/0*")
    process.stdout.seek(0)
    assert read_record(run)["status"] == "stopped" and 1 <= len(epochs(run)) < EPOCHS, process.stdout.read()
    return folder


def copy(workspace: Path, folder: Path) -> tuple[Path, Path]:
    """The workspace elsewhere, and its run. Times stay."""
    shutil.copytree(workspace, folder)
    [run] = folder.glob("reports/0*")
    return folder, run


def test_a_copied_run_goes_on_in_the_copy(interrupted, tmp_path):
    workspace, run = copy(interrupted, tmp_path / "workspace")
    twin = Path(shutil.copytree(run, tmp_path / "elsewhere" / run.name))
    before = state(workspace)
    done = call("train", "--resume", twin, cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert epochs(twin) == list(range(1, EPOCHS + 1)) and read_record(twin)["status"] == "done"
    assert state(workspace) == before, "the original was written to"
    for name in ("run.json", "metrics.json", "analysis.json"):
        assert str(workspace) not in (twin / name).read_text(), f"{name} names the workspace"
    assert "$WORKSPACE/start.safetensors" in (twin / "run.json").read_text()
    assert str(twin) not in (twin / "run.json").read_text() and "run" not in read_record(twin)["parameters"]


def test_a_moved_workspace_goes_on(interrupted, tmp_path):
    """The weights it began from have moved as well; an older record, which names its own place, is understood."""
    workspace, run = copy(interrupted, tmp_path / "moved" / "workspace")
    known = json.loads((run / "run.json").read_text())
    known["parameters"] |= {"run": "/once/workspace/reports/" + run.name}
    (run / "run.json").write_text(json.dumps(known))
    hidden = interrupted.rename(interrupted.with_name("hidden"))
    try:
        done = call("train", "--resume", "1", cwd=workspace)
    finally:
        hidden.rename(interrupted)
    assert done.returncode == 0, done.stderr
    assert epochs(run) == list(range(1, EPOCHS + 1)) and read_record(run)["status"] == "done"
    assert read_record(run)["parameters"]["weights"] == str(workspace / "start.safetensors")
    for path in (interrupted, workspace, "/once"):
        assert str(path) not in (run / "run.json").read_text(), "the record names a place"


def test_of_two_at_once_one_works_and_a_refusal_changes_nothing(interrupted, tmp_path):
    workspace, run = copy(interrupted, tmp_path / "workspace")
    both = [neo("train", "--resume", "1", cwd=workspace, wait=False, **QUIET) for _ in range(2)]
    status = [process.wait(timeout=900) for process in both]
    message = [process.stdout.seek(0) or process.stdout.read() for process in both]
    assert sorted(status) == [0, 2], message
    worked, refused = (status.index(code) for code in (0, 2))
    lines = message[refused].strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and run.name in lines[0], message[refused]
    assert f"process {both[worked].pid} on " in lines[0] and "is at work in this run" in lines[0]
    assert epochs(run) == list(range(1, EPOCHS + 1)) and read_record(run)["status"] == "done"
    assert len(list(run.glob("train*.ipynb"))) == 2
    # finished: with other settings it cannot go on, and is as finished as before
    before = state(run)
    done = call("train", "--resume", "1", "--lr", "0.5", cwd=workspace)
    assert done.returncode == 2 and "cannot go on with other settings: lr was" in done.stderr, done.stderr
    after = state(run)
    assert {k: v[0] for k, v in after.items() if k != ".lock"} == {k: v[0] for k, v in before.items() if k != ".lock"}
    assert read_record(run)["status"] == "done"


def test_the_lock_of_a_killed_process_does_not_hold(interrupted, tmp_path):
    _, run = copy(interrupted, tmp_path / "workspace")
    code = f"import time\nfrom pathlib import Path\nfrom neo_nb.runs.run import _alone\nwith _alone(Path({str(run)!r})):\n"
    code += "    print('held', flush=True)\n    time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with (run / ".lock").open("a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    refused = call("train", "--resume", run, cwd=tmp_path / "workspace")
    assert refused.returncode == 2 and f"process {process.pid} on {os.uname().nodename}" in refused.stderr
    process.kill()
    process.wait()
    with (run / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
