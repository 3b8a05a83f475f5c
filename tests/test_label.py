"""Labels by a model: nothing that exists is touched, a killed call goes on, and a person's word comes back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from command import ROOT
from command import neo as command
from test_cli import coco, neo, refused, workplace  # noqa: F401  fixtures

from neo_nb.cli.label_command import review
from neo_nb.data.manifest import load_dataset
from neo_nb.data.manifest_file import load_manifest
from neo_nb.models import create_model
from neo_nb.models.weights import save_weights
from neo_nb.review.fiftyone_db import database_problem
from neo_nb.runs import label as labels
from neo_nb.runs.run import read_record


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    "A workspace with a detector that believes in something, and photos: one is cut off, one is no image."
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\ndata = data\nreports = reports\n")
    monkeypatch.chdir(tmp_path)
    for key in ("NEO_REPORTS", "NEO_DATA"):
        monkeypatch.delenv(key, raising=False)
    torch.manual_seed(2)  # whose scores lie about .45
    model = create_model("rtdetr_nano", class_names=("cell", "dust"), num_queries=20)
    for head in (model.decoder.enc_score, *model.decoder.score):
        torch.nn.init.normal_(head.weight, std=0.3)
        torch.nn.init.zeros_(head.bias)
    save_weights(model, tmp_path / "w.safetensors", size=(64, 96), metrics={"threshold": 0.45})
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(10):
        image = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((15, 20, 1))).astype(np.uint8)
        cv2.imwrite(str(tmp_path / "photos" / f"{number}.png"), image)
    whole = (tmp_path / "photos" / "9.png").read_bytes()
    (tmp_path / "photos" / "9.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "photos" / "note.jpg").write_text("no image")
    return tmp_path


def call(*words: object, capsys=None) -> tuple[int, str, str]:
    from neo_nb.cli.main import main

    capsys.readouterr()
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def test_a_folder_becomes_a_manifest_that_says_whose_labels_they_are(place, capsys, caplog):
    status, out, err = call("label", "w.safetensors", "photos", "--name", "night", capsys=capsys)
    assert status == 0, err
    manifest = load_manifest("night")
    by = manifest.labelled_by
    assert (by.model, by.threshold, by.images, by.unreadable, by.reviewed) == ("rtdetr_nano", 0.45, 9, 2, 0)
    assert by.sha256 == labels.detector_digest(place / "w.safetensors") and len(by.sha256) == 64
    table = load_dataset("night", extras=True)
    assert (len(table), len(table.labels), sum(by.scores)) == (9, by.boxes, by.boxes) and by.boxes > 9
    assert min(table.extras["score"]) >= 0.45
    assert (
        "its labels are a model's (rtdetr_nano" in caplog.text and "9 of its 9 images were not reviewed" in caplog.text
    )
    (run,) = (place / "reports").glob("0001-*")
    page = (run / "report.html").read_text()
    assert read_record(run)["command"] == "label" and "Least certain" in page and "the image is truncated" in page
    assert not (place / "reports" / ".label").exists()
    # a second call, other names, and what is none of ours
    before = {path: path.read_bytes() for path in (place / "data_manifests").rglob("*") if path.is_file()}
    refused(call("label", "w.safetensors", "photos", "--name", "night", capsys=capsys), "that name already")
    refused(call("label", "w.safetensors", "nowhere", capsys=capsys), "nowhere")
    refused(call("label", "w.safetensors", "photos", "--name", "a/b", capsys=capsys), "cannot be a file's name")
    assert before == {path: path.read_bytes() for path in before} and len(list(place.glob("reports/0*"))) == 1


def test_labels_that_exist_stay(place, capsys):
    file = coco(place / "own")
    before = (place / "own" / "a.json").read_bytes()
    refused(
        call("label", "w.safetensors", file, capsys=capsys), "1 of 1 images have labels already", "--skip-labelled"
    )
    refused(call("label", "w.safetensors", file, "--split", "val", capsys=capsys), "measured on")
    refused(call("label", "w.safetensors", file, "--skip-labelled", capsys=capsys), "no image to label", "1: labelled")
    refused(call("label", "w.safetensors", place / "own", capsys=capsys), "there are labels already")
    assert (place / "own" / "a.json").read_bytes() == before and not list((place / "data_manifests").iterdir())


KILLED = """
import os, sys
from neo_nb.runs import label
label.BLOCK = 3
done = label._label_block
def block(*words):
    if words[2].start == 6:
        os._exit(9)  # as kill -9: nothing is told
    return done(*words)
label._label_block = block
from neo_nb.cli.main import main
main(["label", "w.safetensors", "photos", "--name", "night"])
"""


def test_a_killed_call_goes_on(place, capsys, monkeypatch):
    known = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    ended = subprocess.run([sys.executable, "-c", KILLED], cwd=place, env=known, capture_output=True, text=True)
    assert ended.returncode == 9, ended.stderr
    assert not list((place / "data_manifests").rglob("*")) and not list(place.glob("reports/0*"))
    (aside,) = (place / "reports" / ".label").iterdir()
    assert sorted(path.name for path in aside.iterdir()) == ["00000000.json", "00000003.json"]
    asked, done = [], labels._label_block
    monkeypatch.setattr(labels, "BLOCK", 3)
    monkeypatch.setattr(labels, "_label_block", lambda *words: (asked.append(words[2].start), done(*words))[1])
    status, _, err = call("label", "w.safetensors", "photos", "--name", "night", capsys=capsys)
    assert (status, asked) == (0, [6, 9]), err
    assert load_manifest("night").labelled_by.images == 9


@pytest.mark.skipif(database_problem() is not None, reason=f"FiftyOne: {database_problem()}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # FiftyOne's own
def test_a_person_reviews_and_the_manifest_says_so(place, capsys, fo, monkeypatch):
    monkeypatch.setattr("neo_nb.review.fiftyone_db.open_database", lambda: fo)
    assert call("label", "w.safetensors", "photos", "--name", "night", capsys=capsys)[0] == 0
    before = load_dataset("night", extras=True)
    assert review("night").data["views"]["not reviewed"] == 9
    first, second, *others = list(fo.load_dataset("labels of night"))
    first.labels.detections[0].tags.append("label_error")
    first.labels.detections[1].bounding_box = [0.25, 0.25, 0.5, 0.5]
    second.tags.append("label_error")
    for sample in (first, second, *others):
        sample.tags.append("reviewed")
        sample.save()
    found = review("night", pull=True).data
    assert (found["boxes removed"], found["boxes changed"], found["images left out"], found["reviewed"]) == (
        1,
        1,
        1,
        8,
    )
    after = load_dataset("night", extras=True)
    assert len(after) == 8 and np.diff(after.offsets)[0] == np.diff(before.offsets)[0] - 1
    assert list(after.extras["score"]).count(None) == 1
    by = load_manifest("night").labelled_by
    assert by.reviewed == by.images == 8 and by.corrections["boxes changed"] == 1
    again = review("night", pull=True).data  # nothing new, and nothing is counted twice
    assert again["reviewed"] == 8 and load_manifest("night").labelled_by.corrections == by.corrections
    assert len(list((place / "data_manifests" / "night").iterdir())) == 1  # the labels before are gone


def test_a_training_on_them_says_so_and_records_it(place, capsys):
    assert call("label", "w.safetensors", "photos", "--name", "night", capsys=capsys)[0] == 0
    assert call("data", "split", "night", "--val", "0.3", capsys=capsys)[0] == 0
    words = (
        "train --data night --model rtdetr_nano --epochs 1 --size 64 96 --num-queries 30 --batch-size 2 --target cpu"
    )
    ended = command(*words.split(), "--tracker", "none", "--pretrained", "none", cwd=place, OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "its labels are a model's" in ended.stderr
    (run,) = place.glob("reports/*-train-*")
    assert "9 of its 9 images were not reviewed" in json.loads((run / "run.json").read_text())["data"]["labels"]
