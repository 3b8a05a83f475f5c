"""What a training step of each model keeps for its backward pass: the rows of `Family.memory`.

    python tests/training_memory.py [PATTERN ...]

Two images of 640 x 640 with four objects each, in training, on this CPU; parameters in millions, and bytes per pixel of
the input in fp32 and under autocast in bf16, each storage counted once and parameters left out."""

import gc
import sys

import numpy as np
import torch

from neo_nb.base.keypoints import COCO_PERSON
from neo_nb.base.masks import Masks
from neo_nb.data.batch import Targets
from neo_nb.models.zoo import create_model, list_models, task_of

SIDE = 640


def objects(task: str) -> Targets:
    "Four squares with masks, keypoints and a map."
    boxes = torch.tensor([[x, y, 0.3, 0.3] for x in (0.25, 0.75) for y in (0.25, 0.75)])
    corners = (boxes * SIDE).numpy()
    rings = [[[x - 90, y - 90, x + 90, y - 90, x + 90, y + 90, x - 90, y + 90]] for x, y, _, _ in corners.tolist()]
    points = torch.cat([boxes[:, None, :2].expand(-1, 17, -1), torch.full((4, 17, 1), 2.0)], -1)
    masks = Masks.from_coco(rings, np.full((4, 2), SIDE))
    classes = torch.randint(0, 4, (SIDE, SIDE)).byte() if task == "semantic" else None
    return Targets(boxes, torch.zeros(4, dtype=torch.int64), torch.zeros(0, 4), points, masks, classes)


def kept(name: str, half: bool) -> float:
    "Bytes per pixel."
    gc.collect()  # the last graph, of several gigabytes, may go in circles
    task = task_of(name)
    torch.manual_seed(0)
    model = create_model(name, 4, skeleton=COCO_PERSON if task == "pose" else None).train()
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    targets = (objects(task),) * 2
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = model(images, torch.full((2, 2), SIDE), targets)
        total = sum(model.loss(outputs, targets).values())
    assert total.requires_grad
    return sum(seen.values()) / (2 * SIDE**2)


def main() -> None:
    "A row for each model."
    for pattern in sys.argv[1:] or ("*",):
        for name in list_models(pattern):
            millions = sum(p.numel() for p in create_model(
                name, 80, skeleton=COCO_PERSON if task_of(name) == "pose" else None).parameters()) / 1e6  # fmt: skip
            try:
                row = f"{millions:.2f}, {kept(name, False):.0f}, {kept(name, True):.0f}"
            except (RuntimeError, ValueError) as error:
                row = f"{millions:.2f}, ?, ?  # {type(error).__name__}: {str(error)[:80]}"
            print(f'"{name}": ({row}),', flush=True)


if __name__ == "__main__":
    main()
