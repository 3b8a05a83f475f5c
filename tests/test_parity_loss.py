"""The matching, the denoising queries and every loss term agree with transformers' RT-DETR."""

import pytest
import torch

from neo_nb.base.boxes import cxcywh_to_xyxy
from neo_nb.data.batch import Targets
from neo_nb.losses.criterion import Criterion, set_loss
from neo_nb.losses.denoising import attention_mask, make_denoising
from neo_nb.losses.matcher import match

LAYERS, QUERIES, CLASSES = 3, 100, 7


@pytest.fixture(scope="module")
def rt():
    "transformers' losses and their settings."
    from transformers import RTDetrConfig
    from transformers.loss import loss_rt_detr

    config = RTDetrConfig(num_labels=CLASSES, num_queries=QUERIES, num_denoising=40)
    return loss_rt_detr, config


def some_targets(seed: int, counts=(5, 0, 9, 1), classes: int = CLASSES) -> tuple[Targets, ...]:
    "Objects of several images; one has none."
    g = torch.Generator().manual_seed(seed)
    made = []
    for n in counts:
        boxes = torch.cat([torch.rand(n, 2, generator=g) * 0.6 + 0.2, torch.rand(n, 2, generator=g) * 0.3 + 0.02], 1)
        made.append(Targets(boxes, torch.randint(classes, (n,), generator=g), torch.zeros(0, 4)))
    return tuple(made)


def as_theirs(targets: tuple[Targets, ...]) -> list[dict]:
    return [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]


def some_outputs(
    seed: int, shape: tuple[int, ...], targets=(), near: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    "Random logits and boxes; a share of the boxes lies near an object, the others anywhere or nowhere near one."
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, CLASSES, generator=g) * 2 - 2
    boxes = torch.cat([torch.rand(*shape, 2, generator=g), torch.rand(*shape, 2, generator=g) * 0.4 + 0.01], -1)
    for i, target in enumerate(targets):
        if len(target):
            drawn = torch.randint(len(target), (shape[0], shape[2]), generator=g)
            moved = target.boxes[drawn] * (1 + 0.2 * torch.randn(shape[0], shape[2], 4, generator=g)).clamp(0.3, 1.7)
            chosen = torch.rand(shape[0], shape[2], 1, generator=g) < near
            boxes[:, i] = torch.where(chosen, moved, boxes[:, i])
    return logits.requires_grad_(), boxes.requires_grad_()


def same(ours: torch.Tensor, theirs: torch.Tensor, name: str, relative: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=relative, atol=1e-7, msg=lambda text: f"{name}: {text}")


def denoising_of(targets, seed: int):
    "Our questions, and transformers' description of the same places."
    torch.manual_seed(seed)
    asked = make_denoising(targets, CLASSES, LAYERS, 40)
    first = asked.matches.layer == 0
    places = [asked.matches.query[first & (asked.matches.image == i)] for i in range(len(targets))]
    meta = {"dn_positive_idx": places, "dn_num_group": asked.groups, "dn_num_split": [asked.labels.shape[1], QUERIES]}
    return asked, meta


NAMES = {"vfl": "loss_vfl", "l1": "loss_bbox", "giou": "loss_giou"}


def their_name(ours: str) -> str:
    "`l1_0` is `loss_bbox_aux_0`; the encoder's proposals are their last auxiliary layer."
    term, _, rest = ours.partition("_")
    rest = "" if not rest else f"_{rest}" if rest.startswith("dn") else f"_aux_{LAYERS - 1 if rest == 'enc' else rest}"
    return NAMES[term] + rest


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("near", [0.0, 0.5, 1.0])
def test_every_term_and_the_gradients_are_those_of_transformers(rt, seed, near):
    loss, config = rt
    targets = some_targets(seed)
    asked, meta = denoising_of(targets, seed)
    asks = asked.labels.shape[1]
    logits, boxes = some_outputs(seed, (LAYERS, len(targets), asks + QUERIES), targets, near)
    enc_logits, enc_boxes = some_outputs(seed + 50, (1, len(targets), QUERIES), targets, near)
    leaves = (logits, boxes, enc_logits, enc_boxes)
    num_boxes = float(sum(map(len, targets)))
    terms = Criterion()(
        logits[:, :, asks:], boxes[:, :, asks:], targets, num_boxes, encoder=(enc_logits[0], enc_boxes[0]),
        denoising=(logits[:, :, :asks], boxes[:, :, :asks], asked.matches, asked.groups),
    )  # fmt: skip
    total = sum(terms.values())
    by_batch_l, by_batch_b = logits.transpose(0, 1), boxes.transpose(0, 1)
    their_total, theirs, _ = loss.RTDetrForObjectDetectionLoss(
        by_batch_l[:, -1], as_theirs(targets), "cpu", by_batch_b[:, -1], config, by_batch_l, by_batch_b,
        enc_logits[0], enc_boxes[0], meta,
    )  # fmt: skip
    assert {their_name(name) for name in terms} == set(theirs)
    for name, value in terms.items():
        same(value, theirs[their_name(name)], name)
    same(total, their_total, "total")
    wanted = torch.autograd.grad(their_total, leaves)
    for ours, expected, name in zip(
        torch.autograd.grad(total, leaves), wanted, ("logits", "boxes", "enc", "enc boxes")
    ):
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6 * scale, msg=lambda t, n=name: f"{n}: {t}")


def test_a_match_that_misses_its_object_counts_the_same(rt):
    loss, config = rt
    target = Targets(torch.tensor([[0.2, 0.2, 0.1, 0.1]]), torch.tensor([2]), torch.zeros(0, 4))
    logits = torch.randn(1, 1, 4, CLASSES, generator=torch.Generator().manual_seed(0)).requires_grad_()
    boxes = torch.tensor([0.8, 0.8, 0.1, 0.1]).expand(1, 1, 4, 4).clone()
    terms = set_loss(logits, boxes, (target,), match(logits, boxes, (target,)), 1.0)
    theirs = loss.RTDetrLoss(config)({"logits": logits[0], "pred_boxes": boxes[0]}, as_theirs((target,)))
    for name, value in terms.items():
        same(value[0], theirs[NAMES[name]], name)


def test_a_batch_without_objects_counts_the_same(rt):
    loss, config = rt
    targets = some_targets(0, (0, 0))
    logits, boxes = some_outputs(0, (1, 2, QUERIES))
    theirs = loss.RTDetrLoss(config)({"logits": logits[0], "pred_boxes": boxes[0]}, as_theirs(targets))
    for name, value in Criterion()(logits, boxes, targets, 1.0).items():
        same(value, theirs[NAMES[name]], name)


@pytest.mark.parametrize("counts", [(85, 85, 85, 85), (3, 0, 85, 20), (100, 1, 0, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_the_pairs_are_those_of_transformers(rt, seed, counts):
    loss, config = rt
    targets = some_targets(seed, counts)
    logits, boxes = some_outputs(seed, (LAYERS, len(counts), QUERIES), targets)
    ours = match(logits, boxes, targets)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    for layer in range(LAYERS):
        theirs = loss.RTDetrHungarianMatcher(config)(
            {"logits": logits[layer], "pred_boxes": boxes[layer]}, as_theirs(targets)
        )
        for image, (query, found) in enumerate(theirs):
            chosen = (ours.layer == layer) & (ours.image == image)
            assert ours.query[chosen].tolist() == query.tolist()
            assert (ours.object[chosen] - starts[image]).tolist() == found.tolist()


def reference_queries(targets, classes: int, number: int):
    from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group as draw

    labels, boxes, mask, meta = draw(as_theirs(targets), classes, QUERIES, lambda x: x, number)
    return labels, boxes.sigmoid(), mask == 0, meta


@pytest.mark.parametrize("counts", [(5, 0, 9, 1), (1,), (30, 40), (100, 2)])
def test_denoising_has_the_groups_the_places_and_the_mask_of_transformers(counts):
    targets = some_targets(1, counts)
    torch.manual_seed(0)
    asked = make_denoising(targets, CLASSES, 1, 100)
    labels, _, mask, meta = reference_queries(targets, CLASSES, 100)
    assert asked.groups == meta["dn_num_group"] and asked.labels.shape == labels.shape
    assert torch.equal(attention_mask(asked.labels.shape[1], asked.groups, QUERIES), mask)
    assert torch.equal(asked.labels == CLASSES, labels == CLASSES)  # the empty places
    for image, places in enumerate(meta["dn_positive_idx"]):
        chosen = asked.matches.image == image
        assert asked.matches.query[chosen].tolist() == places.tolist()
        expected = torch.arange(counts[image]).repeat(asked.groups) + sum(counts[:image])
        assert asked.matches.object[chosen].tolist() == expected.tolist()


def test_denoising_noise_has_the_distribution_of_transformers():
    box = torch.tensor([[0.5, 0.5, 0.2, 0.1]])
    targets = (Targets(box, torch.tensor([3]), torch.zeros(0, 4)),)
    torch.manual_seed(0)
    number = 20_000
    asked = make_denoising(targets, 80, 1, number)
    labels, boxes, *_ = reference_queries(targets, 80, number)
    changed, expected = ((x != 3).double().mean().item() for x in (asked.labels, labels))
    assert abs(changed - 0.25 * 79 / 80) < 0.01 and abs(changed - expected) < 0.01
    half = torch.tensor([0.1, 0.05, 0.1, 0.05])
    for start in (0, 1):  # positives, negatives
        moved = (cxcywh_to_xyxy(asked.boxes[0, start::2]) - cxcywh_to_xyxy(box)).abs() / half
        assert start - 1e-3 <= moved.min() and moved.max() <= start + 1 + 1e-3
        ours, theirs = asked.boxes[0, start::2].clamp(min=0), boxes[0, start::2].float()
        for number in range(4):  # edges that crossed have a size of 0 for both
            steps = torch.linspace(1e-3, float(ours[:, number].max()), 200)[:, None]
            gap = ((ours[:, number] < steps).double() - (theirs[:, number] < steps).double()).mean(1)
            assert gap.abs().max() < 0.02, (start, number, gap.abs().max())
