"""What tiles say, merged in the image, against the truth and against a plain loop."""

import numpy as np
import pytest

from neo_nb.base.detections import Detections
from neo_nb.data.tiles import tile_grid
from neo_nb.deploy.merge_tiles import merge_tiles, to_image_coords


def apart(rng, size, count, low, high, gap=0.0):
    "Boxes that do not overlap, each at least `low` and at most `high` pixels per side."
    boxes = np.zeros((0, 4))
    for _ in range(count * 4):
        w, h = np.exp(rng.uniform(np.log(low), np.log(high), 2)).clip(low, np.array(size[::-1]) - 0.0)
        x, y = rng.uniform(0, size[1] - w), rng.uniform(0, size[0] - h)
        free = (x + w + gap <= boxes[:, 0]) | (boxes[:, 2] + gap <= x)
        free |= (y + h + gap <= boxes[:, 1]) | (boxes[:, 3] + gap <= y)
        if free.all() and len(boxes) < count:
            boxes = np.concatenate([boxes, [[x, y, x + w, y + h]]])
    return boxes


def perfect(rng, boxes, labels, windows, least=1.0, noise=0.0):
    "What a perfect detector says in each window: the truth clipped to it, in any order, with any score."
    rows = []
    for number, (x1, y1, x2, y2) in enumerate(np.asarray(windows).tolist()):
        for box, label in zip(boxes, labels):
            part = np.array([max(box[0], x1), max(box[1], y1), min(box[2], x2), min(box[3], y2)])
            if (part[2:] - part[:2] >= least).all():
                part = np.clip(part + rng.normal(0, noise, 4), (x1, y1) * 2, (x2, y2) * 2) if noise else part
                rows.append((number, *(part - (x1, y1, x1, y1)), rng.uniform(0.05, 1), label))
    columns = np.array(rows).reshape(-1, 7)
    return Detections(columns[:, 0], columns[:, 1:5], columns[:, 5], columns[:, 6], len(windows), ("a", "b"))


def same_set(found, boxes, labels, near=1e-2):
    "Whether each object is found once, and nothing else."
    if found.num_boxes != len(boxes):
        return False
    if not len(boxes):
        return True
    gaps = abs(found.boxes_xyxy[:, None] - boxes[None]).max(2) + 1e9 * (found.labels[:, None] != labels[None])
    return len(set(gaps.argmin(1).tolist())) == len(boxes) and bool((gaps.min(1) <= near).all())


METHODS = ["nms", "nmm", "wbf"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("whole", [True, False], ids=["beside the whole", "in parts only"])
@pytest.mark.parametrize("seed", range(40))
def test_a_perfect_detector_finds_each_object_once(method, seed, whole):
    rng = np.random.default_rng(seed)
    size, tile = tuple(int(n) for n in rng.integers(100, 500, 2)), tuple(int(n) for n in rng.integers(60, 160, 2))
    overlap = float(rng.uniform(0, 0.5) if whole else rng.choice([0.05, 0.1, 0.2, 0.25, 0.5]))
    boxes = apart(rng, size, 30, 4, 300 if whole else [40, 150, 450][seed % 3])
    labels, windows = rng.integers(0, 2, len(boxes)), tile_grid(size, tile, overlap)
    windows = np.concatenate([windows, [[0, 0, size[1], size[0]]]]) if whole else windows
    found = merge_tiles(*to_image_coords(perfect(rng, boxes, labels, windows), windows, size), method)
    assert same_set(found, boxes, labels)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(30))
def test_a_detector_a_little_wrong_finds_each_object_once(method, seed):
    rng = np.random.default_rng(seed)
    size, tile = tuple(int(n) for n in rng.integers(300, 600, 2)), tuple(int(n) for n in rng.integers(120, 250, 2))
    boxes = apart(rng, size, 20, 24, [60, 200, 500][seed % 3], gap=3)
    labels = rng.integers(0, 2, len(boxes))
    windows = tile_grid(size, tile, float(rng.uniform(0.2, 0.5)))
    windows = np.concatenate([windows, [[0, 0, size[1], size[0]]]]) if seed % 2 else windows
    found = merge_tiles(*to_image_coords(perfect(rng, boxes, labels, windows, 8, noise=0.5), windows, size), method)
    assert same_set(found, boxes, labels, near=12)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(15))
def test_neighbours_stay_two(overlap, seed):
    "Two boxes side by side, of one class, that touch each other anywhere but on a border of a tile."
    rng = np.random.default_rng(seed)
    size, tile = (400, 400), tuple(int(n) for n in rng.integers(80, 200, 2))
    windows = tile_grid(size, tile, overlap)
    for _ in range(20):
        w1, w2, h1, h2 = rng.uniform(6, 180, 4)
        x, y = rng.uniform(w1, 400 - w2), rng.uniform(0, 400 - max(h1, h2))
        if overlap == 0 and abs(windows[:, [0, 2]] - x).min() < 6:
            continue
        boxes = np.array([[x - w1, y, x, y + h1], [x, y, x + w2, y + h2]])
        boxes = boxes if rng.random() < 0.5 else boxes[:, [1, 0, 3, 2]]
        if overlap == 0 and abs(windows[:, [1, 3]] - boxes[0, 3]).min() < 6:
            continue
        found = merge_tiles(*to_image_coords(perfect(rng, boxes, [0, 0], windows), windows, size))
        assert same_set(found, boxes, np.zeros(2, int)), (boxes, found.boxes_xyxy, tile)


@pytest.mark.parametrize("seed", range(15))
def test_people_cut_by_one_border_stay_apart(seed):
    "A crowd: boxes of one class that overlap each other by up to half, cut by the same borders."
    rng = np.random.default_rng(seed)
    size, tile, step = (600, 900), (250, 300), float(rng.uniform(30, 60))
    wide = step * float(rng.uniform(1, 1.5))
    left = np.arange(20, 860 - wide, step)
    top = rng.uniform(20, 60, len(left))
    boxes = np.stack([left, top, left + wide, top + rng.uniform(350, 500, len(left))], 1)
    windows = tile_grid(size, tile, 0.3)
    found = merge_tiles(*to_image_coords(perfect(rng, boxes, [0] * len(boxes), windows, 6), windows, size))
    assert same_set(found, boxes, np.zeros(len(boxes), int))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(20))
def test_whole_boxes_seen_twice_become_one_as_a_loop_says(method, seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 60))
    corner, sides = rng.uniform(0, 100, (count, 2)), rng.uniform(5, 60, (count, 2))
    boxes = np.concatenate([corner, corner + sides], 1).astype(np.float32)
    scores = rng.permutation(np.linspace(0.1, 0.9, count)).astype(np.float32)
    found = Detections([0] * count, boxes, scores, rng.integers(0, 2, count), 1, ("a", "b"))
    limit = float(rng.uniform(0.2, 0.7))
    merged = merge_tiles(found, np.full((count, 4), np.nan), method, limit)

    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        inter = max(w, 0) * max(h, 0)
        return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)

    kept, owned = [], {}
    rows = [
        (b, s, c)
        for b, s, c in zip(found.boxes_xyxy.astype(float).tolist(), found.scores.tolist(), found.labels.tolist())
    ]
    for i, (box, _, label) in enumerate(rows):
        if not any(rows[k][2] == label and iou(box, rows[k][0]) > limit for k in kept):
            kept.append(i)
            owned[i] = [i]
    for i, (box, _, label) in enumerate(rows):
        if i not in kept:
            best = max((k for k in kept if rows[k][2] == label), key=lambda k: iou(box, rows[k][0]))
            owned[best].append(i)
    expected = []
    for k in kept:
        mine, weights = np.array([rows[i][0] for i in owned[k]]), np.array([rows[i][1] for i in owned[k]])
        union = [*mine[:, :2].min(0), *mine[:, 2:].max(0)]
        mean = (mine * weights[:, None]).sum(0) / weights.sum()
        expected.append({"nms": rows[k][0], "nmm": union, "wbf": mean}[method])
    assert merged.boxes_xyxy == pytest.approx(np.array(expected), abs=1e-2)
    assert merged.scores.tolist() == [np.float32(rows[k][1]) for k in kept]


def test_thousands_of_boxes_are_merged_in_a_moment():
    import time

    rng = np.random.default_rng(0)
    size = (2160, 3840)
    corner = rng.uniform(0, np.array(size[::-1]) - 120, (1500, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 120, (1500, 2))], 1)
    windows = tile_grid(size, (640, 640), 0.2)
    predicted = perfect(rng, boxes, rng.integers(0, 2, len(boxes)), windows)
    start = time.process_time()
    merged = merge_tiles(*to_image_coords(predicted, windows, size), "wbf")
    assert time.process_time() - start < 5
    assert 1000 < merged.num_boxes <= 1550
