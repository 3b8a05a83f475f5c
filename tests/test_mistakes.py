"""What a newcomer types wrong: one line, exit status 2, nothing left behind, and no waiting for torch where none is needed."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from neo_nb.base.workspace import init_workspace
from neo_nb.cli.main import main

ROOT = Path(__file__).resolve().parent.parent

EARLY = {  # Said before torch is loaded
    "trian --data mine": "did you mean train?",
    "data imprt photos mine": "did you mean data import",
    "train --data mien": "no such dataset: 'mien'",
    "train --data scenes --imgsz 640": "--imgsz; it is called --size here",
    "train --data scenes --batch 16": "it is called --batch-size here",
    "train --data scenes --size 1920x1080": "which of them is the height",
    "train --data scenes --epochs 0": "epochs",
    "train --data scenes --epochs ten": "--epochs",
    "train --data scenes --lr -1": "lr",
    "train --data scenes --minutes -5": "minutes",
    "train --data scenes --device gpu": "auto, cpu, cuda or cuda:N",
    "train --data scenes --target rtx4000": "no such target: 'rtx4000'",
    "train --data scenes --weights yolo11n.pt": "yolo11n.pt",
    "train --resume 99": "'99'",
    "train mine": "not expected here: 'mine'",
    "predict": "missing: detector",
    "evaluate 99": "'99'",
    "compare 1": "missing: second",
    "dashboard --port 99999": "a port is 1..65535",
}
LATER = {  # Torch has to say, or comes along
    "predict last photo.jpg": "photo.jpg",
    "data import nowhere mine": "no such file or folder",
    "data import photos my/photos": "cannot be a file's name",
    "data import empty mine": "empty",
    "data import photos scenes": "a data set of that name already",
    "data split scenes --val 1.5": "1.5",
    "data show scense": "did you mean scenes",
    "train --data scenes --model yolo11n": "no such model: 'yolo11n'",
    "train --data scenes --model rtdetr_nano --device cuda:7": "cuda:7",
    "train --data scenes --model rtdetr_nano --loss focal": "loss",
    "export weights.safetensors --batch many": "'many'",
    "predict weights.safetensors photos --threshold 30": "a threshold is in 0..1, found 30",
    "predict weights.safetensors video.mp4": "video.mp4",
    "predict weights.safetensors none.mp4": "none.mp4: no such video",
    "predict weights.safetensors video.mp4 photos": "one video at a time",
    "benchmark weights.safetensors --batches 0": "are above 0",
    "benchmark weights.safetensors --photo 10 10": "a photo of 10 x 10",
    "serve nothing.onnx": "nothing.onnx: no such file",
    "serve weights.safetensors --host 0.0.0.0": "without a token",
    "serve weights.safetensors --queue-size 0": "are above 0",
    "export weights.safetensors --to tensorrt --target t5": "no such target: 't5'",
    "export weights.safetensors --precision bf16": "not in bf16",
}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    for key in [key for key in os.environ if key.startswith("NEO_")]:
        monkeypatch.delenv(key)
    init_workspace(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    for name in ("photos", "empty"):
        Path(name).mkdir()
    cv2.imwrite("photos/a.jpg", np.zeros((90, 160, 3), np.uint8))
    Path("video.mp4").write_bytes(b"\0" * 99)
    Path("weights.safetensors").write_bytes(b"\0" * 99)
    return tmp_path / "mine"


def contents(folder: Path) -> dict[str, bytes]:
    "What lies there, besides locks and what a data set's reading keeps."
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("words", [*EARLY, *LATER])
def test_a_mistake_is_one_line(words, workspace, capsys):
    before = contents(workspace)
    status = main(words.split())
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert (status, out, len(lines)) == (2, "", 1), f"status {status}, out {out!r}, err {err!r}"
    assert lines[0].startswith("error: ") and (EARLY | LATER)[words] in lines[0], lines[0]
    assert contents(workspace) == before, "something was left behind"


def test_most_of_them_need_no_torch(workspace):
    code = "import sys\nfrom neo_nb.cli.main import main\n"
    code += "for words in sys.argv[1:]:\n    main(words.split())\n    print(words * ('torch' in sys.modules))\n"
    command = [sys.executable, "-c", code, *EARLY]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert not done.stdout.strip(), f"torch was loaded for: {done.stdout.split(chr(10))[0]} {done.stderr[-300:]}"
    assert len(done.stderr.strip().splitlines()) == len(EARLY)
