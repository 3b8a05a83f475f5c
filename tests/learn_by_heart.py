"""Crowded scenes learned by heart, by detectors on a frozen backbone: what a detector that can learn at all must manage.

python tests/learn_by_heart.py MODEL FOLDER trains one on eight scenes until AP50 is .9 or its updates are over, about
ten minutes for dinov3_detr_nano, and prints AP50 by update. `test_crowds.py` has a short form of it."""

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from neo_nb.base.annotations import Annotations
from neo_nb.train.config import make_config
from neo_nb.train.trainer import Trainer

SIZE = (128, 192)  # (height, width)
OBJECTS = 20  # In each image
SETTINGS: dict[str, dict[str, Any]] = {
    "dinov3_detr_nano": {"epochs": 6, "passes_per_epoch": 1000, "lr": 1e-3, "max_grad_norm": 0.1}
    | {"schedule": "flatcosine", "flat": 0.6, "final_lr_fraction": 0.02},
    "dinov3_rtdetr_nano": {"epochs": 6, "passes_per_epoch": 50},
}


def crowded(folder: Path, images: int = 8) -> Annotations:
    "Images full of rectangles of two colours."
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    boxes, labels = [], []
    for number in range(images):
        image = rng.normal(90, 4, (*SIZE, 3)).clip(0, 255).astype(np.uint8)
        cells = [(x, y) for x in range(0, SIZE[1] - 20, 32) for y in range(0, SIZE[0] - 20, 32)]
        for cell in rng.permutation(len(cells))[:OBJECTS]:
            x, y = np.array(cells[cell]) + rng.integers(0, 6, 2)
            w, h = rng.integers(14, 27, 2)
            label = int(rng.integers(2))
            colour = ((240, 40, 40), (40, 220, 60))[label]
            cv2.rectangle(image, (int(x), int(y)), (int(x + w - 1), int(y + h - 1)), colour, -1)
            boxes.append((x, y, x + w, y + h))
            labels.append(label)
        cv2.imwrite(str(folder / f"{number}.png"), image)
    names = [f"{number}.png" for number in range(images)]
    ends = [OBJECTS * number for number in range(images + 1)]
    return Annotations(list(range(images)), names, [SIZE] * images, ends, np.array(boxes), labels, ("person", "head"),
                       root=folder, name="crowd/train")  # fmt: skip


def learn(table: Annotations, folder: Path, model: str, **settings: Any) -> Trainer:
    "A training on these images alone, evaluated on them."
    own = {"size": SIZE, "batch_size": len(table), "policy": "none", "no_aug_epochs": 0, "cache": True, "ema": 0.98}
    own |= {"tracker": "none", "device": "cpu", "num_queries": 40} | SETTINGS[model] | settings
    trainer = Trainer(make_config(model=model, **own), folder, table, table)
    trainer._enough = lambda: trainer.history[-1]["AP50"] >= 0.9
    trainer.fit()
    return trainer


if __name__ == "__main__":
    name, place = sys.argv[1], Path(sys.argv[2])
    found = learn(crowded(place / "images"), place / "run", name)
    print(name, {row["step"]: round(row["AP50"], 3) for row in found.history})
    sys.exit(int(found.history[-1]["AP50"] < 0.9))
