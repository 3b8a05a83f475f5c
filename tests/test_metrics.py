"""Numbers held to pycocotools and torchmetrics on random data sets, and to cases worked by hand."""

import contextlib
import io

import numpy as np
import pytest

from neo_nb.base.annotations import Annotations
from neo_nb.base.detections import Detections
from neo_nb.evaluate.coco_metrics import IOU_THRESHOLDS, RECALLS, SIZES, coco_metrics, coco_tables
from neo_nb.evaluate.operating_point import ALL, evaluate, match_detections, threshold_curves

NAMES = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
EDGES = np.array([[32, 32], [96, 96], [16, 64], [32, 33], [31, 32], [96, 95], [288, 32]])  # at the bounds of sizes


def make(seed: int) -> tuple[Annotations, Detections]:
    """Crowds, ignore regions, empty images, absent classes, ties, areas at the edges, ids with gaps."""
    rng = np.random.default_rng(seed)
    images, classes = int(rng.integers(1, 9)), int(rng.integers(1, 4))
    counts = rng.integers(0, 12, images) * (rng.random(images) > 0.25)
    total = int(counts.sum())
    sides = np.where(
        rng.random((total, 1)) < 0.5, EDGES[rng.integers(0, len(EDGES), total)], rng.integers(4, 130, (total, 2))
    )
    corner = rng.integers(0, 200, (total, 2)) + (rng.random((total, 2)) if seed % 2 else 0)
    boxes, labels = np.concatenate([corner, corner + sides], 1), rng.integers(0, classes, total)
    ids = rng.choice(10_000, images, replace=False)
    names, categories = (
        [f"c{i}" for i in range(classes + 1)],
        (np.sort(rng.choice(90, classes + 1, replace=False)) + 1).tolist(),
    )
    areas = np.where(rng.random(total) < 0.3, np.round(sides.prod(1) * 0.7), sides.prod(1))
    table = Annotations(
        ids, [f"{i}.jpg" for i in ids], [(400, 400)] * images, np.concatenate([[0], np.cumsum(counts)]), boxes, labels,
        names, categories, iscrowd=rng.random(total) < 0.15, areas=areas,
    )  # fmt: skip
    rows = np.repeat(np.arange(total), rng.integers(0, 4, total)) if seed % 7 else np.zeros(0, int)
    near = table.boxes_xyxy[rows] + rng.integers(-6, 7, (len(rows), 4)) * (rng.random((len(rows), 1)) < 0.8)
    far = rng.integers(0, 200, (12, 2)) if seed % 5 else np.zeros((0, 2), int)
    near = np.concatenate([near, np.concatenate([far, far + EDGES[rng.integers(0, len(EDGES), len(far))]], 1)])
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    index = np.concatenate([table.image_index[rows], rng.integers(0, images, len(far))])
    predicted = np.concatenate([labels[rows], rng.integers(0, classes + 1, len(far))])
    return table, Detections(index, near, np.round(rng.random(len(index)), 1 + seed % 3), predicted, images, names)


def reference(detections: Detections, table: Annotations, caps: list[int]):
    """pycocotools' evaluation of the same boxes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rows(t, **extra):
        boxes = t.boxes_xyxy.astype(float)
        boxes[:, 2:] -= boxes[:, :2]
        columns = {"image_id": table.image_ids[t.image_index], "category_id": np.array(table.category_ids)[t.labels]}
        columns |= {"area": boxes[:, 2] * boxes[:, 3], "iscrowd": np.zeros(len(boxes), int)} | extra
        columns = {key: column.tolist() for key, column in columns.items()} | {"bbox": boxes.tolist()}
        return [{"id": i + 1} | {key: column[i] for key, column in columns.items()} for i in range(len(boxes))]

    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        images = [{"id": int(i), "height": 400, "width": 400} for i in table.image_ids]
        categories = [{"id": int(c), "name": n} for c, n in zip(table.category_ids, table.class_names)]
        extra = {"iscrowd": table.iscrowd.astype(int), "area": table.areas.astype(float)}
        truth.dataset = {"images": images, "categories": categories, "annotations": rows(table, **extra)}
        scores = {"score": detections.scores.astype(float)}
        found.dataset = {"images": images, "categories": categories, "annotations": rows(detections, **scores)}
        truth.createIndex(), found.createIndex()
        run = COCOeval(truth, found, "bbox")
        run.params.maxDets = caps
        run.evaluate(), run.accumulate()
        if caps == [1, 10, 100]:
            run.summarize()
    return run


def sorted_by_id(table: Annotations, detections: Detections) -> tuple[Annotations, Detections]:
    """pycocotools goes through images by id, which decides ties of score between images; we go by row."""
    order = np.argsort(table.image_ids)
    row = np.argsort(order)
    columns = {key: getattr(detections, key) for key in ("boxes_xyxy", "scores", "labels")}
    return table.select(order), Detections(
        row[detections.image_index], **columns, num_images=len(table), class_names=table.class_names
    )


@pytest.mark.parametrize("block", range(10))
def test_every_table_equals_pycocotools(block):
    caps = [1, 10, 100, 300]
    for seed in range(block * 20, block * 20 + 20):
        table, detections = sorted_by_id(*make(seed))
        run = reference(detections, table, caps)
        tables = coco_tables(detections, table, [(size, cap) for size in SIZES for cap in caps])
        for s, size in enumerate(SIZES):
            for c, cap in enumerate(caps):
                precision, recall = tables[size, cap]
                np.testing.assert_allclose(precision, run.eval["precision"][..., s, c], atol=1e-9, rtol=0)
                np.testing.assert_allclose(recall, run.eval["recall"][..., s, c], atol=1e-9, rtol=0)
        numbers = coco_metrics(detections, table)
        stats = reference(detections, table, [1, 10, 100]).stats
        np.testing.assert_allclose([numbers[n] for n in NAMES], stats, atol=1e-9, rtol=0)


def test_a_cap_of_two_is_pycocotools_too():
    for seed in range(300, 312):
        table, detections = sorted_by_id(*make(seed))
        run = reference(detections, table, [1, 2, 5])
        few = coco_metrics(detections, table, max_dets=2, extra_max_dets=5)
        for key, values in (("AP", run.eval["precision"][..., 0, 1]), ("AR@5", run.eval["recall"][..., 0, 2])):
            known = values[values > -1]
            assert few[key] == pytest.approx(known.mean() if len(known) else -1, abs=1e-9)


def test_torchmetrics_says_the_same():
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    for seed in (2, 4, 8):  # whole pixels: torchmetrics takes sides in float32
        table, detections = sorted_by_id(*make(seed))
        steps = {"iou_thresholds": IOU_THRESHOLDS.tolist(), "rec_thresholds": RECALLS.tolist()}  # its own are float32
        metric = MeanAveragePrecision(iou_type="bbox", backend="pycocotools", **steps)
        predicted, truth = [], []
        for i in range(len(table)):
            d, t = detections.for_image(i), table.select([i])
            predicted.append(
                {
                    "boxes": torch.tensor(d.boxes_xyxy),
                    "scores": torch.tensor(d.scores),
                    "labels": torch.tensor(d.labels),
                }
            )
            truth.append({"boxes": torch.tensor(t.boxes_xyxy), "labels": torch.tensor(t.labels),
                          "iscrowd": torch.tensor(t.iscrowd).int(), "area": torch.tensor(t.areas)})  # fmt: skip
        metric.update(predicted, truth)
        theirs, ours = metric.compute(), coco_metrics(detections, table)
        for key, name in {"map": "AP", "map_50": "AP50", "map_75": "AP75", "mar_100": "AR100"}.items():
            assert float(theirs[key]) == pytest.approx(ours[name], abs=1e-6)


def test_two_hundred_perfect_boxes_score_one_with_the_cap_above_them():
    corner = np.stack(np.meshgrid(np.arange(20) * 20.0, np.arange(10) * 20.0), -1).reshape(-1, 2)
    boxes = np.concatenate([corner, corner + 15], 1)
    table = Annotations([7], ["a"], [(200, 400)], [0, 200], boxes, np.zeros(200), ("person",))
    predicted = Detections(np.zeros(200), boxes, np.linspace(1, 0.5, 200), np.zeros(200), 1, ("person",))
    whole = evaluate(predicted, table, max_dets=300)
    assert whole["AP"] == whole["F1"] == whole["recall"] == 1.0
    assert evaluate(predicted, table)["recall"] == 0.5


def test_f1_by_hand():
    """Three logos in two images. By falling score: right, a duplicate, right, background, and one of .4 overlap."""
    boxes = [[0, 0, 10, 10], [50, 50, 70, 70], [5, 5, 25, 25]]
    table = Annotations([1, 2], ["a", "b"], [(100, 100)] * 2, [0, 2, 3], boxes, [0, 0, 0], ("logo",))
    predicted = Detections(
        [0, 0, 0, 1, 1],
        [[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 70, 66], [80, 80, 90, 90], [5, 5, 25, 13]],
        [0.9, 0.8, 0.7, 0.6, 0.5], [0] * 5, 2, ("logo",),
    )  # fmt: skip
    curve = threshold_curves(predicted, table)[ALL]
    assert curve.tp.tolist() == [1, 1, 2, 2, 2] and curve.fp.tolist() == [0, 1, 1, 2, 3]
    assert curve.f1.tolist() == pytest.approx([2 / 4, 2 / 5, 4 / 6, 4 / 7, 4 / 8])
    found = evaluate(predicted, table)
    assert (found["TP"], found["FP"], found["FN"]) == (2, 1, 1) and found["threshold"] == pytest.approx(0.7)
    assert found["precision"] == pytest.approx(2 / 3) and found["recall"] == pytest.approx(2 / 3)
    low, high = found["F1_interval"]
    assert 0 <= low <= found["F1"] <= high <= 1


def test_f1_counts_are_those_of_pycocotools_matching():
    for seed in range(40):
        table, detections = sorted_by_id(*make(seed))
        run, matches = reference(detections, table, [100]), match_detections(detections, table)
        whole = [e for e in run.evalImgs if e is not None and e["aRng"] == [0, 1e10]]
        right = sum(int(((e["dtMatches"][0] > 0) & ~e["dtIgnore"][0].astype(bool)).sum()) for e in whole)
        wrong = sum(int(((e["dtMatches"][0] == 0) & ~e["dtIgnore"][0].astype(bool)).sum()) for e in whole)
        assert int((matches.truth >= 0).sum()) == right == int(matches.found.sum())
        assert int(((matches.truth < 0) & ~matches.ignored).sum()) == wrong
