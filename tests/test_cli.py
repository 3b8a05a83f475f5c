"""The command line: exit statuses, one line for a mistake, nothing half-written.

Most calls are in-process (`main([...])`), since a process that imports torch costs seconds."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from neo_nb.cli.main import COMMANDS, main
from neo_nb.runs.run import check_parameters, execute, new_run, read_record

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    "The repository's manifests, but reports, data and tracking in a folder of the test's own."
    monkeypatch.chdir(ROOT)
    for key in ("reports", "data"):
        monkeypatch.setenv(f"NEO_{key.upper()}", str(tmp_path / key))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path


@pytest.fixture
def neo(capsys, workplace):
    "Exit status, standard output, standard error."

    def call(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def runs(workplace):
    "What lies in the reports folder, numbered or not."
    return sorted(p.name for p in (workplace / "reports").glob("*") if not p.name.startswith("."))


def refused(answer, *words):
    "Exit status 2, nothing on standard output, one line on standard error with these words."
    status, out, err = answer
    lines = [line for line in err.splitlines() if line.strip()]
    assert (status, out, len(lines)) == (2, "", 1), f"status {status}, out {out!r}, err {err!r}"
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


def coco(folder, **change):
    "A data set of one image in COCO's format, with a manifest; returns the manifest's path."
    import cv2
    import numpy as np

    (folder / "images").mkdir(parents=True)
    cv2.imwrite(str(folder / "images" / "a.jpg"), np.random.default_rng(0).integers(0, 255, (90, 160, 3), np.uint8))
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0} | change
    whole = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 90, "width": 160}],
        "annotations": [box],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (folder / "a.json").write_text(json.dumps(whole))
    entry = "{annotations: a.json, images: images}"
    text = f"format: coco\nroot: {folder}\nclasses: [cell]\nsplits:\n  train: {entry}\n  val: {entry}\n"
    (folder / "one.yaml").write_text(text)
    return folder / "one.yaml"


# what is typed


@pytest.mark.parametrize(
    "line, words",
    [
        ("trian", ["no such command: 'trian'", "train"]),
        ("data chek x", ["no such command", "data check"]),
        ("train --data bcccd", ["no such dataset: 'bcccd'", "bccd"]),
        ("train --target rtx4000", ["no such target: 'rtx4000'", "rtx4000_ada"]),
        ("train --gpus none", ["--gpus is a number above 0 or all, found 'none'"]),
        ("train --gpus 2 --processes 2", ["--gpus and --processes say the same"]),
        ("train --processes 0", ["--processes is a number above 0"]),
        ("predict nothing.onnx . --precision half", ["--precision", "half", "fp16"]),
        ("train --learning-rate 3", ["no such flag: --learning-rate"]),
        ("train --epoch 3", ["no such flag: --epoch", "--epochs"]),
        ("train --lr fast", ["--lr", "fast"]),
        ("train --data scenes --lr -1", ["lr"]),
        ("train --schedule cosin", ["--schedule", "cosine"]),
        ("train --resume 7", ["no such run: '7'"]),
        ("evaluate", ["missing: detector"]),
        ("evaluate 12", ["no such run: '12'"]),
        ("evaluate nothing.onnx", ["nothing.onnx", "no such file"]),
        ("export 12", ["no such run"]),
        ("predict 12 .", ["no such run"]),
        ("data check coco", ["no such dataset: 'coco'", "coco2017"]),
        ("data fetch", ["missing: name"]),
        ("lab --port 99999999", ["a port is 1..65535"]),
    ],
)
def test_a_mistake_is_one_line_with_what_was_meant(neo, workplace, line, words):
    refused(neo(*line.split()), *words)
    assert runs(workplace) == []


@pytest.mark.parametrize("command", ["evaluate", "predict", "mine", "export", "benchmark", "errors", "logo", "train"])
def test_every_command_that_runs_a_detector_chooses_its_device(neo, workplace, command):
    from neo_nb.models.weights import save_weights
    from neo_nb.models.zoo import create_model

    status, out, _ = neo(command, "--help")
    assert status == 0 and "--device" in out and "--precision" in out
    model = create_model("rtdetr_nano", class_names=("cell",))
    model.size = (90, 160)
    save_weights(model, workplace / "w.safetensors")
    manifest, run = coco(workplace / "one"), workplace / "run"
    run.mkdir()
    words = {
        "predict": [workplace / "w.safetensors", manifest.parent / "images"],
        "errors": [run],
        "logo": [],
        "train": [],
    }
    refused(neo(command, *words.get(command, [workplace / "w.safetensors"]), "--device", "gpu"), "gpu", "cuda")
    assert runs(workplace) == []


def test_a_device_that_is_not_here_is_never_replaced(neo, workplace):
    import torch

    from neo_nb.models.weights import save_weights
    from neo_nb.models.zoo import create_model

    model = create_model("rtdetr_nano", class_names=("cell",))
    model.size = (90, 160)
    save_weights(model, workplace / "w.safetensors")
    images = coco(workplace / "one").parent / "images"
    device, words = ("cuda:99", "no such GPU: cuda:99") if torch.cuda.is_available() else ("cuda", "no GPU that torch")
    refused(neo("predict", workplace / "w.safetensors", images, "--device", device), words)
    refused(
        neo("predict", workplace / "w.safetensors", images, "--device", "cpu", "--precision", "fp16"), "needs a GPU"
    )
    assert runs(workplace) == []
    status, out, _ = neo(
        "predict", workplace / "w.safetensors", images, "--precision", "bf16", "--device", "cpu", "--json"
    )
    found = json.loads(out)
    assert status == 0 and (found["device"], found["precision"]) == ("cpu", "bf16")


def test_help_names_every_command_and_imports_nothing_heavy():
    code = "import sys; from neo_nb.cli.main import main; s = main(['--help']); print(sorted(sys.modules), file=sys.stderr); sys.exit(s)"
    message = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert message.returncode == 0 and all(name in message.stdout for name in COMMANDS)
    assert not any(f"'{name}'" in message.stderr for name in ("torch", "numpy", "cv2", "pandas", "papermill"))


def test_every_command_has_help(neo):
    for name in COMMANDS:
        status, out, _ = neo(*name.split(), "--help")
        assert status == 0 and f"usage: neo {name}" in out, name


def test_models_are_a_table(neo):
    status, out, _ = neo("models", "rtdetr_nano", "detr_r50", "--size", 320, 320, "--json")
    rows = {row["model"]: row for row in json.loads(out)["models"]}
    assert status == 0 and list(rows) == ["rtdetr_nano", "detr_r50"]
    assert (rows["detr_r50"]["weights"], rows["detr_r50"]["licence"]) == ("facebook/detr-resnet-50", "Apache-2.0")
    assert (rows["detr_r50"]["COCO AP"], rows["rtdetr_nano"]["COCO AP"]) == (42.0, "")
    assert 1 < rows["rtdetr_nano"]["GFLOPs"] < 3
    refused(neo("models", "yolo11n"), "no model is called 'yolo11n'")


def test_weights_of_a_backbone_are_checked_before_a_run_begins(neo, workplace):
    refused(neo("train", "--model", "rtdetr_nano", "--pretrained", "hub"), "pretrained is for timm's backbones")
    refused(
        neo("train", "--model", "rtdetr_timm", "--pretrained", "package"), "no package carries weights of resnet50d"
    )
    refused(neo("train", "--model", "rtdetr_timm", "--pretrained", "none.pth"), "no such file", "none.pth")
    assert not runs(workplace)


def test_json_is_alone_on_standard_output(neo):
    status, out, _ = neo("data", "list", "--json")
    assert status == 0
    assert {"scenes", "bccd"} <= {row["name"] for row in json.loads(out)["datasets"]}


def test_doctor_says_what_is_lacking(neo):
    status, out, _ = neo("doctor", "--json")
    message = json.loads(out)
    assert status == (0 if message["ok"] else 1)
    assert {"python", "torch", "gpu", "onnxruntime", "packages"} <= {f["name"] for f in message["findings"]}


def test_debug_shows_the_traceback(neo):
    status, _, err = neo("train", "--data", "bcccd", "--debug")
    assert status == 2 and "Traceback" in err and err.rstrip().splitlines()[-1].startswith("error: ")


# servers


@pytest.mark.parametrize("command", ["lab", "dashboard"])
def test_a_port_in_use_is_said_before_anything_starts(neo, command):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        refused(neo(command, "--port", port), f"port {port} is in use", "pass --port")


# files


def test_a_pickle_posing_as_a_checkpoint_is_never_executed(neo, workplace):
    import pickle

    trap = workplace / "trap"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    image = coco(workplace / "one").parent / "images"
    for name in ("best.safetensors", "model.onnx"):
        (workplace / name).write_bytes(pickle.dumps(Trap()))
        refused(neo("predict", workplace / name, image), name)
        assert not trap.exists() and runs(workplace) == []


def test_a_checkpoint_that_is_cut_off(neo, workplace):
    from neo_nb.models.weights import save_weights
    from neo_nb.models.zoo import create_model

    model = create_model("rtdetr_nano", class_names=("cell",))
    model.size = (90, 160)
    images = coco(workplace / "one").parent / "images"
    save_weights(model, workplace / "w.safetensors")
    data = (workplace / "w.safetensors").read_bytes()
    (workplace / "w.safetensors").write_bytes(data[: len(data) // 2])
    refused(neo("predict", workplace / "w.safetensors", images), "w.safetensors")
    (workplace / "w.safetensors").write_bytes(data)
    status, out, _ = neo("predict", workplace / "w.safetensors", images, "--threshold", "0.5")
    assert status == 0 and out.splitlines()[-1].startswith("run: "), "the last line is where to look"
    (images / "a.jpg").write_bytes((images / "a.jpg").read_bytes()[:400])
    before = runs(workplace)
    refused(neo("predict", workplace / "w.safetensors", images), "a.jpg")
    assert runs(workplace) == before, "nothing half-written"


def in_kernel(neo, workplace, manifest, *words):
    "A training that bad input must end before it has made anything."
    answer = neo("train", "--data", manifest, "--epochs", "1", "--tracker", "none", "--model", "rtdetr_nano", *words)
    lines = [line for line in answer[2].splitlines() if line.startswith("error: ")]
    assert answer[0] == 2 and len(lines) == 1, answer
    assert answer[2].splitlines()[-1] == lines[0] and "Traceback" not in answer[2]
    assert runs(workplace) == [], "nothing half-written"
    return lines[0]


def test_bad_input_in_the_kernel_is_one_line_here(neo, workplace):
    manifest = coco(workplace / "nan", bbox=[10, float("nan"), 40, 30])
    assert "a.json" in in_kernel(neo, workplace, manifest)


def test_an_unknown_model_is_named_with_the_nearest(neo, workplace):
    line = in_kernel(neo, workplace, coco(workplace / "one"), "--model", "rtdetr_nanno")
    assert "no such model: 'rtdetr_nanno'" in line and "rtdetr_nano" in line


def test_a_full_disk_leaves_nothing(neo, workplace, monkeypatch):
    disk = workplace / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs can be mounted by root only")
    try:
        images = coco(workplace / "one").parent / "images"
        from neo_nb.models.weights import save_weights
        from neo_nb.models.zoo import create_model

        model = create_model("rtdetr_nano", class_names=("cell",))
        model.size = (90, 160)
        save_weights(model, workplace / "w.safetensors")
        monkeypatch.setenv("NEO_REPORTS", str(disk / "reports"))
        (disk / "filler").write_bytes(bytes(56 * 1024))
        refused(neo("predict", workplace / "w.safetensors", images, "--threshold", "0"), "the disk is full")
        assert [p.name for p in (disk / "reports").glob("[!.]*")] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# run notebooks


@pytest.mark.parametrize("path", sorted((ROOT / "nbs" / "runs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_run_notebook_has_one_parameters_cell_and_exports_nothing(path):
    cells = nbformat.read(path, 4).cells
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    assert not any("#| export" in cell.source or "#|export" in cell.source for cell in cells)
    assert "skip_exec: true" in cells[0].source


def test_the_training_notebook_has_every_setting_as_a_parameter():
    from neo_nb.train.config import TrainConfig

    settings = {name: None for name in TrainConfig.model_fields}
    assert check_parameters(ROOT / "nbs" / "runs" / "train.ipynb", settings) == settings
    cell = next(
        c for c in nbformat.read(ROOT / "nbs/runs/train.ipynb", 4).cells if "parameters" in c.metadata.get("tags", [])
    )
    for name, setting in TrainConfig.model_fields.items():
        line = next(line for line in cell.source.splitlines() if line.startswith(f"{name} = "))
        assert line.endswith(f"# {setting.description}"), f"{name}: the notebook says something else than the setting"


def notebook(folder, *cells):
    "A small notebook with a parameters cell."
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}}
    )
    nb.cells = [nbformat.v4.new_code_cell("run = None", metadata={"tags": ["parameters"]})]
    nb.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nb, folder / "small.ipynb")
    return folder / "small.ipynb"


def test_ctrl_c_reaches_the_kernel_and_the_exit_status_says_so(workplace):
    path = notebook(workplace, "import pathlib, time\npathlib.Path(run, 'ready').touch()\ntime.sleep(60)")
    run = new_run(workplace / "reports")
    code = (
        "import sys\nfrom neo_nb.cli.main import _failed\nfrom neo_nb.runs.run import execute\n"
        f"try: execute({str(path)!r}, {str(run)!r})\nexcept BaseException as error: sys.exit(_failed(error))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for _ in range(600):
        if (run / "ready").exists():
            break
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "stopped by SIGINT" in err.splitlines()[-1]
    assert read_record(run)["status"] == "stopped"


def test_a_kernel_dies_with_its_parent(workplace):
    path = notebook(
        workplace, "import os, pathlib, time\npathlib.Path(run, 'pid').write_text(str(os.getpid()))\ntime.sleep(90)"
    )
    run = new_run(workplace / "reports")
    code = f"from neo_nb.runs.run import execute\nexecute({str(path)!r}, {str(run)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, cwd=ROOT)
    for _ in range(600):
        if (run / "pid").exists() and (run / "pid").read_text():
            break
        time.sleep(0.05)
    kernel = int((run / "pid").read_text())
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{kernel}").exists() or "Z" in Path(f"/proc/{kernel}/stat").read_text().split(")")[1][:3]:
            return
        time.sleep(0.1)
    os.kill(kernel, signal.SIGKILL)
    pytest.fail("the kernel outlived the process that started it")


def test_a_resumed_run_keeps_its_first_notebook(workplace):
    import io

    path = notebook(workplace, "print('done')")
    run = new_run(workplace / "reports")
    first, second = (execute(path, run, screen=io.StringIO(), new=new) for new in (True, False))
    assert (first.name, second.name) == ("small.ipynb", "small-2.ipynb")
