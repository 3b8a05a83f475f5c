"""Kinds of error, confusion, costs and slices held to plain loops over random data sets."""

import numpy as np
import pytest
from test_metrics import make

from neo_nb.base.detections import Detections
from neo_nb.cli.commands import check_data, data_of
from neo_nb.data.manifest import load_manifest
from neo_nb.evaluate.coco_metrics import coco_metrics
from neo_nb.evaluate.compare import compare_detections
from neo_nb.evaluate.errors import KINDS, confusion_matrix, delta_ap, find_errors
from neo_nb.evaluate.operating_point import ALL, evaluate, match_detections, threshold_curves
from neo_nb.evaluate.slices import BUCKETS, of_images, slice_metrics
from neo_nb.runs.run import record


def iou(a, b) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0.0) * max(h, 0.0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter) if inter > 0 else 0.0


def by_hand(table, detections, low: float = 0.0):
    """The kinds by the words of their definition, one detection at a time."""
    kinds = ["uncounted"] * detections.num_boxes
    boxes, truth = detections.boxes_xyxy.astype(float).tolist(), table.boxes_xyxy.astype(float).tolist()
    loud = np.flatnonzero(detections.scores >= np.float32(low))
    matches = match_detections(detections.select(loud), table)
    for row, found, ignored in zip(loud.tolist(), matches.truth.tolist(), matches.ignored.tolist()):
        if ignored:
            continue
        image = detections.image_index[row]
        objects = [o for o in range(table.offsets[image], table.offsets[image + 1]) if not table.iscrowd[o]]
        own = [(iou(boxes[row], truth[o]), o) for o in objects if table.labels[o] == detections.labels[row]]
        other = [(iou(boxes[row], truth[o]), o) for o in objects if table.labels[o] != detections.labels[row]]
        own, other = max(own, default=(0.0, -1)), max(other, default=(0.0, -1))
        if found >= 0:
            kinds[row] = "right"
        elif 0.1 <= own[0] < 0.5:
            kinds[row] = "localisation"
        elif other[0] >= 0.5:
            kinds[row] = "classification"
        elif own[0] >= 0.5:
            kinds[row] = "duplicate"
        elif other[0] >= 0.1:
            kinds[row] = "both"
        else:
            kinds[row] = "background"
    return kinds, matches.found


@pytest.mark.parametrize("seed", range(60))
def test_kinds_are_those_of_the_definition(seed):
    table, detections = make(seed)
    for low in (0.0, 0.5):
        errors = find_errors(detections, table, score_threshold=low)
        kinds, found = by_hand(table, detections, low)
        assert [KINDS[k] for k in errors.kind] == kinds
        assert (errors.found == found).all()
        parts = errors.found.astype(int) + errors.touched + errors.missed + table.iscrowd
        assert (parts == 1).all()  # every object has one fate
        has = errors.truth >= 0
        assert (has == ~np.isin(errors.kind, (4, 6))).all()
        for row in np.flatnonzero(has):
            expected = iou(detections.boxes_xyxy[row].astype(float), table.boxes_xyxy[errors.truth[row]].astype(float))
            assert abs(errors.iou[row] - expected) < 1e-5
            assert detections.image_index[row] == table.image_index[errors.truth[row]]


@pytest.mark.parametrize("seed", range(40))
def test_confusion_adds_up(seed):
    table, detections = make(seed)
    errors = find_errors(detections, table, score_threshold=0.4)
    matrix = confusion_matrix(detections, table, score_threshold=0.4)
    objects = np.bincount(table.labels[~table.iscrowd], minlength=len(table.class_names))
    predicted = np.bincount(detections.labels[errors.kind != 6], minlength=len(table.class_names))
    assert (matrix[:-1].sum(1) == objects).all() and (matrix[:, :-1].sum(0) == predicted).all()
    assert np.trace(matrix[:-1, :-1]) == (errors.kind == 0).sum()
    assert (matrix >= 0).all()


@pytest.mark.parametrize("seed", range(40))
def test_costs_are_the_ap_of_mended_detections(seed):
    """Fix by hand (drop rows, change boxes) and let the metric say what it is worth."""
    table, detections = make(seed)
    costs, now = delta_ap(detections, table), coco_metrics(detections, table)["AP50"]
    if now < 0:
        assert costs == {}
        return
    errors = find_errors(detections, table)
    for name in ("duplicate", "background", "both"):
        fixed = coco_metrics(detections.select(errors.kind != KINDS.index(name)), table)["AP50"]
        assert costs[name]["cost"] == pytest.approx(max(0, fixed - now), abs=1e-9)
    only = detections.select(np.isin(errors.kind, (0, 6)))
    assert costs["false positives"]["cost"] == pytest.approx(coco_metrics(only, table)["AP50"] - now, abs=1e-9)
    assert costs["false positives"]["count"] == np.isin(errors.kind, (1, 2, 3, 4, 5)).sum()


@pytest.mark.parametrize("seed", range(20))
def test_slices_are_the_metric_of_their_part(seed):
    table, detections = make(seed)
    curve = threshold_curves(detections, table)[ALL].at(0.5)
    slices, whole = slice_metrics(detections, table, 0.5), coco_metrics(detections, table)
    for name, number in (("medium", "APm"), ("large", "APl")):
        assert slices["size"].get(name, {"AP": -1})["AP"] == pytest.approx(whole[number], abs=1e-9)
    rows = slices["objects per image"].values()
    assert sum(row["images"] for row in rows) == len(table)
    for key in ("TP", "FP", "FN"):
        assert sum(row[key] for row in rows) == curve[key]
    edges = [low for low, _ in BUCKETS.values()]
    assert edges == sorted(edges)
    part = of_images(detections, table, np.arange(len(table)) % 2 == 0)
    assert part[0].num_boxes == (detections.image_index % 2 == 0).sum()


def test_two_runs_compared_agree_with_the_metric():
    for seed in range(6):
        table, detections = make(seed)
        other = detections.select(np.arange(detections.num_boxes) % 3 > 0)
        found = compare_detections(detections, other, table, draws=20)
        for key in ("AP", "AP50"):
            for numbers, one in zip(("first", "second"), (detections, other)):
                assert found[key][numbers] == pytest.approx(coco_metrics(one, table)[key], abs=1e-9)
        same = compare_detections(detections, detections, table, draws=20)
        assert same["AP"]["interval"] == [0, 0]


def test_what_lies_at_the_edges_of_a_metric():
    """A low IoU threshold, nothing said, no images, an object beside its image: numbers and images all the same."""
    table, detections = make(1)
    assert find_errors(detections, table, 0.1).counts()["right"] >= find_errors(detections, table).counts()["right"]
    nothing = detections.select(np.zeros(0, int))
    assert delta_ap(nothing, table)["missed"]["cost"] == 1
    none = table.select([]), Detections([], [], [], [], 0, table.class_names)
    assert evaluate(none[1], none[0])["AP"] == compare_detections(none[1], none[1], none[0])["AP"]["first"] == -1


def test_a_data_set_by_path_is_found_again(tmp_path, monkeypatch):
    """A YAML below the workspace, named from its own folder: checked, written down, and found from anywhere."""
    for folder in ("data_manifests", "sub", "reports/0001-train-mine-x/weights"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / "sub" / "mine.yaml").write_text("format: scenes\nroot: drawn\nsplits:\n  val: {num_images: 1}\n")
    monkeypatch.chdir(tmp_path / "sub")
    assert check_data("mine.yaml", "val") == "sub/mine.yaml"
    run = tmp_path / "reports" / "0001-train-mine-x"
    record(run, data={"name": "sub/mine.yaml"})
    for folder in (tmp_path, tmp_path / "sub"):
        monkeypatch.chdir(folder)
        assert data_of(run / "weights" / "best.safetensors", None, "val") == "sub/mine.yaml"
        assert load_manifest("sub/mine.yaml").name == "mine"
