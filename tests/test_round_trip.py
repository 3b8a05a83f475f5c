"""Tables that come back from every format as they went in."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from neo_nb.base.annotations import Annotations
from neo_nb.data.coco import read_coco, write_coco
from neo_nb.data.dice import read_dice, write_dice
from neo_nb.data.voc import read_voc, write_voc
from neo_nb.data.yolo import read_yolo, write_yolo

FORMATS = ("coco", "dice", "yolo", "voc")


def random_table(root: Path, seed: int) -> Annotations:
    """Images on disk and boxes on them: empty images, ignore regions, odd names, ids in any order."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 6))
    sizes = rng.integers(8, 200, (n, 2))
    stems = ["a b", "ä", "x.y", "ünï cödé", "1"]
    names = [f"images/val/{stems[i]}.{'png' if i % 2 else 'bmp'}" for i in range(n)]
    (root / "images/val").mkdir(parents=True, exist_ok=True)
    for name, (h, w) in zip(names, sizes):
        cv2.imencode(Path(name).suffix, np.zeros((h, w, 3), np.uint8))[1].tofile(root / name)
    order = np.argsort(names)
    names, sizes = [names[i] for i in order], sizes[order]
    counts = rng.integers(0, 5, n)
    m = int(counts.sum())
    hw = np.repeat(sizes, counts, axis=0)
    corners = np.sort(rng.uniform(0, 1, (m, 2, 2)), axis=1) * hw[:, None, ::-1]
    return Annotations(
        image_ids=rng.choice(1000, n, replace=False) + 1,
        file_names=names,
        sizes=sizes,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes_xyxy=corners.reshape(m, 4),
        labels=rng.integers(0, 3, m),
        class_names=("person", "head & shoulders", "zebra"),
        category_ids=(3, 1, 90),
        root=root,
        iscrowd=rng.random(m) < 0.2,
        box_ids=rng.choice(10_000, m, replace=False) + 1,
    )


def there_and_back(table: Annotations, kind: str, folder: Path) -> Annotations:
    """Write a table in a format and read it again."""
    if kind == "coco":
        return read_coco(write_coco(table, folder / "a.json"), table.root)
    if kind == "dice":
        return read_dice(write_dice(table, folder / "a.json"), table.root)
    if kind == "voc":
        return read_voc(write_voc(table, folder / "xml"), table.root)
    return read_yolo(write_yolo({"val": table}, folder / "yolo"), "val")


def rows(table: Annotations) -> list[tuple]:
    """What a table says, box by box, in the order of its annotation ids."""
    keys = zip(
        table.box_ids.tolist(),
        table.image_ids[table.image_index].tolist(),
        [table.class_names[i] for i in table.labels],
        [table.category_ids[i] for i in table.labels],
        table.iscrowd.tolist(),
    )
    return sorted(keys)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seed", range(8))
def test_round_trip(tmp_path, kind, seed):
    table = random_table(tmp_path, seed)
    again = there_and_back(table, kind, tmp_path)
    assert rows(again) == rows(table)
    assert again.image_ids.tolist() == table.image_ids.tolist()
    assert [Path(n).name for n in again.file_names] == [Path(n).name for n in table.file_names]
    assert again.sizes.tolist() == table.sizes.tolist()
    assert (again.class_names, again.category_ids) == (table.class_names, table.category_ids)
    one, two = (t.boxes_xyxy[np.argsort(t.box_ids)] for t in (table, again))
    assert np.abs(one - two).max(initial=0) < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_through_all_formats_in_a_row(tmp_path, seed):
    table = first = random_table(tmp_path, seed)
    for kind in ("voc", "coco", "yolo", "dice", "voc", "yolo", "coco"):
        folder = tmp_path / f"{kind}-{np.random.default_rng().integers(10**9)}"
        table = there_and_back(table, kind, folder)
    assert rows(table) == rows(first)
    one, two = (t.boxes_xyxy[np.argsort(t.box_ids)] for t in (table, first))
    assert np.abs(one - two).max(initial=0) < 1e-3
