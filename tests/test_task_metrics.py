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

NAMES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "APs": "APs", "APm": "APm", "APl": "APl"}
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
    shift = rng.normal(0, 4, (len(again), SIGMAS, 2))
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
            ours, theirs = coco_metrics(found, truth, cap, iou_type=iou_type), by_pycocotools(found, truth, cap, iou_type)
            for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
                assert abs(ours[name] - theirs[name]) < 1e-9, (seed, cap, name, ours[name], theirs[name])
            for name in ("AR1", "AR10"):
                if name in theirs:
                    assert abs(ours[name] - theirs[name]) < 1e-9, (seed, cap, name)
        measured += 0 < ours["AP"] < 1
    assert measured > 100
