"""A training in a process of its own, for tests that kill it, starve it or run it twice at once."""

import json
import os
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from neo_nb.base.annotations import Annotations


def images(folder: Path, count: int = 12, size: tuple[int, int] = (96, 128), seed: int = 0) -> Annotations:
    """Noise with bright rectangles of two shapes, written as PNG; every fifth image is empty."""
    rng, boxes, labels, offsets = np.random.default_rng(seed), [], [], [0]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = rng.integers(0, 60, (*size, 3), dtype=np.uint8)
        for _ in range(0 if i % 5 == 4 else int(rng.integers(1, 5))):
            label = int(rng.integers(2))
            w, h = (40, 16) if label else (16, 32)
            x, y = int(rng.integers(size[1] - w)), int(rng.integers(size[0] - h))
            image[y : y + h, x : x + w] = rng.integers(120, 255, 3)
            boxes.append((x, y, x + w, y + h))
            labels.append(label)
        offsets.append(len(boxes))
        cv2.imwrite(str(folder / f"{i}.png"), image)
    names, sizes = [f"{i}.png" for i in range(count)], [size] * count
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Annotations(range(count), names, sizes, offsets, boxes, labels, ("tall", "wide"), root=folder, name="drawn")


def without_objects(table: Annotations, rows: list[int]) -> Annotations:
    """The same images, those of `rows` without their boxes."""
    return table.select_boxes(~np.isin(table.image_index, rows))


def stop_after_an_epoch(trainer) -> None:
    """Let the operating system ask the training to stop, once its first epoch is evaluated."""
    evaluate_epoch = trainer.evaluate_epoch

    def stop():
        found = evaluate_epoch()
        if trainer.progress["epoch"] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    trainer.evaluate_epoch = stop


def main(order: dict) -> None:
    import torch

    torch.set_num_threads(1)
    from neo_nb.train.config import make_config
    from neo_nb.train.trainer import Trainer

    table = images(Path(order["images"]), order.get("count", 12))
    if "empty" in order:
        table = without_objects(table, order["empty"])
    base = dict(
        size=(96, 128),
        epochs=2,
        passes_per_epoch=1,
        batch_size=4,
        tracker="none",
        cache=False,
        device="cpu",
        no_aug_epochs=1,
    )
    trainer = Trainer(make_config(**(base | order["config"])), Path(order["run"]), table, table)
    if order.get("no_denoising"):  # its noise is each process's own
        trainer.model.config = replace(trainer.model.config, num_denoising=0)
    if order.get("resume"):
        trainer.load(Path(order["run"]) / "weights" / "last.pt")
    plain_update, losses = trainer.train_step, []

    def update(batches, stop=False):
        values, stop = plain_update(batches, stop)
        losses.append(float(trainer.accelerator.reduce(values["loss"], "mean")))
        if len(losses) == order.get("kill_after"):
            os.kill(os.getpid(), getattr(signal, order.get("signal", "SIGKILL")))
        return values, stop

    trainer.train_step = update
    if "megabytes" in order:  # what the process may take from here on
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + order["megabytes"] * 2**20,) * 2)
    result = trainer.fit()
    if trainer.accelerator.is_main_process:
        done = {"losses": losses, "micro": trainer.micro}
        Path(order["run"], "done.json").write_text(json.dumps(done | {"interrupted": result["interrupted"]}))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
