"""The loader on files as they occur, on real images, and across processes."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from neo_nb.base.annotations import Annotations, load_annotations, save_annotations
from neo_nb.base.core import InputError
from neo_nb.data.augment import POLICIES
from neo_nb.data.loader import make_loader, read_image
from neo_nb.data.resize import prepare

BCCD = Path(os.environ.get("NEO_DATA", Path(__file__).parents[2] / "shared" / "data")) / "bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason=f"no real images at {BCCD}; set NEO_DATA")


def encoded(image: np.ndarray, kind: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    rng = np.random.default_rng(0)
    return cv2.GaussianBlur(rng.integers(0, 255, (120, 200, 3), dtype=np.uint8), (0, 0), 3)


@pytest.fixture(scope="module")
def table(tmp_path_factory, photo) -> Annotations:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(1)
    boxes, offsets = [], [0]
    for i in range(13):
        (folder / f"{i}.jpg").write_bytes(encoded(np.roll(photo, 7 * i, 1), "JPEG"))
        for _ in range(i % 5):
            x, y = rng.uniform(0, [150, 80])
            boxes.append([x, y, x + 30, y + 30])
        offsets.append(len(boxes))
    names, labels = [f"{i}.jpg" for i in range(13)], np.arange(len(boxes)) % 3
    crowd = np.arange(len(boxes)) % 4 == 3
    return Annotations(range(13), names, [(120, 200)] * 13, offsets, boxes, labels, "abc", root=folder, iscrowd=crowd)


def bits(batch) -> list:
    parts = [batch.images, batch.sizes, batch.original_sizes, batch.image_index]
    parts += [t for target in batch.targets for t in (target.boxes, target.labels, target.ignore)]
    return [p.numpy().tobytes() for p in parts]


# ---- files


@pytest.mark.parametrize(
    "kind, mode, options, off",
    [
        ("JPEG", "RGB", {}, 6),
        ("JPEG", "RGB", {"progressive": True}, 6),
        ("JPEG", "CMYK", {}, 6),
        ("JPEG", "L", {}, 60),
        ("PNG", "RGB", {}, 0),
        ("PNG", "RGBA", {}, 0),
        ("PNG", "L", {}, 60),
        ("PNG", "P", {}, 60),
        ("BMP", "RGB", {}, 0),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}, 0),
        ("WEBP", "RGB", {"lossless": True}, 0),
    ],
)
def test_every_kind_of_file_is_rgb_and_noticed_when_cut_off(tmp_path, photo, kind, mode, options, off):
    data = encoded(photo, kind, mode, **options)
    path = tmp_path / "image"
    path.write_bytes(data)
    image = read_image(path)
    assert image.dtype == np.uint8 and image.shape == photo.shape
    assert np.abs(image.astype(int) - photo).mean() <= off
    for part in (0.3, 0.6, 0.9, 0.999):
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(InputError, match=r"image: (the image is truncated|not a readable image)"):
            read_image(path)


def test_a_thumbnail_does_not_hide_that_the_image_is_cut_off(tmp_path, photo):
    exif = Image.Exif()
    exif[0x927C] = encoded(photo[:60, :80], "JPEG")  # a whole JPEG inside the header
    data = encoded(photo, "JPEG", exif=exif)
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    assert read_image(path).shape == photo.shape
    path.write_bytes(data + b"\0" * 100 + b"some camera's own notes")  # more after the end is no fault
    assert read_image(path).shape == photo.shape
    path.write_bytes(data[: int(len(data) * 0.8)])
    with pytest.raises(InputError, match="truncated"):
        read_image(path)


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    cv2.imwrite(str(tmp_path / "deep.png"), ramp)
    image = read_image(tmp_path / "deep.png")
    assert np.abs(image[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_annotated_size_decides_whether_exif_turns(tmp_path, photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "turned.jpg").write_bytes(encoded(photo, "JPEG", exif=exif))
    shown = read_image(tmp_path / "turned.jpg")
    assert shown.shape[:2] == ((120, 200) if orientation < 5 else (200, 120))
    assert read_image(tmp_path / "turned.jpg", (120, 200)).shape[:2] == (120, 200)
    turned = (200, 120) if orientation > 4 else (120, 200)
    assert read_image(tmp_path / "turned.jpg", turned).shape[:2] == turned


def test_no_image_at_all(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(InputError, match=r"page.jpg: not a readable image \(16 bytes\)"):
        read_image(tmp_path / "page.jpg")
    with pytest.raises(InputError, match="cannot be read"):
        read_image(tmp_path)


# ---- processes


OPTIONS = dict(size=(60, 100), divisor=32, batch_size=4, shuffle=True, seed=3, quiet=True)
HARD = dict(policy="camera", mosaic=0.4, mixup=0.4, sizes=[(60, 100), (48, 80), (90, 150)])


@pytest.mark.parametrize("cache", [False, True])
def test_workers_and_interruptions_change_nothing(table, cache):
    straight = make_loader(table, **OPTIONS, **HARD, cache=cache)
    wanted = {}
    for epoch in range(3):
        straight.set_epoch(epoch)
        wanted[epoch] = [bits(b) for b in straight]
        assert len(wanted[epoch]) == len(straight) == 4
    other = make_loader(table, **OPTIONS, **HARD, cache=cache, num_workers=2)
    for epoch, start in ((2, 1), (0, 0), (1, 3), (2, 4)):
        other.set_epoch(epoch, start)
        assert [bits(b) for b in other] == wanted[epoch][start:]
    other.set_epoch(0)
    for _ in other:  # left in the middle, with batches under way
        break
    other.set_epoch(1)
    assert [bits(b) for b in other] == wanted[1]


def test_another_seed_is_another_epoch(table):
    first, second = (make_loader(table, **(OPTIONS | dict(seed=s)), **HARD) for s in (0, 1))
    assert [bits(b) for b in first] != [bits(b) for b in second]


def test_a_view_does_not_depend_on_its_batch(table):
    small, large = (
        make_loader(table, **(OPTIONS | dict(batch_size=b, shuffle=s)), policy="strong")
        for b, s in ((1, False), (13, True))
    )
    views = {int(b.image_index[0]): (b.images[0], b.targets[0].boxes) for b in small}
    batch = next(iter(large))
    for row, image, targets in zip(batch.image_index.tolist(), batch.images, batch.targets):
        assert torch.equal(image, views[row][0]) and torch.equal(targets.boxes, views[row][1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one_process(table, world_size):
    whole = make_loader(table, **(OPTIONS | dict(batch_size=2 * world_size)), **HARD)
    ranks = [
        make_loader(table, **(OPTIONS | dict(batch_size=2)), **HARD, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    assert len({len(r) for r in ranks}) == 1
    for batch, *parts in zip(whole, *ranks):
        for rank, part in enumerate(parts):
            assert torch.equal(part.image_index, batch.image_index[rank::world_size])
            assert torch.equal(part.images, batch.images[rank::world_size])


def test_validation_ranks_partition_the_table(table):
    rows = []
    for rank in range(4):
        loader = make_loader(table, **(OPTIONS | dict(shuffle=False)), rank=rank, world_size=4)
        rows += [r for b in loader for r in b.image_index.tolist()]
    assert sorted(rows) == list(range(13))


def test_a_mapped_table_serves_workers(table, tmp_path):
    save_annotations(table, tmp_path / "table")
    mapped = load_annotations(tmp_path / "table")
    assert isinstance(mapped.labels, np.memmap)
    plain, other = make_loader(table, **OPTIONS), make_loader(mapped, **OPTIONS, num_workers=2)
    assert [bits(b) for b in plain] == [bits(b) for b in other]


def test_workers_start_after_opencv_used_threads(tmp_path):
    large = cv2.resize(np.random.default_rng(0).integers(0, 255, (27, 48, 3), dtype=np.uint8), (1920, 1080))
    for i in range(4):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), large)
    cv2.GaussianBlur(large, (0, 0), 5)  # the parent's pool of threads now exists; a fork does not inherit it
    table = Annotations(
        range(4),
        [f"{i}.jpg" for i in range(4)],
        [(1080, 1920)] * 4,
        [0] * 5,
        np.zeros((0, 4)),
        [],
        ["a"],
        root=tmp_path,
    )
    options = dict(size=(1080, 1920), divisor=32, batch_size=2, policy="strong", quiet=True)
    plain, forked = (make_loader(table, **options, num_workers=w) for w in (0, 2))
    assert [bits(b) for b in plain] == [bits(b) for b in forked]
    assert next(iter(plain)).images.shape == (2, 3, 1088, 1920)


def test_a_fault_in_a_worker_is_one_line(table, tmp_path):
    for path in table.root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "7.jpg").write_bytes((tmp_path / "7.jpg").read_bytes()[:900])
    broken = Annotations(**{f: getattr(table, f) for f in table.__dataclass_fields__} | {"root": tmp_path})
    for num_workers in (0, 2):
        with pytest.raises(InputError) as error:
            list(make_loader(broken, **OPTIONS, num_workers=num_workers))
        assert "\n" not in str(error.value) and f"{tmp_path / '7.jpg'}: the image is truncated" in str(error.value)


def test_files_stay_closed(table):
    loader = make_loader(table, **(OPTIONS | dict(batch_size=1)), num_workers=1)
    kept, before = [], None
    for epoch in range(4):
        loader.set_epoch(epoch)
        kept += [b.targets for b in loader]  # someone may keep the targets
        before = before or len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) < before + 20


# ---- real images


def bccd(split: str) -> Annotations:
    data = json.loads((BCCD / "annotations" / f"instances_{split}.json").read_text())
    boxes = {image["id"]: [] for image in data["images"]}
    for row in data["annotations"]:
        boxes[row["image_id"]].append(row)
    rows = [row for image in data["images"] for row in boxes[image["id"]]]
    xywh, categories = np.float32([row["bbox"] for row in rows]), [c["id"] for c in data["categories"]]
    return Annotations(
        [image["id"] for image in data["images"]],
        [Path(image["file_name"]).name for image in data["images"]],
        [(image["height"], image["width"]) for image in data["images"]],
        np.cumsum([0] + [len(boxes[image["id"]]) for image in data["images"]]),
        np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
        [categories.index(row["category_id"]) for row in rows],
        [c["name"] for c in data["categories"]],
        root=BCCD / "images" / split,
        name=f"bccd/{split}",
    )


@needs_bccd
def test_prediction_and_validation_scale_alike():
    table = bccd("val").select(range(8))
    batch = next(iter(make_loader(table, size=(240, 320), divisor=32, batch_size=8, quiet=True)))
    images = [read_image(table[i].path) for i in range(8)]
    same = prepare(images, (240, 320), 32)
    for key in ("images", "sizes", "original_sizes"):
        assert torch.equal(getattr(batch, key), getattr(same, key))


@needs_bccd
@pytest.mark.parametrize("policy", POLICIES)
def test_real_images_through_every_policy(policy, capsys):
    loader = make_loader(
        bccd("train"), size=(240, 320), divisor=32, batch_size=16, policy=policy, shuffle=True, mosaic=0.2, cache=True
    )
    assert "degenerate: left out" in capsys.readouterr().err and "cache: 205 images, 45 MiB" in loader.notes
    start, images = time.perf_counter(), 0
    for batch in loader:
        images += len(batch)
        for targets in batch.targets:
            low, high = (
                targets.boxes[:, :2] - targets.boxes[:, 2:] / 2,
                targets.boxes[:, :2] + targets.boxes[:, 2:] / 2,
            )
            assert len(targets) <= loader.max_objects and (targets.boxes[:, 2:] > 0).all()
            assert (low > -1e-5).all() and (high < 1 + 1e-5).all() and (targets.labels < 3).all()
    assert images == 205 == loader.counts["images"]
    print(f"{policy}: {(time.perf_counter() - start) * 1000 / images:.2f} ms per image, {loader.counts}")


def test_two_processes_draw_the_same_scenes_at_once(tmp_path):
    """Whoever comes second reads what the first drew, or draws the same; nobody reads a table half made."""
    manifest = tmp_path / "drawn.yaml"
    manifest.write_text(
        "format: scenes\nroot: drawn\nclasses: [person, head]\nsize: [90, 160]\nsplits:\n  val: {num_images: 12}\n"
    )
    code = (
        "import sys; from neo_nb.base.annotations import fingerprint; from neo_nb.data.manifest import load_dataset;"
        "t = load_dataset(sys.argv[1], 'val'); assert all((t.root / f).is_file() for f in t.file_names.tolist());"
        "print(fingerprint(t))"
    )
    environment = os.environ | {"NEO_DATA": str(tmp_path / "data")}
    words = [sys.executable, "-c", code, str(manifest)]
    both = [subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    predicted = {process.communicate(timeout=120)[0] for process in both}
    assert all(process.returncode == 0 for process in both) and len(predicted) == 1
