"""What version 0.1.0 wrote still opens: manifest, run, weights, training state. The tensors in it are 0, to pack small."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from command import neo
from test_runs import QUIET

from neo_nb.base.detections import load_detections
from neo_nb.data.manifest import load_dataset
from neo_nb.deploy.detector import load_detector
from neo_nb.models.weights import load_model, load_weights
from neo_nb.models.zoo import create_model
from neo_nb.train.checkpoint import load_state


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """The workspace, with one finished run of two epochs."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "fixtures" / "workspace-0.1.0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def run_of(folder: Path) -> Path:
    return next(folder.glob("reports/0001-*"))


def test_the_files_are_read(old, monkeypatch):
    monkeypatch.setenv("NEO_ROOT", str(old))
    monkeypatch.setenv("NEO_DATA", str(old / "data"))
    run = run_of(old)
    table = load_dataset("cells", "val")
    assert len(table) == 4 and load_detections(run / "detections.npz").num_images == 4
    model, record = load_model(run / "weights/best.safetensors")
    assert (model.num_queries, model.size, record["format"]) == (20, (64, 96), 2)
    assert load_detector(run).predict(table, progress=False).num_images == 4
    report = load_weights(create_model("rtdetr_nano", class_names=("cell",)), run)
    assert report.placed > 300 and not report.fresh
    state = load_state(run / "weights/last.pt")
    assert state["identity"]["passes_per_epoch"] == 1 and isinstance(state["model"], dict)
    assert all(torch.isfinite(x).all() for x in state["model"].values())


def test_the_run_is_resumed_evaluated_and_compared_from_the_shell(old):
    run = run_of(old)
    before = (run / "results.csv").read_text()
    for words in (("train", "--resume", "0001"), ("evaluate", "0001"), ("compare", "0001", "0002")):
        ended = neo(*words, cwd=old, **QUIET)
        assert ended.returncode == 0, (words, ended.stderr[-3000:])
    assert (run / "results.csv").read_text() == before, "both epochs were there"
    config = json.loads((run / "run.json").read_text())["config"]
    assert (config["grad_accum_steps"], config["max_grad_norm"], config["final_lr_fraction"]) == (2, 0.5, 0.05)
    assert config["monitor"] == "F1"
