"""Detections on ignore regions are neither rewarded nor punished: in every loss, in every metric, in FiftyOne.

Each test adds boxes inside the regions, where nothing may change, and the same boxes elsewhere, where something must."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from neo_nb.base.annotations import Annotations
from neo_nb.base.detections import Detections, concat
from neo_nb.data.batch import Targets
from neo_nb.evaluate.analysis import analyse
from neo_nb.evaluate.coco_metrics import coco_metrics
from neo_nb.evaluate.compare import compare_detections, image_counts
from neo_nb.evaluate.crowd_metrics import crowd_metrics, jaccard_index
from neo_nb.evaluate.errors import confusion_matrix, delta_ap, find_errors
from neo_nb.evaluate.operating_point import evaluate, f1_intervals, threshold_curves
from neo_nb.evaluate.slices import calibration, slice_metrics
from neo_nb.losses.criterion import Criterion, ignored
from neo_nb.losses.denoising import make_denoising
from neo_nb.losses.softmax_set_loss import sum_losses
from neo_nb.models.zoo import create_model
from neo_nb.review.gallery import find_cases
from neo_nb.review.label_errors import find_label_errors
from neo_nb.review.mining import find_candidates

# ---- the loss

WANTED = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.2, 0.7, 0.1, 0.3]])  # cxcywh
REGIONS = torch.tensor([[0.65, 0.4, 0.3, 0.8], [0.85, 0.4, 0.3, 0.8]])  # together 0.5..1 by 0..0.8
INSIDE = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.75, 0.5, 0.2, 0.2], [0.9, 0.7, 0.1, 0.2]])
MOVED = torch.tensor([[0.9, 0.3, 0.2, 0.1], [0.6, 0.1, 0.1, 0.1], [0.75, 0.7, 0.2, 0.3]])  # the last: mostly inside
ELSEWHERE = INSIDE - torch.tensor([0.5, 0.0, 0.0, 0.0])


def targets() -> tuple[Targets, ...]:
    "Two images with objects, of which the second has no ignore region."
    labels = torch.tensor([0, 2])
    return (Targets(WANTED, labels, REGIONS), Targets(WANTED, labels, torch.zeros(0, 4)))


def answers(extra: torch.Tensor, score: float, columns: int, image: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    "Logits and boxes of two layers, two images and five queries: two on the objects, three on `extra` in one image."
    rng = torch.Generator().manual_seed(0)
    boxes = torch.cat([WANTED, INSIDE]).repeat(2, 2, 1, 1) + 0.01 * torch.rand(2, 2, 5, 4, generator=rng)
    logits = torch.randn(2, 2, 5, columns, generator=rng)
    logits[..., 0, 0] += 3
    logits[..., 1, 2] += 3
    boxes[:, image, 2:] = extra
    logits[:, image, 2:, :3] = score
    return logits.requires_grad_(), boxes.requires_grad_()


def rtdetr_loss(kind: str):
    def loss(logits, boxes):
        return sum(Criterion(kind)(logits[:1], boxes[:1], targets(), 4.0, encoder=(logits[1], boxes[1])).values())

    return loss


def denoising_loss(kind: str):
    "Two positives first, as `make_denoising` with two objects and one group has them, then what is to be refused."

    def loss(logits, boxes):
        torch.manual_seed(0)
        asked = make_denoising(targets(), 3, 2, num_denoising=2)
        assert asked.groups == 1 and asked.matches.query.max() == 1
        answered = (logits, boxes, asked.matches, 1)
        terms = Criterion(kind)(logits.detach(), boxes.detach(), targets(), 4.0, denoising=answered)
        return sum(value for name, value in terms.items() if "_dn_" in name)

    return loss


def detr_loss(logits, boxes):
    labels, wanted = [t.labels for t in targets()], [t.boxes for t in targets()]
    return sum(part.sum() for part in sum_losses(logits, boxes, labels, wanted, ignored(boxes, targets())))


LOSSES = {"vfl": (rtdetr_loss("vfl"), 3), "mal": (rtdetr_loss("mal"), 3), "DETR": (detr_loss, 4)}
LOSSES |= {f"denoising, {kind}": (denoising_loss(kind), 3) for kind in ("vfl", "mal")}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_see_what_lies_in_a_region(name):
    loss, columns = LOSSES[name]
    told = {}
    for where, extra in (("inside", INSIDE), ("moved", MOVED), ("elsewhere", ELSEWHERE)):
        for score in (-2.0, 2.0):
            logits, boxes = answers(extra, score, columns)
            value = loss(logits, boxes)
            value.backward()
            told[where, score] = value.item()
            quiet = logits.grad[:, 0, 2:]
            assert (quiet == 0).all() if where != "elsewhere" else (quiet != 0).any(-1).all()
            assert (boxes.grad[:, 0, 2:] == 0).all(), "no box of theirs is wanted anywhere"
            assert (logits.grad[:, 0, :2] != 0).any(-1).all(), "the objects' own are learned"
    same = [told[where, score] for where in ("inside", "moved") for score in (-2.0, 2.0)]
    assert same == pytest.approx([same[0]] * 4, abs=1e-6)
    assert told["elsewhere", 2.0] > same[0] + 0.01 and told["elsewhere", 2.0] > told["elsewhere", -2.0] + 0.01
    logits, boxes = answers(INSIDE, 2.0, columns, image=1)  # the same places in an image without regions
    other = loss(logits, boxes)
    other.backward()
    assert (logits.grad[:, 1, 2:] != 0).any(-1).all()


@pytest.mark.parametrize("name", ["rtdetr_nano", "detr_nano"])
def test_queries_in_a_region_have_no_gradient_in_any_layer_of_a_model(name):
    torch.manual_seed(0)
    model = create_model(name, 3, num_queries=12).train()
    images = torch.rand(2, 3, 96, 128)
    sizes = torch.tensor([[96, 128], [64, 96]])  # the second has padding: fractions of frame and content differ
    labels = torch.tensor([0, 2])
    whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    found = {}
    for regions in (torch.zeros(0, 4), whole):
        objects = tuple(Targets(WANTED * 0.6, labels, regions) for _ in range(2))
        torch.manual_seed(1)
        outputs = model(images, sizes, objects)
        said = getattr(outputs, "decoder", outputs)
        names = [n for n in ("logits", "layer_logits", "proposal_logits", "denoising_logits") if hasattr(said, n)]
        parts = {n: getattr(said, n) for n in names if getattr(said, n).ndim == 4 or n == "proposal_logits"}
        for part in parts.values():
            part.retain_grad()
        sum(model.loss(outputs, objects).values()).backward()
        found[len(regions)] = {n: (part.grad != 0).any(-1) for n, part in parts.items()}
    for part, learns in found[1].items():
        assert found[0][part].all(), f"{part}: without a region everything is background"
        if part != "denoising_logits":
            assert (learns.sum(-1) == 2).all(), f"{part}: the two that have an object"
        else:  # the positives of each group are asked about; the other half of the queries are negatives
            assert (2 * learns.sum(-1) == learns.shape[-1]).all()


# ---- metrics


def scene(seed: int, images: int = 8) -> tuple[Annotations, Detections]:
    "Objects of two classes on the left, in even images a region of each class on the right; a middling detector."
    rng = np.random.default_rng(seed)
    rows, boxes, labels, crowd, offsets = [], [], [], [], [0]
    for image in range(images):
        for _ in range(int(rng.integers(3, 7))):
            w, h = rng.uniform(12, 60, 2)
            x, y = rng.uniform(0, [140 - w, 200 - h])
            boxes.append((x, y, x + w, y + h)), labels.append(int(rng.integers(2))), crowd.append(False)
        if image % 2 == 0:
            for label, top in ((0, 0), (1, 100)):
                boxes.append((160, top, 300, top + 100)), labels.append(label), crowd.append(True)
        offsets.append(len(boxes))
        rows += [image] * (offsets[-1] - offsets[-2])
    names = [f"{i}.jpg" for i in range(images)]
    tags = ["dark" if i % 3 else "bright" for i in range(images)]
    table = Annotations(range(images), names, [(200, 300)] * images, offsets, boxes, labels, ("a", "b"), iscrowd=crowd,
                        tags=tags)  # fmt: skip
    real = np.flatnonzero(~table.iscrowd)
    kept = real[rng.uniform(size=len(real)) < 0.8]
    near = table.boxes_xyxy[kept] + rng.normal(0, 2, (len(kept), 4))
    said = np.where(rng.uniform(size=len(kept)) < 0.9, table.labels[kept], 1 - table.labels[kept])
    right = (table.image_index[kept], near, rng.uniform(0.3, 1, len(kept)), said)
    many = 2 * images
    corner = rng.uniform(0, [100, 150], (many, 2))
    wrong = (rng.integers(images, size=many), np.concatenate([corner, corner + rng.uniform(10, 40, (many, 2))], 1),
             rng.uniform(0.05, 0.7, many), rng.integers(2, size=many))  # fmt: skip
    columns = [np.concatenate(pair) for pair in zip(right, wrong)]
    return table, Detections(*columns, images, table.class_names)


def extras(seed: int, images: int, elsewhere: bool = False) -> Detections:
    "Six boxes inside the region of their class in each even image, or at the same places in the odd ones."
    rng = np.random.default_rng(seed + 100)
    index = np.repeat(np.arange(0, images, 2), 6)
    labels = rng.integers(2, size=len(index))
    side = rng.uniform(8, 70, (len(index), 2))
    corner = np.stack([160 + rng.uniform(size=len(index)) * (140 - side[:, 0]),
                       100 * labels + rng.uniform(size=len(index)) * (100 - side[:, 1])], 1)  # fmt: skip
    scores = rng.uniform(0.2, 1, len(index))
    scores[:4] = 0.97
    return Detections(
        index + elsewhere, np.concatenate([corner, corner + side], 1), scores, labels, images, ("a", "b")
    )


def but_uncounted(counts: dict) -> dict:
    return {name: count for name, count in counts.items() if name != "uncounted"}


def errors_of(d: Detections, t: Annotations) -> dict:
    found = find_errors(d, t)
    fates = {name: getattr(found, name).tolist() for name in ("found", "touched", "missed")}
    return but_uncounted(found.counts()) | fates


def doubts_of(d: Detections, t: Annotations) -> list:
    return [column.tolist() for column in find_label_errors(d, t, find_errors(d, t)).of_images(d, t)]


def analysis_of(d: Detections, t: Annotations) -> dict:
    found = analyse(d, t, evaluate(d, t))
    found["crowds"].pop("in_use")  # counts what is said, right or wrong
    return found | {"errors": but_uncounted(found["errors"])}


def but_first(numbers: dict) -> dict:
    "Without COCO's recalls of the first detection and of the first ten, which count whatever comes first."
    return {name: value for name, value in numbers.items() if name not in ("AR1", "AR10")}


METRICS = {
    "COCO": lambda d, t: but_first(coco_metrics(d, t)),
    "all of a run": lambda d, t: but_first(evaluate(d, t)),
    "operating point": lambda d, t: {name: curve.best() for name, curve in threshold_curves(d, t).items()},
    "intervals": f1_intervals,
    "slices": lambda d, t: slice_metrics(d, t, 0.3),
    "calibration": calibration,
    "MR-2": lambda d, t: {name: row["MR-2"] for name, row in crowd_metrics(d, t)["per_class"].items()},
    "JI": lambda d, t: [jaccard_index(d, t, label) for label in (0, 1)],
    "kinds of error": errors_of,
    "costs of errors": delta_ap,
    "confusions": lambda d, t: confusion_matrix(d, t, score_threshold=0.3).tolist(),
    "counts of images": lambda d, t: image_counts(d, t, 0.3).tolist(),
    "two runs": lambda d, t: compare_detections(scene(99)[1], d, t, draws=20),
    "label errors": doubts_of,
    "analysis": analysis_of,
    "gallery": lambda d, t: find_cases(find_errors(d, t), d, t),
    "mining": lambda d, t: find_candidates(d, t)[2],
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_does_not_see_what_lies_in_a_region(name, seed):
    metric = METRICS[name]
    table, detections = scene(seed)
    images = len(table)
    plain = metric(detections, table)
    assert metric(concat([detections, extras(seed, images)]), table) == plain
    assert metric(concat([detections, extras(seed, images, elsewhere=True)]), table) != plain
    without = table.select_boxes(~table.iscrowd)  # the same boxes where nobody declared a region
    assert metric(concat([detections, extras(seed, images)]), without) != metric(detections, without)


def recall_in_crowds(d: Detections, t: Annotations) -> dict:
    return crowd_metrics(d, t)["neighbours"]


@pytest.mark.parametrize("seed", range(4))
def test_regions_are_no_neighbours_and_what_lies_in_them_finds_nothing(seed):
    table, detections = scene(seed)
    over = table.boxes_xyxy.copy()
    over[table.iscrowd] = (0, 0, 300, 200)  # regions over everything
    crowded = replace(table, boxes_xyxy=over)
    assert recall_in_crowds(detections, crowded) == recall_in_crowds(detections, table)
    more = concat([detections, extras(seed, len(table))])
    assert recall_in_crowds(more, table) == recall_in_crowds(detections, table)
    assert sum(row["objects"] for row in recall_in_crowds(more, table).values()) == (~table.iscrowd).sum()
    people = replace(table, iscrowd=np.zeros(len(table.labels), bool))  # as objects they would be counted
    assert recall_in_crowds(detections, people) != recall_in_crowds(detections, table)


def test_what_finds_an_object_inside_a_region_is_right_and_a_second_one_is_not_wrong():
    table = Annotations([1], ["1.jpg"], [(100, 100)], [0, 2], [(20, 20, 40, 40), (0, 0, 80, 80)], [0, 0], ("a",),
                        iscrowd=[False, True])  # fmt: skip
    boxes = [(20, 20, 40, 40), (21, 20, 41, 40), (50, 50, 60, 60)]
    for rows in ([0], [0, 1], [0, 1, 2]):
        found = Detections(
            [0] * len(rows), np.float32(boxes)[rows], [0.9, 0.8, 0.95][: len(rows)], [0] * len(rows), 1, ("a",)
        )
        numbers = evaluate(found, table)
        assert (numbers["AP"], numbers["F1"], numbers["TP"], numbers["FP"]) == (1.0, 1.0, 1, 0)
        crowds = crowd_metrics(found, table)
        assert (crowds["MR-2"], crowds["JI"]) == (pytest.approx(1e-10, abs=1e-9), 1.0)
    only = Detections([0], [boxes[2]], [0.9], [0], 1, ("a",))
    assert evaluate(only, table)["TP"] == 0, "a region is no object that could be found"


def test_a_region_excuses_its_class_alone_and_what_lies_in_it_by_half():
    table = Annotations([1], ["1.jpg"], [(100, 100)], [0, 2], [(0, 0, 20, 20), (50, 50, 90, 90)], [0, 0], ("a", "b"),
                        iscrowd=[False, True])  # fmt: skip
    for box, label, wrong in (
        ((60, 60, 80, 80), 0, 0),
        ((60, 60, 80, 80), 1, 1),  # as COCO has it
        ((42, 60, 62, 80), 0, 0),  # 60% inside
        ((36, 60, 56, 80), 0, 1),  # 30%
    ):
        found = Detections([0], [box], [0.9], [label], 1, ("a", "b"))
        assert image_counts(found, table, 0.5)[0].tolist() == [0, wrong, 1]
        assert (find_errors(found, table).kind[0] == 6) == (wrong == 0)


# ---- FiftyOne


def shown(fo, name: str, detections: Detections, table: Annotations) -> dict:
    "What FiftyOne says of a run: its counts, its report, its views."
    from neo_nb.review.fiftyone_dataset import make_dataset

    dataset = make_dataset(fo, name, detections, table, 0.3)
    numbers = {key: dataset.values(f"eval_{key}") for key in ("tp", "fp", "fn")}
    numbers |= {key: dataset.values(key) for key in ("f1", "errors", "possible_missing", "possible_spurious")}
    kept = dataset.load_evaluation_results("eval")
    numbers |= {"metrics": kept.metrics(), "report": kept.report(), "boxes": dataset.count("predictions.detections")}
    numbers |= {"confusion": kept.confusion_matrix().tolist()}
    numbers |= {view: len(dataset.load_saved_view(view)) for view in dataset.list_saved_views()}
    return numbers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("seed", range(2))
def test_fiftyone_does_not_see_what_lies_in_a_region(fo, seed):
    table, detections = scene(seed)
    table = replace(table, root="images")
    plain = shown(fo, f"plain-{seed}", detections, table)
    assert shown(fo, f"inside-{seed}", concat([detections, extras(seed, len(table))]), table) == plain
    other = shown(fo, f"elsewhere-{seed}", concat([detections, extras(seed, len(table), elsewhere=True)]), table)
    assert other["fp"] != plain["fp"] and other["metrics"] != plain["metrics"] and other["boxes"] > plain["boxes"]
