"""Updates of a small model, alone or as one of several processes; what tests compare of them."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from neo_nb.base.annotations import Annotations
from neo_nb.losses.denoising import Denoising
from neo_nb.losses.matcher import Matches
from neo_nb.models.rtdetr import model as rtdetr
from neo_nb.train.config import make_config
from neo_nb.train.loop import Loop, chunks

DRAW = rtdetr.make_denoising


def crowds(folder: Path, counts: tuple[int, ...] = (1, 60, 1, 1)) -> Annotations:
    """Images of noise, with so many objects in each."""
    rng, boxes, size = np.random.default_rng(0), [], (96, 128)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(counts)):
        if not (folder / f"{i}.png").exists():
            cv2.imwrite(
                str(folder / f"{i}.png"), np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
            )
    for count in counts:
        corner = rng.uniform((0, 0), (100, 70), (count, 2))
        boxes.append(np.concatenate([corner, corner + rng.uniform(8, 24, (count, 2))], 1))
    offsets, total = np.cumsum([0, *counts]), sum(counts)
    names, sizes = [f"{i}.png" for i in range(len(counts))], [size] * len(counts)
    boxes, labels = np.concatenate(boxes).astype(np.float32), rng.integers(2, size=total)
    return Annotations(
        range(len(counts)), names, sizes, offsets, boxes, labels, ("a", "b"), root=folder, name="crowds"
    )


def same_denoising(whole: list) -> Any:
    """`make_denoising` that draws for all images, always the same, and gives each part its own of it."""

    def draw(targets, num_classes, layers, num_denoising=100, **noise):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            asked = DRAW(tuple(whole), num_classes, layers, num_denoising, **noise)
        rows = [next(i for i, t in enumerate(whole) if torch.equal(t.boxes, target.boxes)) for target in targets]
        starts = np.cumsum([0, *map(len, whole)])
        firsts, columns = np.cumsum([0, *map(len, targets)]), []
        pairs = torch.stack([getattr(asked.matches, name) for name in ("layer", "image", "query", "object")])
        for place, row in enumerate(rows):
            own = pairs[:, pairs[1] == row].clone()
            own[1], own[3] = place, own[3] - starts[row] + firsts[place]
            columns.append(own)
        return Denoising(asked.labels[rows], asked.boxes[rows], Matches(*torch.cat(columns, 1)), asked.groups)

    return draw


def make_loop(
    folder: Path, counts: tuple[int, ...] = (1, 60, 1, 1), num_denoising: int | None = 100, **config
) -> Loop:
    """A loop over all images of `crowds`, unaugmented, with neither clipping nor learning norms."""
    table = crowds(folder / "images", counts)
    base = dict(
        size=(96, 128),
        epochs=1,
        passes_per_epoch=1,
        batch_size=len(counts),
        grad_accum_steps=1,
        tracker="none",
        cache=False,
    )
    base |= dict(device="cpu", max_grad_norm=0.0, freeze_norms=True, policy="none", no_aug_epochs=0, overfit_batches=4)
    loop = Loop(make_config(**(base | config)), folder / "run", table, table)
    if num_denoising is not None:
        loop.model.config = replace(loop.model.config, num_denoising=num_denoising)
    loop.model.train()
    return loop


def all_targets(folder: Path, counts: tuple[int, ...] = (1, 60, 1, 1)) -> list:
    """The targets of all images, from one batch."""
    loop = make_loop(folder, counts)
    loop.loader.order.rank, loop.loader.order.world_size, loop.loader.order.batch_size = 0, 1, len(counts)
    return list(next(iter(loop.loader)).targets)


def gradients(loop: Loop, whole: list) -> dict[str, torch.Tensor]:
    """Of one update, as the optimizer gets them."""
    found, step = {}, loop.optimizer.step

    def look(*args):
        found.update({k: p.grad.detach().clone() for k, p in loop.model.named_parameters() if p.grad is not None})
        return step(*args)

    loop.optimizer.step, rtdetr.make_denoising = look, same_denoising(whole)
    try:
        loop.train_step(next(chunks(loop.loader, loop.grad_accum_steps)))
    finally:
        loop.optimizer.step, rtdetr.make_denoising = step, DRAW
    return found


def starve(loop: Loop, most: int) -> list[int]:
    """Let every part of more than `most` images run out of memory; what was tried is in the list."""
    tried, forward = [], loop.model.forward

    def out_of_memory(images, *rest):
        tried.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(images, *rest)

    loop.model.forward = out_of_memory
    return tried


def main(order: dict) -> None:
    torch.set_num_threads(1)
    folder, found = Path(order["folder"]), {}
    whole, config = all_targets(folder), order.get("config", {})
    # a dense detector has no denoising to set
    some = partial(make_loop, folder, batch_size=2, **({"num_denoising": None} if config else {}), **config)
    loop = some()
    rank = loop.accelerator.process_index
    found["gradients"] = gradients(loop, whole)
    found["noise"] = float(torch.rand(()))

    loop = some()
    tried = starve(loop, 1 if rank else 2)  # the second process alone runs out
    found["starved"], found["tried"], found["micro"] = gradients(loop, whole), tried, loop.micro

    loop = some(freeze_norms=False, freeze_epochs=1, epochs=2)
    for epoch in (0, 1):
        loop.progress["epoch"] = epoch
        loop._hold_backbone()
        loop.model.train()
        loop.train_step(next(chunks(loop.loader, 1)))
    found["state"], found["average"] = loop.model.state_dict(), loop.ema.model.state_dict()

    loop = some()
    if not config:
        found |= told_of_no_number(loop, rank)
    torch.save(found, folder / f"rank{rank}.pt")
    loop.accelerator.wait_for_everyone()
    loop.accelerator.end_training()


def told_of_no_number(loop: Loop, rank: int) -> dict[str, Any]:
    """What is said when one process alone sees a NaN, and its images."""
    found, plain = {}, loop.model.loss
    loop.model.loss = lambda out, *a, **k: plain(out if rank == 0 else replace_boxes(out), *a, **k)
    try:
        loop.train_step(next(chunks(loop.loader, 1)))
    except FloatingPointError as error:
        found["message"] = f"{type(error).__name__}: {error}"
    return found | {"images": next(iter(loop.loader)).image_index.tolist()}


def replace_boxes(outputs: rtdetr.Outputs) -> rtdetr.Outputs:
    """The outputs, their boxes no numbers."""
    return replace(outputs, decoder=replace(outputs.decoder, boxes=outputs.decoder.boxes * torch.nan))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
