"""Large data sets: read by several processes, kept, mapped, read anew when a file says something else."""

import multiprocessing
import os
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from neo_nb.base import table_cache
from neo_nb.base.annotations import Annotations, fingerprint
from neo_nb.base.core import InputError
from neo_nb.data import label_files
from neo_nb.data.coco import write_coco
from neo_nb.data.manifest import load_dataset
from neo_nb.data.yolo import read_yolo

IMAGES = 2400  # more than are read by one process


@pytest.fixture(scope="module")
def crowd(tmp_path_factory) -> Path:
    "A YOLO data set of many images, links to one file, with a long tail of crowds."
    root = tmp_path_factory.mktemp("crowd")
    for part in ("images/train", "labels/train"):
        (root / part).mkdir(parents=True)
    cv2.imwrite(str(root / "one.jpg"), np.full((1080, 1920, 3), 90, np.uint8))
    rng = np.random.default_rng(0)
    for i, count in enumerate(np.minimum(rng.lognormal(3, 1, IMAGES), 400).astype(int).tolist()):
        (root / f"images/train/{i:05d}.jpg").symlink_to(root / "one.jpg")
        rows = np.concatenate([rng.uniform(0.1, 0.9, (count, 2)), rng.uniform(0.01, 0.1, (count, 2))], 1)
        text = "".join(f"{i % 2} {' '.join(f'{v:.6f}' for v in row)}\n" for i, row in enumerate(rows.tolist()))
        if i:  # the first image has no label file
            (root / f"labels/train/{i:05d}.txt").write_text(text)
    (root / "data.yaml").write_text("train: images/train\nnames: [person, head]\n")
    (root / "crowd.yaml").write_text(f"format: yolo\nroot: {root}\nsplits: {{train: {{}}}}\n")
    return root


@pytest.fixture
def kept(tmp_path, monkeypatch):
    "A cache of the test's own, in which everything is kept and no file is too young."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(table_cache, "QUICK", 0.0)
    monkeypatch.setattr(table_cache, "YOUNG", -10.0)
    return tmp_path / "cache"


def test_several_processes_read_what_one_reads(crowd, monkeypatch):
    together = read_yolo(crowd / "data.yaml", "train")
    monkeypatch.setattr(label_files, "MANY", 10**9)
    alone = read_yolo(crowd / "data.yaml", "train")
    assert fingerprint(together) == fingerprint(alone) and np.array_equal(together.lines, alone.lines)
    assert len(together) == IMAGES and together.offsets[1] == 0  # no label file: no objects


def test_a_table_is_mapped_the_second_time(crowd, kept, monkeypatch):
    first = load_dataset(crowd / "crowd.yaml", "train")
    monkeypatch.setattr("neo_nb.data.manifest.read_yolo", None)  # whoever reads again fails
    second = load_dataset(crowd / "crowd.yaml", "train")
    assert isinstance(second.boxes_xyxy, np.memmap) and fingerprint(first) == fingerprint(second)
    assert (second.name, second.root) == (first.name, first.root)


def test_content_decides_and_not_the_date(crowd, kept):
    before = load_dataset(crowd / "crowd.yaml", "train")
    label = crowd / "labels/train/00005.txt"
    text, status = label.read_text(), label.stat()
    try:
        label.write_text("1" + text[1:])  # another class, as long as before
        os.utime(label, ns=(status.st_atime_ns, status.st_mtime_ns))
        after = load_dataset(crowd / "crowd.yaml", "train")
        assert after.labels[after.offsets[5]] == 1 and before.labels[before.offsets[5]] == 0
        assert len(list(kept.rglob("table.json"))) == 1, "the table of before is gone"
    finally:
        label.write_text(text)
    assert fingerprint(load_dataset(crowd / "crowd.yaml", "train")) == fingerprint(before)


def test_a_label_that_was_missing_counts(crowd, kept):
    before = load_dataset(crowd / "crowd.yaml", "train")
    new = crowd / "labels/train/00000.txt"
    new.write_text("0 .5 .5 .1 .1\n")
    try:
        assert len(load_dataset(crowd / "crowd.yaml", "train").labels) == len(before.labels) + 1
    finally:
        new.unlink()


def test_a_file_that_changes_while_it_is_read_is_not_kept(crowd, kept, monkeypatch):
    truth = read_yolo(crowd / "data.yaml", "train").select(range(20))
    write_coco(truth, crowd / "few.json")
    (crowd / "few.yaml").write_text(f"format: coco\nroot: {crowd}\nsplits: {{train: {{annotations: few.json}}}}\n")
    from neo_nb.data import manifest

    plain = manifest.read_coco

    def changed(*args):
        table = plain(*args)
        write_coco(truth.select(range(10)), crowd / "few.json")  # replaced by somebody else meanwhile
        return table

    monkeypatch.setattr(manifest, "read_coco", changed)
    assert len(load_dataset(crowd / "few.yaml", "train")) == 20
    monkeypatch.setattr(manifest, "read_coco", plain)
    assert len(load_dataset(crowd / "few.yaml", "train")) == 10


def test_damage_in_the_cache_is_read_over(crowd, kept):
    before = load_dataset(crowd / "crowd.yaml", "train")
    for path in kept.rglob("boxes_xyxy.npy"):
        path.unlink()  # whoever has it mapped keeps it
        path.write_bytes(b"no array")
    assert fingerprint(load_dataset(crowd / "crowd.yaml", "train")) == fingerprint(before)


def go_through(table: Annotations, answers) -> None:
    before = psutil.Process().memory_full_info().uss
    total = sum(float(table[i].boxes_xyxy.sum()) for i in range(len(table)))
    answers.put((psutil.Process().memory_full_info().uss - before, total))


def test_loader_processes_share_the_table(crowd, kept):
    load_dataset(crowd / "crowd.yaml", "train")
    table = load_dataset(crowd / "crowd.yaml", "train")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=go_through, args=(table, answers))
    process.start()
    adds, total = answers.get(timeout=60)
    process.join()
    assert total == pytest.approx(float(table.boxes_xyxy.sum(dtype=np.float64)), rel=1e-4)
    assert adds < 30 * 2**20, f"{adds / 2**20:.0f} MiB"


def test_links_lists_and_empty_folders(crowd, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/all").symlink_to(crowd / "images/train")
    (tmp_path / "images/again").symlink_to(tmp_path / "images")  # round in a circle
    (tmp_path / "list.txt").write_text("images\\all\\00003.jpg\nimages/all/00003.jpg\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.yaml").write_text("train: images\nval: list.txt\ntest: empty\nnames: [person, head]\n")
    assert len(read_yolo(tmp_path / "data.yaml", "train")) == IMAGES
    problems = []
    assert len(read_yolo(tmp_path / "data.yaml", "val", problems=problems)) == 1
    assert [issue.check for issue in problems] == ["image-listed-twice"]
    problems = []
    assert len(read_yolo(tmp_path / "data.yaml", "test", problems=problems)) == 0
    assert [issue.check for issue in problems] == ["folder-empty"]
    with pytest.raises(InputError, match="does not exist"):
        (tmp_path / "gone.yaml").write_text("train: none\nnames: [a]\n")
        read_yolo(tmp_path / "gone.yaml", "train")
