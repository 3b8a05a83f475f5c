"""What a machine can do, from the shell: measured here, built ahead for elsewhere, gone on with after a kill."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from command import neo as command
from test_runs import QUIET

from neo_nb.cli.main import main
from neo_nb.deploy.tensorrt_build import import_builder
from neo_nb.models.weights import save_weights
from neo_nb.models.zoo import create_model
from neo_nb.recipes.target_page import compare_targets, read_targets
from neo_nb.runs.run import read_record

SCENES = """format: scenes
root: scenes
classes: [person, head]
size: [96, 160]
splits:
  train: {num_images: 4, seed: 0}
  val: {num_images: 4, seed: 1}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    "A workspace with four drawn images, and weights that find persons everywhere, which files can be held to."
    folder = tmp_path_factory.mktemp("targets") / "workspace"
    (folder / "data_manifests").mkdir(parents=True)
    (folder / "settings.ini").write_text("[DEFAULT]\ndata = data\nreports = reports\n")
    (folder / "data_manifests/tiny.yaml").write_text(SCENES)
    torch.manual_seed(0)
    net = create_model("rtdetr_nano", class_names=("person", "head"), num_queries=42)
    for head in (net.decoder.enc_score, *net.decoder.score):
        torch.nn.init.normal_(head.weight, 0, 0.2)
        head.bias.data = torch.tensor([0.0, -9.0])
    net.size = (32, 64)
    save_weights(net, folder / "net.safetensors")
    return folder


def here(workspace: Path, monkeypatch, capsys, *words) -> tuple[int, str, str]:
    "The same in this process, which has imported everything: exit status, standard output, standard error."
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("TRACKIO_DIR", str(workspace / "trackio"))
    for name in [name for name in os.environ if name.startswith("NEO_")]:
        monkeypatch.delenv(name)
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def kept(workspace: Path, target: str) -> dict:
    return json.loads((workspace / f"reports/targets/{target}/target.json").read_text())


def test_a_cpu_is_measured_and_a_kill_costs_only_the_step_it_fell_in(workspace, monkeypatch, capsys):
    given = ("report", "--target", "cpu", "--data", "tiny", "--minutes", "0.05")
    process = command(*given, wait=False, cwd=workspace, **QUIET)
    end = time.monotonic() + 300
    while not list(workspace.glob("reports/0001-*/weights/last.pt")) and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # which the kernel heeds: it saves and ends
    assert process.wait(120) == 75
    assert kept(workspace, "cpu")["steps"]["train"]["status"] == "running"
    status, out, err = here(workspace, monkeypatch, capsys, *given)
    found = kept(workspace, "cpu")
    states = {name: step["status"] for name, step in found["steps"].items()}
    onnx = states.pop("onnx")
    assert states == {"train": "done", "evaluate": "done", "benchmark": "done"} and str(workspace) not in json.dumps(
        found
    ), err
    if onnx == "failed":  # a training of seconds may find nothing: its file cannot be proven, and that is said
        assert status == 1 and "failed: ONNX in fp32; the same command tries again" in out
        assert "nothing was compared" in found["steps"]["onnx"]["error"]
    else:
        assert (status, onnx) == (0, "done"), err
    assert found["at_hand"] and found["remains"] == []
    assert found["steps"]["train"]["found"]["images_per_second"] > 0
    timed = found["steps"]["benchmark"]["found"]["stages"]
    assert {row["stage"] for row in timed} >= {"preprocess", "inference", "whole"} and all(
        row["p50"] > 0 for row in timed
    )
    [train] = workspace.glob("reports/*-train-*")
    assert read_record(train)["status"] == "done" and (train / "train-2.ipynb").is_file(), "it went on in its run"
    assert (workspace / "reports/targets/cpu/stages.png").is_file()


def test_a_step_that_fails_is_shown_and_the_others_are_done(workspace, monkeypatch, capsys):
    silent = create_model("rtdetr_nano", class_names=("person", "head"), num_queries=20)  # finds nothing above .05
    silent.size = (32, 64)
    save_weights(silent, workspace / "silent.safetensors")
    given = ("report", "--target", "cpu", "--data", "tiny", "--weights", "silent.safetensors")
    status, out, err = here(workspace, monkeypatch, capsys, *given, "--fresh")
    found = kept(workspace, "cpu")["steps"]
    assert {name: step["status"] for name, step in found.items()} == {
        "evaluate": "done", "onnx": "failed", "benchmark": "done"
    }, err  # fmt: skip
    assert status == 1 and "failed: ONNX in fp32; the same command tries again" in out
    assert "nothing was compared" in found["onnx"]["error"] and str(workspace) not in json.dumps(found)


def test_for_a_card_elsewhere_files_are_built_ahead_and_nothing_is_measured(workspace, monkeypatch, capsys):
    given = ("report", "--target", "t4", "--data", "tiny", "--weights", "net.safetensors")
    status, _, err = here(workspace, monkeypatch, capsys, *given, "--json")
    assert status == 0, err
    found, runs = kept(workspace, "t4"), sorted(p.name for p in workspace.glob("reports/0*"))
    rtx = import_builder("tensorrt_rtx") is not None
    assert list(found["steps"]) == ["onnx", "onnx_fp16", *["engine"] * rtx] and not found["at_hand"]
    assert all(step["ahead"] and step["status"] == "done" for step in found["steps"].values())
    if rtx:
        engine = found["steps"]["engine"]["found"]
        assert engine["for"] == "t4, SM75" and engine["verdict"] == "not run here"
        beside = json.loads((workspace / "reports/targets/t4" / engine["beside"]).read_text())
        file = workspace / "reports" / found["steps"]["onnx_fp16"]["run"] / engine["file"]
        assert beside["sha256"] == engine["sha256"] and file.stat().st_size == beside["size_bytes"]
    assert found["command"] == "neo report --target t4 --data tiny --weights net.safetensors"
    assert any("milliseconds" in row["what"] for row in found["remains"])
    row = compare_targets(read_targets(workspace / "reports")).set_index("target").loc["t4"]
    assert row["ONNX, ms"] == "remains" and row["AP"] == "remains" and row["ONNX fp16"] == "proven"
    page = (workspace / "reports/targets/index.html").read_text()
    assert "NVIDIA T4" in page and "neo report --target t4" in page and "remains" in page
    assert here(workspace, monkeypatch, capsys, *given)[0] == 0
    assert sorted(p.name for p in workspace.glob("reports/0*")) == runs, "what was done is not done again"


def test_what_cannot_be_is_refused_before_anything_starts(workspace, monkeypatch, capsys):
    before = sorted(workspace.glob("reports/0*"))
    shutil.copy(workspace / "net.safetensors", workspace / "net.onnx")
    for words, message in (
        (("--target", "t5"), "did you mean t4"),
        (("--target", "t4", "--data", "tiny", "--weights", "net.onnx"), "a file that only runs"),
        (("--target", "t4", "--weights", "none.safetensors"), "no such file of weights"),
        (("--target", "cpu", "--minutes", "0"), "minutes are above 0"),
        (("--target", "cpu", "--data", "tinny"), "did you mean tiny"),
    ):
        status, _, err = here(workspace, monkeypatch, capsys, "report", *words)
        assert status == 2 and message in err, err
    assert sorted(workspace.glob("reports/0*")) == before


def test_runtimes_of_the_same_weights_find_the_same(workspace, monkeypatch, capsys):
    words = (
        "--model",
        "rtdetr_nano",
        "--sizes",
        "64",
        "96",
        "--rounds",
        "3",
        "--runtimes",
        "transformers",
        "onnxruntime",
    )
    asked = ("benchmark", "--against", "runtimes", *words, "--keep", "--json")
    status, out, err = here(workspace, monkeypatch, capsys, *asked)
    assert status == 0, err
    run = Path(json.loads(out)["run"])
    [case] = json.loads((run / "runtimes.json").read_text())["cases"]
    same = case["same"]["onnxruntime"]
    assert same["same"] and same["detections"] > 100 and same["score_difference"] < 1e-3
    assert {name: len(rows) for name, rows in case["times"].items()} == {"transformers": 3, "onnxruntime": 3}
    assert all(own["peak"] > own["before"] > 0 for own in case["memory"].values())
    assert "All find what transformers finds" in (run / "runtimes.md").read_text()
    assert (workspace / "reports/targets/cpu/runtimes.png").is_file()
