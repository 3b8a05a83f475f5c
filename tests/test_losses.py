"""What the losses promise besides parity: no waiting for the host, the right formula, no order of images or objects."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neo_nb.base.boxes import cxcywh_to_xyxy, paired_giou
from neo_nb.data.batch import Targets
from neo_nb.losses import matcher
from neo_nb.losses.criterion import Criterion, matchability_loss, varifocal_loss
from neo_nb.losses.denoising import attention_mask, make_denoising

CLASSES, QUERIES, LAYERS = 6, 60, 3


def batch(seed: int, counts=(4, 0, 11), ignore: bool = False):
    g = torch.Generator().manual_seed(seed)
    targets = []
    for n in counts:
        boxes = torch.cat([torch.rand(n, 2, generator=g) * 0.6 + 0.2, torch.rand(n, 2, generator=g) * 0.3 + 0.02], 1)
        region = torch.tensor([[0.5, 0.5, 0.4, 0.4]])[: int(ignore)]
        targets.append(Targets(boxes, torch.randint(CLASSES, (n,), generator=g), region))
    logits = torch.randn(LAYERS, len(counts), QUERIES, CLASSES, generator=g).requires_grad_()
    boxes = (torch.rand(LAYERS, len(counts), QUERIES, 4, generator=g) * 0.4 + 0.2).requires_grad_()
    return tuple(targets), logits, boxes


class Waits(TorchDispatchMode):
    "Counts the operations for which a GPU would have to be waited for."

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        masks = [
            i for a in args[1:] if isinstance(a, (list, tuple)) for i in a
            if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)
        ]  # fmt: skip
        if name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::equal",
            "aten::unique",
        ):
            self.found.append(name)
        if name.startswith("aten::repeat_interleave.Tensor") or ("index" in name and masks):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["vfl", "mal"])
@pytest.mark.parametrize("ignore", [False, True])
def test_nothing_but_the_matcher_waits_and_it_reads_once(monkeypatch, kind, ignore):
    targets, logits, boxes = batch(0, ignore=ignore)
    copies, solved = [], []
    read, solve = torch.Tensor.cpu, matcher.linear_sum_assignment
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or read(self))
    monkeypatch.setattr(matcher, "linear_sum_assignment", lambda cost: solved.append(cost.shape) or solve(cost))
    with Waits() as waits:
        asked = make_denoising(targets, CLASSES, LAYERS, 20)
        attention_mask(asked.labels.shape[1], asked.groups, QUERIES)
        predicted = torch.zeros(LAYERS, 3, asked.labels.shape[1], CLASSES, requires_grad=True)
        moved = asked.boxes.expand(LAYERS, -1, -1, -1).clone().requires_grad_()
        terms = Criterion(kind)(
            logits, boxes, targets, torch.tensor(15.0), encoder=(logits[0], boxes[0]),
            denoising=(predicted, moved, asked.matches, asked.groups),
        )  # fmt: skip
        sum(terms.values()).backward()
    assert waits.found == []
    assert copies == [(15, LAYERS + 1, QUERIES)]  # all layers and images, real pairs alone
    assert solved == [(4, QUERIES)] * 4 + [(11, QUERIES)] * 4


def test_the_counter_of_waits_sees_them():
    x = torch.arange(4.0)
    with Waits() as waits:
        x[x > 1], x.sum().item(), x.nonzero()
    assert {"aten::_local_scalar_dense", "aten::nonzero", "aten::index.Tensor"} <= set(waits.found)


@pytest.mark.parametrize("loss", [varifocal_loss, matchability_loss])
@pytest.mark.parametrize("seed", range(3))
def test_the_scores_losses_are_the_papers_formulas(loss, seed):
    g = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(50, 5, generator=g, dtype=torch.float64)).requires_grad_()
    matched = torch.rand(50, 5, generator=g) < 0.2
    quality = torch.rand(50, 5, generator=g) * matched
    p, q = logits.sigmoid(), quality.double()
    yes, no = -p.log(), -(1 - p).log()
    if loss is varifocal_loss:
        expected = torch.where(matched, q * (q * yes + (1 - q) * no), 0.75 * p.detach() ** 2 * no)
    else:
        expected = torch.where(matched, q**1.5 * yes + (1 - q**1.5) * no, p.detach() ** 1.5 * no)
    found = loss(logits, quality, matched)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [varifocal_loss, matchability_loss])
def test_the_scores_losses_stay_finite_for_any_logit(loss):
    logits = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4]).repeat(2, 1).requires_grad_()
    matched = torch.tensor([[True], [False]]).expand(2, 5)
    value = loss(logits, torch.tensor([[0.3], [0.0]]).expand(2, 5), matched)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("kind", ["vfl", "mal"])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_images_and_objects_does_not_matter(kind, seed):
    targets, logits, boxes = batch(seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(3)
    mixed = []
    for i in order:
        rows = torch.from_numpy(rng.permutation(len(targets[i])))
        mixed.append(Targets(targets[i].boxes[rows], targets[i].labels[rows], targets[i].ignore))
    first = Criterion(kind)(logits, boxes, targets, 15.0)
    second = Criterion(kind)(logits[:, order], boxes[:, order], tuple(mixed), 15.0)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)


def test_the_cost_is_the_same_whether_few_or_many_classes_occur():
    targets, logits, boxes = batch(1, (CLASSES - 1, 2 * CLASSES))
    logits, boxes = logits.detach(), boxes.detach()
    for image, target in enumerate(targets):
        one = logits[:, image : image + 1], boxes[:, image : image + 1], (target,)
        by_class = matcher.class_cost(logits[:, image])[..., target.labels].permute(2, 0, 1)
        geometry = matcher.pair_costs(*one, (0.0, 5.0, 2.0))
        torch.testing.assert_close(matcher.pair_costs(*one), 2 * by_class + geometry, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("piece", [1, 1000, 1 << 22])  # pairs at a time
def test_a_batch_s_costs_are_those_of_its_pairs_one_by_one(monkeypatch, piece):
    monkeypatch.setitem(matcher.PIECE, "cpu", piece)
    targets, logits, boxes = batch(2, (0, 1, 40, 0, 3))
    logits, boxes = logits.detach(), boxes.detach()
    costs, row = matcher.pair_costs(logits, boxes, targets), 0
    for image, target in enumerate(targets):
        for wanted, label in zip(target.boxes, target.labels):
            predicted = boxes[:, image]
            expected = 2 * matcher.class_cost(logits[:, image])[..., label] + 5 * (predicted - wanted).abs().sum(-1)
            corners = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted).expand_as(predicted)
            torch.testing.assert_close(costs[row], expected - 2 * paired_giou(*corners), rtol=1e-5, atol=1e-5)
            row += 1
    assert row == len(costs) == 44


class Counts(TorchDispatchMode):
    "Counts operations, and the bytes of the largest result."

    def __init__(self):
        super().__init__()
        self.number, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.number += 1
        own = isinstance(out, torch.Tensor) and not out._is_view()
        self.largest = max(self.largest, out.numel() * out.element_size() if own else 0)
        return out


def test_the_matcher_s_operations_do_not_grow_with_the_batch_nor_its_memory_with_the_crowd(monkeypatch):
    monkeypatch.setitem(matcher.PIECE, "cpu", matcher.PIECE["cuda"])
    found = {}
    for size, counts in (("one", (20,)), ("many", (20,) * 16), ("crowds", (391, 0, 1, 391, 391, 2))):
        targets, _, _ = batch(0, counts)
        logits, boxes = torch.randn(7, len(counts), 900, CLASSES), torch.rand(7, len(counts), 900, 4) * 0.4 + 0.2
        with torch.no_grad(), Counts() as found[size]:
            matcher.pair_costs(logits, boxes, targets)
    assert found["many"].number <= found["one"].number + 5 and found["many"].number < 120
    pairs = 7 * 900 * (3 * 391 + 3)
    assert found["crowds"].largest <= max(4 * pairs, 8 * 4 * matcher.PIECE["cuda"])
