"""AP of masks and of keypoints against pycocotools, and every number that rests on the same pairs."""

import numpy as np
import pytest

from neo_nb.base.annotations import Annotations
from neo_nb.base.core import InputError
from neo_nb.base.detections import Detections
from neo_nb.base.keypoints import COCO_PERSON
from neo_nb.base.masks import Masks
from neo_nb.evaluate.coco_metrics import coco_metrics
from neo_nb.evaluate.compare import ap_of_draws, compare_detections, find_changes
from neo_nb.evaluate.errors import KINDS, confusion_matrix, delta_ap, find_errors
from neo_nb.evaluate.operating_point import evaluate, match_detections
from neo_nb.evaluate.slices import calibration, of_images, slice_metrics
from neo_nb.evaluate.verify import by_pycocotools

SIGMAS = len(COCO_PERSON.names)


def pixels(rng: np.random.Generator, size: tuple[int, int], box: np.ndarray) -> np.ndarray:
    "An ellipse in a box, with a bite taken out now and then."
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    centre, radii = (box[:2] + box[2:]) / 2, np.maximum((box[2:] - box[:2]) / 2, 0.1)
    mask = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 <= 1
    if rng.random() < 0.3:
        mask &= x < centre[0]
    return mask


def outline(rng: np.random.Generator, box: np.ndarray) -> list[list[float]]:
    "One or two rings in a box."
    rings = []
    for _ in range(int(rng.integers(1, 3))):
        angle = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 9))))
        points = (box[:2] + box[2:]) / 2 + np.stack([np.cos(angle), np.sin(angle)], 1) * (box[2:] - box[:2]) / 2
        rings.append(np.float32(points).ravel().tolist())
    return rings


def random_tables(seed: int, classes: int = 2) -> tuple[Annotations, Detections]:
    "Objects with masks and keypoints, and detections near them: ties, crowds, nothing visible, empty images."
    rng = np.random.default_rng(seed)
    images = int(rng.integers(1, 5))
    counts = rng.integers(0, 7, images) * (rng.random(images) > 0.2)
    sizes = np.array([(90, 120), (120, 90)])[rng.integers(0, 2, images)]
    own = np.repeat(sizes, counts, axis=0)
    corner = rng.integers(0, 60, (len(own), 2))
    boxes = np.concatenate([corner, corner + rng.integers(2, 60, (len(own), 2))], 1).astype(np.float32)
    boxes = np.minimum(boxes, np.concatenate([own[:, ::-1]] * 2, 1))
    crowd = rng.random(len(own)) < 0.15
    names = [f"class {i}" for i in range(classes)]
    shapes = [outline(rng, box) if rng.random() < 0.5 else None for box in boxes]
    packed = Masks.from_arrays([pixels(rng, tuple(size), box) for size, box in zip(own, boxes)]).to_coco()
    masks = Masks.from_coco([shape or run for shape, run in zip(shapes, packed)], own)
    points = rng.uniform(boxes[:, None, :2], boxes[:, None, 2:], (len(own), SIGMAS, 2))
    seen = rng.integers(0, 3, (len(own), SIGMAS, 1)) * (rng.random((len(own), 1, 1)) > 0.2)
    keypoints = np.concatenate([points * (seen > 0), seen], 2)
    areas = np.where(rng.random(len(own)) < 0.2, 0.7, 1.0) * masks.areas
    truth = Annotations(
        np.arange(images) + 1, [f"{i}.jpg" for i in range(images)], sizes, np.concatenate([[0], np.cumsum(counts)]),
        boxes, rng.integers(0, classes, len(own)), names, iscrowd=crowd, areas=areas, masks=masks,
        keypoints=keypoints, skeleton=COCO_PERSON,
    )  # fmt: skip
    return truth, near(rng, truth)


def near(rng: np.random.Generator, truth: Annotations) -> Detections:
    "Detections around the objects, some of another class, some twice, scores with ties."
    again = np.repeat(np.arange(len(truth.labels)), rng.integers(0, 4, len(truth.labels)))
    limits = np.concatenate([truth.sizes[truth.image_index][:, ::-1]] * 2, 1)[again]
    boxes = np.clip(truth.boxes_xyxy[again] + rng.integers(-6, 7, (len(again), 4)), 0, limits)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    sizes = truth.sizes[truth.image_index][again]
    masks = Masks.from_arrays([pixels(rng, tuple(size), box) for size, box in zip(sizes, boxes)])
    labels = np.where(rng.random(len(again)) < 0.15, 1 - truth.labels[again], truth.labels[again])
    shift = rng.normal(0, 2, (len(again), SIGMAS, 2))
    keypoints = np.concatenate([truth.keypoints[again][..., :2] + shift, rng.random((len(again), SIGMAS, 1))], 2)
    return Detections(
        truth.image_index[again], boxes, np.round(rng.random(len(again)), 1), labels, len(truth), truth.class_names,
        masks=masks, keypoints=keypoints, skeleton=COCO_PERSON,
    )  # fmt: skip


@pytest.mark.parametrize("iou_type", ["segm", "keypoints"])
def test_numbers_are_those_of_pycocotools(iou_type):
    measured = 0
    for seed in range(200):
        truth, found = random_tables(seed)
        for cap in (100, 20, 2):
            ours, theirs = (
                coco_metrics(found, truth, cap, iou_type=iou_type),
                by_pycocotools(found, truth, cap, iou_type),
            )
            for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
                assert abs(ours[name] - theirs[name]) < 1e-9, (seed, cap, name, ours[name], theirs[name])
            for name in ("AR1", "AR10"):
                if name in theirs:
                    assert abs(ours[name] - theirs[name]) < 1e-9, (seed, cap, name)
        measured += 0 < ours["AP"] < 1
    assert measured > 100


@pytest.fixture(scope="module")
def crowded() -> tuple[Annotations, Detections]:
    """The first sets that have everything: objects in several images, crowd regions, poses without a keypoint."""
    for seed in range(100):
        truth, found = random_tables(seed)
        bare = ~(truth.keypoints[..., 2] > 0).any(1)
        if len(truth) > 2 and len(truth.labels) > 9 and truth.iscrowd.any() and bare.any() and not bare.all():
            return truth, found
    raise AssertionError("no such set")


@pytest.mark.parametrize("iou_type", ["segm", "keypoints"])
def test_what_rests_on_the_same_pairs_agrees(crowded, iou_type):
    truth, found = crowded
    numbers = evaluate(found, truth, iou_type=iou_type)
    errors = find_errors(found, truth, iou_type=iou_type)
    right = int((errors.kind == KINDS.index("right")).sum())
    assert right == (match_detections(found, truth, iou_type=iou_type).truth >= 0).sum() > 0
    assert (errors.iou[errors.kind == KINDS.index("right")] >= 0.5).all()
    table = confusion_matrix(found, truth, iou_type=iou_type)
    assert table[:-1].sum() == numbers["boxes"] == errors.found.sum() + errors.touched.sum() + errors.missed.sum()
    assert np.trace(table[:-1, :-1]) == right
    slices = slice_metrics(found, truth, 0.0, iou_type=iou_type)
    assert sum(row["TP"] for row in slices["objects per image"].values()) == right
    once = ap_of_draws(found, truth, np.ones((1, len(truth)), int), iou_type=iou_type)
    assert abs(once[0][0] - numbers["AP"]) < 1e-9 and abs(once[1][0] - numbers["AP50"]) < 1e-9
    assert numbers["AP"] != evaluate(found, truth)["AP"]
    assert delta_ap(found, truth, iou_type=iou_type)["missed"]["cost"] >= 0
    assert sum(calibration(found, truth, iou_type=iou_type)["count"]) == (errors.kind < 6).sum()


def test_two_runs_are_compared_by_masks(crowded):
    truth, found = crowded
    blank = Masks.from_arrays([np.zeros(size, bool) for size in found.masks.sizes])
    worse = Detections(
        found.image_index, found.boxes_xyxy, found.scores, found.labels, len(truth), truth.class_names, masks=blank
    )  # the same boxes, masks without a pixel
    assert compare_detections(worse, found, truth)["AP"]["difference"] == 0
    assert compare_detections(worse, found, truth, iou_type="segm")["AP"]["difference"] > 0
    assert find_changes(worse, found, truth, (0.0, 0.0), iou_type="segm").gained.any()
    some, there = of_images(found, truth, np.arange(len(truth)) < 2)
    assert len(some.masks) == some.num_boxes and len(there.masks) == len(there.labels)


def test_what_is_missing_is_said(crowded):
    truth, found = crowded
    plain = Detections(found.image_index, found.boxes_xyxy, found.scores, found.labels, len(truth), truth.class_names)
    with pytest.raises(InputError, match="the detections have no masks"):
        coco_metrics(plain, truth, iou_type="segm")
    with pytest.raises(InputError, match="the detections have no keypoints"):
        evaluate(plain, truth, iou_type="keypoints")
    with pytest.raises(InputError, match="iou_type"):
        evaluate(found, truth, iou_type="boxes")
    first = int(np.flatnonzero(~truth.iscrowd)[0])
    shapes = truth.masks.to_coco()
    shapes[first] = None
    lacking = Masks.from_coco(shapes, truth.masks.sizes)
    bare = Annotations(
        truth.image_ids, truth.file_names, truth.sizes, truth.offsets, truth.boxes_xyxy, truth.labels,
        truth.class_names, iscrowd=truth.iscrowd, masks=lacking,
    )  # fmt: skip
    with pytest.raises(InputError, match=f"1 of {len(truth.labels)} objects have no mask, the first in image"):
        coco_metrics(found, bare, iou_type="segm")


def test_a_crowd_region_with_a_box_alone_excuses_what_lies_in_it():
    size = (60, 80)
    left, right = np.zeros(size, bool), np.zeros(size, bool)
    left[10:30, 5:25], right[10:30, 45:65] = True, True
    masks = Masks.from_coco([Masks.from_arrays([left]).to_coco()[0], None], [size] * 2)
    boxes = [[5, 10, 25, 30], [40, 0, 80, 60]]
    truth = Annotations([1], ["a"], [size], [0, 2], boxes, [0, 0], ["x"], iscrowd=[False, True], masks=masks)
    found = Detections(
        [0, 0], [boxes[0], [45, 10, 65, 30]], [0.5, 0.9], [0, 0], 1, ["x"], masks=Masks.from_arrays([left, right])
    )
    assert evaluate(found, truth, iou_type="segm")["F1"] == 1
    assert find_errors(found, truth, iou_type="segm").counts()["uncounted"] == 1
