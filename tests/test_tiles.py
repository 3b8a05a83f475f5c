"""Tiles, merging, regions and slices against plain loops over random cases, and from one end to the other."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from neo_nb.annotations import Annotations
from neo_nb.cli import main
from neo_nb.core import InputError, workspace_root
from neo_nb.data.loader import read_image
from neo_nb.data.merge import merge_tiles, to_whole
from neo_nb.data.tiles import SMALL, Regions, make_tiles, tile_grid, tile_id, tile_table, whole_of
from neo_nb.deploy.artifact import Artifact, load_artifact
from neo_nb.deploy.sliced import SlicedArtifact
from neo_nb.detections import Detections

ROOT = workspace_root(Path(__file__).parent)


# windows


def a_grid(rng):
    "A random picture, tile and overlap."
    size = tuple(int(n) for n in rng.integers(1, 400, 2))
    tile = tuple(int(n) for n in rng.integers(1, 200, 2))
    return size, tile, float(rng.choice([0.0, 0.1, 0.2, 1 / 3, 0.5, rng.uniform(0, 0.8)]))


@pytest.mark.parametrize("seed", range(150))
def test_windows_cover_the_picture_and_overlap_as_they_must(seed):
    rng = np.random.default_rng(seed)
    size, tile, overlap = a_grid(rng)
    windows = tile_grid(size, tile, overlap)
    seen = np.zeros(size, np.int32)
    for x1, y1, x2, y2 in windows.tolist():
        assert 0 <= x1 < x2 <= size[1] and 0 <= y1 < y2 <= size[0]
        assert (y2 - y1, x2 - x1) == (min(tile[0], size[0]), min(tile[1], size[1]))
        seen[y1:y2, x1:x2] += 1
    assert seen.min() >= 1 and len(set(map(tuple, windows.tolist()))) == len(windows)
    for side, low in ((0, 1), (1, 0)):  # height: y1; width: x1
        starts = sorted(set(windows[:, low].tolist()))
        needed = int(tile[side] * overlap + 1e-9)
        assert all(a + tile[side] - b >= needed for a, b in zip(starts, starts[1:]))
        # no fewer windows could do it
        step = tile[side] * (1 - overlap)
        assert len(starts) <= 1 or (len(starts) - 2) * step + tile[side] < size[side]


@pytest.mark.parametrize("seed", range(60))
def test_an_object_not_larger_than_the_overlap_is_whole_in_a_tile(seed):
    rng = np.random.default_rng(1000 + seed)
    size, tile, overlap = a_grid(rng)
    windows = tile_grid(size, tile, overlap)
    most = np.array([min(int(t * overlap + 1e-9), s) for t, s in zip(tile, size)])
    for _ in range(50):
        h, w = (float(rng.uniform(0, n)) if rng.random() < 0.5 else float(n) for n in most)
        y, x = float(rng.uniform(0, size[0] - h)), float(rng.uniform(0, size[1] - w))
        assert any(x1 <= x and y1 <= y and x + w <= x2 and y + h <= y2 for x1, y1, x2, y2 in windows.tolist())


@pytest.mark.parametrize("size, tile, overlap", [((0, 5), (3, 3), 0), ((5, 5), (3, 0), 0), ((5, 5), (3, 3), 1)])
def test_windows_that_make_no_sense(size, tile, overlap):
    with pytest.raises(InputError, match="must be positive"):
        tile_grid(size, tile, overlap)


def test_a_tile_is_named_by_its_picture_and_place():
    for picture in ("7", "a@b", "mail@1,2,3,4", "shot#3", "#", "", "x y"):
        if picture:
            assert whole_of(tile_id(picture, (1, 2, 30, 40))) == (picture, (1, 2, 30, 40))
            assert whole_of(tile_id(picture, (1, 2, 30, 40)) + "#2") == (picture, (1, 2, 30, 40))
    for name in ("", "7", "@1,2,3,4", "7@1,2,3", "7@1,2,3,-4", "7@1,2,3,x", "7@1,2,3,4#x"):
        with pytest.raises(InputError, match="is no tile"):
            whole_of(name)


# what tiles hold


def a_table(rng, pictures=4, most=14):
    "Random pictures with boxes of all sizes, some of them crowds, some without any."
    sizes = rng.integers(40, 260, (pictures, 2))
    counts = rng.integers(0, most, pictures) * (rng.random(pictures) < 0.8)
    boxes = []
    for (h, w), count in zip(sizes.tolist(), counts.tolist()):
        for _ in range(count):
            bw, bh = np.minimum(np.exp(rng.uniform(np.log(2), np.log(250), 2)), (w, h))
            x, y = rng.uniform(0, w - bw), rng.uniform(0, h - bh)
            boxes.append((x, y, x + bw, y + bh))
    count = int(counts.sum())
    return Annotations(
        np.arange(pictures) * 3 + 5, [f"{i}.png" for i in range(pictures)], sizes,
        np.concatenate([[0], np.cumsum(counts)]), np.array(boxes, np.float32).reshape(-1, 4),
        rng.integers(0, 3, count), ("a", "b", "c"), iscrowd=rng.random(count) < 0.15, name="random",
        lines=np.arange(count), tags=rng.choice(["", "night", "night rain"], pictures),
        weights=rng.uniform(0.5, 4, pictures),
    )  # fmt: skip


def by_loop(table, tile, overlap, min_kept):
    "Each tile of each picture, in order: its id, and its boxes as (row, box, whether it counts, share)."
    tiles = []
    for row in range(len(table)):
        for x1, y1, x2, y2 in tile_grid(tuple(table.sizes[row].tolist()), tile, overlap).tolist():
            held = []
            for box in range(int(table.offsets[row]), int(table.offsets[row + 1])):
                a, b, c, d = map(float, table.boxes_xyxy[box])
                left, top, right, bottom = max(a, x1), max(b, y1), min(c, x2), min(d, y2)
                if left < right and top < bottom:
                    share = (right - left) * (bottom - top) / ((c - a) * (d - b))
                    counts = not table.iscrowd[box] and share >= min_kept
                    held.append((box, (left - x1, top - y1, right - x1, bottom - y1), counts, share))
            tiles.append((tile_id(int(table.image_ids[row]), (x1, y1, x2, y2)), held))
    return tiles


@pytest.mark.parametrize("seed", range(80))
def test_tiles_hold_what_a_loop_says(seed):
    rng = np.random.default_rng(seed)
    table = a_table(rng)
    tile, overlap = tuple(int(n) for n in rng.integers(30, 150, 2)), float(rng.uniform(0, 0.6))
    rule = {"min_kept": float(rng.uniform(0.1, 1)), "empty": float(rng.choice([0, 0.3, 1e9])),
            "small_repeat": int(rng.integers(1, 4)), "seed": int(rng.integers(9))}  # fmt: skip
    found, said = tile_table(table, tile, overlap, **rule)
    tiles = dict(by_loop(table, tile, overlap, rule["min_kept"]))
    order = {name: i for i, name in enumerate(tiles)}

    full = [name for name, held in tiles.items() if any(counts for _, _, counts, _ in held)]
    bare = [name for name in tiles if name not in set(full)]
    taken = min(len(bare), int(np.ceil(rule["empty"] * len(full)))) if full else min(len(bare), 1)
    small = {n for n in full if any(counts and table.areas[box] < SMALL for box, _, counts, _ in tiles[n])}
    names = [str(name).partition("#")[0] for name in found.image_ids]
    assert [name for name in dict.fromkeys(names) if name in set(full)] == full  # every tile with an object, in order
    assert len(set(names)) == len(full) + taken and said.empty_left_out == len(bare) - taken
    assert [order[n] for n in names] == sorted(order[n] for n in names)
    for name in set(names):
        repeats = rule["small_repeat"] if name in small else 1
        mine = [str(i) for i in found.image_ids if str(i).partition("#")[0] == name]
        assert mine == [name] + [f"{name}#{n}" for n in range(2, repeats + 1)]
    assert said.tiles == len(found) == len(names) and said.repeated == len(names) - len(set(names))

    whole = cut = ignored = 0
    held_well = set()
    for row, name in enumerate(names):
        rows = slice(int(found.offsets[row]), int(found.offsets[row + 1]))
        held, picture = tiles[name], table.image_ids.tolist().index(int(whole_of(name)[0]))
        boxes = [box for box, *_ in held]
        assert found.boxes_xyxy[rows] == pytest.approx(np.array([b for _, b, *_ in held]).reshape(-1, 4), abs=1e-3)
        assert (~found.iscrowd[rows]).tolist() == [counts for _, _, counts, _ in held]
        assert found.labels[rows].tolist() == table.labels[boxes].tolist()
        assert found.lines[rows].tolist() == table.lines[boxes].tolist()
        assert np.array_equal(found.extras["whole_xyxy"][rows], table.boxes_xyxy[boxes])
        shares = np.array([share for *_, share in held])
        assert found.areas[rows] == pytest.approx(table.areas[boxes] * shares, rel=1e-4)
        x1, y1, x2, y2 = whole_of(name)[1]
        assert found.sizes[row].tolist() == [y2 - y1, x2 - x1]
        for key in ("file_names", "tags", "weights"):
            assert getattr(found, key)[row] == getattr(table, key)[picture]
        whole += sum(counts and share > 1 - 1e-6 for _, _, counts, share in held)
        cut += sum(counts and share <= 1 - 1e-6 for _, _, counts, share in held)
        ignored += sum(not counts for _, _, counts, _ in held)
        held_well |= {box for box, _, counts, _ in held if counts}
    lost = int((~table.iscrowd).sum()) - len(held_well)
    assert (said.whole, said.cut, said.ignored, said.lost) == (whole, cut, ignored, lost)
    assert len(set(found.box_ids.tolist())) == len(found.box_ids)


@pytest.mark.parametrize("seed", range(40))
def test_whole_boxes_lie_where_the_tile_says(seed):
    rng = np.random.default_rng(seed)
    table = a_table(rng)
    found, _ = tile_table(table, (70, 90), 0.3, min_kept=0.01, empty=1e9)
    for row, name in enumerate(found.image_ids):
        window = np.array(whole_of(name)[1], np.float32)
        rows = slice(int(found.offsets[row]), int(found.offsets[row + 1]))
        clipped = np.concatenate([
            np.maximum(found.extras["whole_xyxy"][rows, :2], window[:2]),
            np.minimum(found.extras["whole_xyxy"][rows, 2:], window[2:]),
        ], 1)  # fmt: skip
        assert found.boxes_xyxy[rows] + np.tile(window[:2], 2) == pytest.approx(clipped, abs=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_no_object_is_lost_where_the_overlap_holds_it(seed):
    rng = np.random.default_rng(seed)
    table = a_table(rng)
    small = (table.boxes_xyxy[:, 2:] - table.boxes_xyxy[:, :2]).max(1, initial=0) <= 32
    _, said = tile_table(table.select_boxes(small), (80, 80), 0.4, min_kept=1.0)
    assert said.lost == 0


def test_the_choice_of_empty_tiles_is_the_seeds():
    table = a_table(np.random.default_rng(3), pictures=12, most=4)
    ids = [tile_table(table, (40, 40), empty=0.5, seed=s)[0].image_ids.tolist() for s in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == len(ids[2])


@pytest.mark.parametrize("rule", [{"min_kept": 0}, {"min_kept": 1.1}, {"empty": -1}, {"small_repeat": 0}])
def test_a_rule_that_makes_no_sense(rule):
    with pytest.raises(InputError, match="small_repeat"):
        tile_table(a_table(np.random.default_rng(0)), (40, 40), **rule)


def test_no_picture_no_tiles():
    with pytest.raises(InputError, match="no picture to cut"):
        tile_table(a_table(np.random.default_rng(0)).select([]), (40, 40))


# pictures


def drawn(folder, rng, **kwargs):
    "A random table, and its pictures."
    table = replace(a_table(rng, **kwargs), root=folder)
    for row in range(len(table)):
        known = table.of(row)
        cv2.imwrite(str(known.path), smooth(rng, known.size))
    return table


def smooth(rng, size, channels=3):
    "A picture without sharp edges: JPEG keeps it."
    small = rng.integers(0, 255, (5, 6, channels)).astype(np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


def test_tiles_are_cut_once_and_anew_when_anything_changes(tmp_path):
    table = drawn(tmp_path, np.random.default_rng(0), pictures=3)
    folder = tmp_path / "tiles"

    def cut(table=table, tile=(60, 60), **rule):
        found, said = make_tiles(table, folder, tile, progress=False, **({"empty": 1e9} | rule))
        files = {str(found.of(row).path) for row in range(len(found))}
        assert files == {str(path) for path in (folder / "images").iterdir()}
        return found, said, max(path.stat().st_mtime_ns for path in (folder / "images").iterdir())

    first, said, when = cut()
    again, said_again, when_again = cut()
    assert (said, when) == (said_again, when_again)
    for key in ("image_ids", "file_names", "boxes_xyxy", "labels", "iscrowd", "areas", "sizes", "offsets"):
        assert np.array_equal(getattr(first, key), getattr(again, key)), key
    assert np.array_equal(first.extras["whole_xyxy"], again.extras["whole_xyxy"])
    for row in range(len(first)):
        picture, (x1, y1, x2, y2) = whole_of(first.image_ids[row])
        source = read_image(table.of(table.image_ids.tolist().index(int(picture))).path)[y1:y2, x1:x2]
        tile = read_image(first.of(row).path).astype(int)
        assert tile.shape == source.shape and abs(tile - source).mean() < 4

    for change in ({"tile": (50, 60)}, {"overlap": 0.4}, {"min_kept": 0.9}, {"empty": 0.0}, {"small_repeat": 2}):
        _, other, later = cut(**change)
        assert other != said and later > when, change
        when = later
    moved = replace(table, boxes_xyxy=table.boxes_xyxy * 0.5)
    cut()
    found, _, later = cut(moved)
    assert later > when
    assert np.array_equal(np.unique(found.extras["whole_xyxy"], axis=0), np.unique(moved.boxes_xyxy, axis=0))


def test_what_was_left_half_cut_is_cut_anew(tmp_path):
    table = drawn(tmp_path, np.random.default_rng(1), pictures=3)
    whole, said = make_tiles(table, tmp_path / "t", (60, 60), progress=False)
    names = sorted(path.name for path in (tmp_path / "t" / "images").iterdir())
    missing = table.of(2).path.read_bytes()
    table.of(2).path.unlink()
    with pytest.raises(InputError, match="2.png"):
        make_tiles(table, tmp_path / "t", (60, 60), progress=False, overlap=0.5)
    assert not (tmp_path / "t" / "tiles.json").exists()
    table.of(2).path.write_bytes(missing)
    assert make_tiles(table, tmp_path / "t", (60, 60), progress=False)[1] == said
    assert sorted(path.name for path in (tmp_path / "t" / "images").iterdir()) == names


def written(folder, kind, rng):
    "A picture of some kind, and whether libvips must give the very same pixels."
    size = tuple(int(n) for n in rng.integers(20, 90, 2))
    noise = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
    path = folder / f"{kind}.{'jpg' if 'jpeg' in kind else 'png'}"
    if kind == "alpha png":
        noise = np.concatenate([noise, rng.integers(0, 255, (*size, 1)).astype(np.uint8)], 2)
    elif kind == "grey png":
        noise = noise[..., 0]
    elif kind == "16 bit png":
        noise = rng.integers(0, 65535, (*size, 3)).astype(np.uint16)
    elif kind == "16 bit grey png":
        noise = rng.integers(0, 65535, size).astype(np.uint16)
    elif "jpeg" in kind:
        noise = smooth(rng, size, 1 if "grey" in kind else 3)
    if kind.startswith("turned"):
        from PIL import Image

        exif = Image.Exif()
        exif[0x0112] = int(kind.split()[1])
        Image.fromarray(noise).save(path, quality=95, exif=exif)
    elif kind == "palette png":
        from PIL import Image

        Image.fromarray(noise).quantize(16).save(path)
    elif kind == "grey alpha png":
        from PIL import Image

        Image.fromarray(noise).convert("LA").save(path)
    else:
        cv2.imwrite(str(path), noise)
    return path


KINDS = ["png", "alpha png", "grey png", "grey alpha png", "palette png", "16 bit png", "16 bit grey png", "jpeg",
         "grey jpeg", *(f"turned {n} jpeg" for n in range(1, 9))]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_the_picture_whoever_reads_it(tmp_path, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(2):
        path = written(tmp_path, kind, rng)
        upright = read_image(path).shape[:2]
        for size in {upright, upright[::-1]} if "turned" in kind else {upright}:
            whole = read_image(path, size)
            if whole.shape[:2] != size:
                continue
            held, by_region = Regions(path, size), Regions(path, size, large=0)
            assert held.image is not None and by_region.image is None
            for window in tile_grid(size, (31, 17), 0.1).tolist():
                x1, y1, x2, y2 = window
                assert np.array_equal(held.read(window), whole[y1:y2, x1:x2])
                part = by_region.read(window)
                assert part.dtype == np.uint8 and part.shape == (y2 - y1, x2 - x1, 3)
                near = 3 if "jpeg" in kind else 0
                assert abs(part.astype(int) - whole[y1:y2, x1:x2]).max() <= near


def test_regions_say_in_a_line_what_is_wrong(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "c.jpg").write_bytes(b"nothing of the kind")
    for large in (0, 10**9):
        regions = Regions(tmp_path / "a.png", (40, 60), large)
        for window in ((0, 0, 61, 40), (-1, 0, 5, 5), (5, 5, 5, 9), (0, 30, 10, 41)):
            with pytest.raises(InputError, match="lies outside"):
                regions.read(window)
        for name, words in (("b.png", "b.png"), ("c.jpg", "c.jpg"), ("d.jpg", "d.jpg")):
            with pytest.raises(InputError, match=words) as told:
                Regions(tmp_path / name, (40, 60), large).read((0, 0, 10, 10))
            assert "\n" not in str(told.value)
    with pytest.raises(InputError, match="is 40 x 60, annotated as 60 x 61"):
        Regions(tmp_path / "a.png", (60, 61), large=0)


BIG = """
import sys
import cv2, numpy as np
small = np.random.default_rng(0).integers(0, 255, (25, 40, 3), np.uint8)
cv2.imwrite(sys.argv[1], cv2.resize(small, (16000, 12500)), [cv2.IMWRITE_JPEG_QUALITY, 80])
"""
CUT = """
import sys, resource
from pathlib import Path
import numpy as np
from neo_nb.annotations import Annotations
from neo_nb.data.tiles import make_tiles
boxes = np.array([[100, 100, 160, 160], [8000, 6000, 8050, 6040], [15900, 12400, 16000, 12500]])
table = Annotations([1], ["big.jpg"], [[12500, 16000]], [0, 3], boxes, [0, 0, 0], ("a",), root=Path(sys.argv[1]))
tiles, said = make_tiles(table, Path(sys.argv[1]) / "tiles", (640, 640), progress=False, empty=10)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(said.tiles, said.lost, int(peak) // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read in /proc")
def test_a_picture_of_200_megapixels_is_cut_without_being_held(tmp_path):
    # each in a process of its own; VmHWM, as ru_maxrss would begin with the peak of the process that started it
    subprocess.run([sys.executable, "-c", BIG, tmp_path / "big.jpg"], check=True)
    done = subprocess.run([sys.executable, "-c", CUT, tmp_path], check=True, capture_output=True, text=True)
    tiles, lost, peak, _ = map(int, done.stdout.split())
    assert tiles >= 33 and lost == 0
    assert peak < 1200, f"{peak} MiB"


# merging


def apart(rng, size, count, low, high, gap=0.0):
    "Boxes that do not overlap, each at least `low` and at most `high` pixels a side."
    boxes = np.zeros((0, 4))
    for _ in range(count * 4):
        w, h = np.exp(rng.uniform(np.log(low), np.log(high), 2)).clip(low, np.array(size[::-1]) - 0.0)
        x, y = rng.uniform(0, size[1] - w), rng.uniform(0, size[0] - h)
        free = (x + w + gap <= boxes[:, 0]) | (boxes[:, 2] + gap <= x)
        free |= (y + h + gap <= boxes[:, 1]) | (boxes[:, 3] + gap <= y)
        if free.all() and len(boxes) < count:
            boxes = np.concatenate([boxes, [[x, y, x + w, y + h]]])
    return boxes


def perfect(rng, boxes, labels, windows, least=1.0, noise=0.0):
    "What a perfect detector says in each window: the truth clipped to it, in any order, with any score."
    rows = []
    for number, (x1, y1, x2, y2) in enumerate(np.asarray(windows).tolist()):
        for box, label in zip(boxes, labels):
            part = np.array([max(box[0], x1), max(box[1], y1), min(box[2], x2), min(box[3], y2)])
            if (part[2:] - part[:2] >= least).all():
                part = np.clip(part + rng.normal(0, noise, 4), (x1, y1) * 2, (x2, y2) * 2) if noise else part
                rows.append((number, *(part - (x1, y1, x1, y1)), rng.uniform(0.05, 1), label))
    columns = np.array(rows).reshape(-1, 7)
    return Detections(columns[:, 0], columns[:, 1:5], columns[:, 5], columns[:, 6], len(windows), ("a", "b"))


def same_set(found, boxes, labels, near=1e-2):
    "Whether each object is found once, and nothing else."
    if len(found) != len(boxes):
        return False
    if not len(boxes):
        return True
    gaps = abs(found.boxes_xyxy[:, None] - boxes[None]).max(2) + 1e9 * (found.labels[:, None] != labels[None])
    return len(set(gaps.argmin(1).tolist())) == len(boxes) and bool((gaps.min(1) <= near).all())


METHODS = ["nms", "nmm", "wbf"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(40))
def test_a_perfect_detector_that_sees_the_whole_finds_each_object_once(method, seed):
    rng = np.random.default_rng(seed)
    size, tile = tuple(int(n) for n in rng.integers(100, 500, 2)), tuple(int(n) for n in rng.integers(60, 160, 2))
    boxes = apart(rng, size, 30, 4, 300)
    labels = rng.integers(0, 2, len(boxes))
    windows = np.concatenate([tile_grid(size, tile, float(rng.uniform(0, 0.5))), [[0, 0, size[1], size[0]]]])
    found = merge_tiles(*to_whole(perfect(rng, boxes, labels, windows), windows, size), method)
    assert same_set(found, boxes, labels)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(40))
def test_parts_of_what_no_tile_holds_are_joined(method, seed):
    rng = np.random.default_rng(seed)
    size, tile = tuple(int(n) for n in rng.integers(100, 500, 2)), tuple(int(n) for n in rng.integers(60, 160, 2))
    overlap = float(rng.choice([0.05, 0.1, 0.2, 0.25, 0.5]))
    boxes = apart(rng, size, 30, 4, [40, 150, 450][seed % 3])
    labels = rng.integers(0, 2, len(boxes))
    windows = tile_grid(size, tile, overlap)
    found = merge_tiles(*to_whole(perfect(rng, boxes, labels, windows), windows, size), method)
    assert same_set(found, boxes, labels)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(30))
def test_a_detector_a_little_wrong_finds_each_object_once(method, seed):
    rng = np.random.default_rng(seed)
    size, tile = tuple(int(n) for n in rng.integers(300, 600, 2)), tuple(int(n) for n in rng.integers(120, 250, 2))
    boxes = apart(rng, size, 20, 24, [60, 200, 500][seed % 3], gap=3)
    labels = rng.integers(0, 2, len(boxes))
    windows = tile_grid(size, tile, float(rng.uniform(0.2, 0.5)))
    windows = np.concatenate([windows, [[0, 0, size[1], size[0]]]]) if seed % 2 else windows
    found = merge_tiles(*to_whole(perfect(rng, boxes, labels, windows, 8, noise=0.5), windows, size), method)
    assert same_set(found, boxes, labels, near=12)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(15))
def test_neighbours_stay_two(overlap, seed):
    "Two boxes side by side, of one class, that touch each other anywhere but on a border of a tile."
    rng = np.random.default_rng(seed)
    size, tile = (400, 400), tuple(int(n) for n in rng.integers(80, 200, 2))
    windows = tile_grid(size, tile, overlap)
    for _ in range(20):
        w1, w2, h1, h2 = rng.uniform(6, 180, 4)
        x, y = rng.uniform(w1, 400 - w2), rng.uniform(0, 400 - max(h1, h2))
        if overlap == 0 and abs(windows[:, [0, 2]] - x).min() < 6:
            continue
        boxes = np.array([[x - w1, y, x, y + h1], [x, y, x + w2, y + h2]])
        boxes = boxes if rng.random() < 0.5 else boxes[:, [1, 0, 3, 2]]
        if overlap == 0 and abs(windows[:, [1, 3]] - boxes[0, 3]).min() < 6:
            continue
        found = merge_tiles(*to_whole(perfect(rng, boxes, [0, 0], windows), windows, size))
        assert same_set(found, boxes, np.zeros(2, int)), (boxes, found.boxes_xyxy, tile)


@pytest.mark.parametrize("seed", range(15))
def test_people_cut_by_one_border_stay_apart(seed):
    "A crowd: boxes of one class that overlap each other by up to half, cut by the same borders."
    rng = np.random.default_rng(seed)
    size, tile, step = (600, 900), (250, 300), float(rng.uniform(30, 60))
    wide = step * float(rng.uniform(1, 1.5))
    left = np.arange(20, 860 - wide, step)
    top = rng.uniform(20, 60, len(left))
    boxes = np.stack([left, top, left + wide, top + rng.uniform(350, 500, len(left))], 1)
    windows = tile_grid(size, tile, 0.3)
    found = merge_tiles(*to_whole(perfect(rng, boxes, [0] * len(boxes), windows, 6), windows, size))
    assert same_set(found, boxes, np.zeros(len(boxes), int))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(20))
def test_whole_boxes_seen_twice_become_one_as_a_loop_says(method, seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 60))
    corner, sides = rng.uniform(0, 100, (count, 2)), rng.uniform(5, 60, (count, 2))
    boxes = np.concatenate([corner, corner + sides], 1).astype(np.float32)
    scores = rng.permutation(np.linspace(0.1, 0.9, count)).astype(np.float32)
    found = Detections([0] * count, boxes, scores, rng.integers(0, 2, count), 1, ("a", "b"))
    limit = float(rng.uniform(0.2, 0.7))
    merged = merge_tiles(found, np.full((count, 4), np.nan), method, limit)

    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        inter = max(w, 0) * max(h, 0)
        return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)

    kept, owned = [], {}
    rows = [
        (b, s, c)
        for b, s, c in zip(found.boxes_xyxy.astype(float).tolist(), found.scores.tolist(), found.labels.tolist())
    ]
    for i, (box, _, label) in enumerate(rows):
        if not any(rows[k][2] == label and iou(box, rows[k][0]) > limit for k in kept):
            kept.append(i)
            owned[i] = [i]
    for i, (box, _, label) in enumerate(rows):
        if i not in kept:
            best = max((k for k in kept if rows[k][2] == label), key=lambda k: iou(box, rows[k][0]))
            owned[best].append(i)
    expected = []
    for k in kept:
        mine, weights = np.array([rows[i][0] for i in owned[k]]), np.array([rows[i][1] for i in owned[k]])
        union = [*mine[:, :2].min(0), *mine[:, 2:].max(0)]
        mean = (mine * weights[:, None]).sum(0) / weights.sum()
        expected.append({"nms": rows[k][0], "nmm": union, "wbf": mean}[method])
    assert merged.boxes_xyxy == pytest.approx(np.array(expected), abs=1e-2)
    assert merged.scores.tolist() == [np.float32(rows[k][1]) for k in kept]


def test_thousands_of_boxes_are_merged_in_a_moment():
    import time

    rng = np.random.default_rng(0)
    size = (2160, 3840)
    corner = rng.uniform(0, np.array(size[::-1]) - 120, (1500, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 120, (1500, 2))], 1)
    windows = tile_grid(size, (640, 640), 0.2)
    said = perfect(rng, boxes, rng.integers(0, 2, len(boxes)), windows)
    start = time.process_time()
    merged = merge_tiles(*to_whole(said, windows, size), "wbf")
    assert time.process_time() - start < 5
    assert 1000 < len(merged) <= 1550


# slices


class Eye(Artifact):
    "An artifact that sees patches of one colour each: the class is in the red, the score in nothing."

    kind = "eye"

    def __init__(self):
        contract = {"class_names": ("a", "b"), "category_ids": (1, 2), "contract": {"divisor": 32}}
        super().__init__(contract | {"model": "eye", "config": {"num_queries": 300}}, (64, 64))
        self.looks = []

    def __call__(self, images, batch_size=None):
        self.looks.append([image.shape[:2] for image in images])
        rows = []
        for number, image in enumerate(images):
            code = image.astype(int) @ (1 << 16, 1 << 8, 1)
            for value in np.unique(code[code > 0]).tolist():
                y, x = np.nonzero(code == value)
                box = x.min(), y.min(), x.max() + 1, y.max() + 1
                rows.append((number, *box, 0.3 + value % 7 / 10, (value >> 16) % 2))
        columns = np.array(rows, float).reshape(-1, 7)
        return Detections(columns[:, 0], columns[:, 1:5], columns[:, 5], columns[:, 6], len(images), ("a", "b"))


def painted(rng, size, boxes, labels):
    "A black picture with a patch of a colour of its own for each box."
    image = np.zeros((*size, 3), np.uint8)
    for number, ((x1, y1, x2, y2), label) in enumerate(zip(boxes.tolist(), labels.tolist())):
        image[y1:y2, x1:x2] = label + 2, number // 200 + 1, number % 200 + 1
    return image


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("large", [0, 10**9])
def test_slices_find_every_patch_once(tmp_path, monkeypatch, whole, large):
    from neo_nb.data import tiles

    monkeypatch.setattr(tiles.Regions.__init__, "__defaults__", (None, large))
    rng = np.random.default_rng(0)
    pictures, truth, labels = [], [], []
    for row in range(6):
        size = tuple(int(n) for n in rng.integers(60, 400, 2))
        boxes = apart(rng, size, 25, 4, 60, gap=2).round().astype(int)
        truth.append(boxes)
        labels.append(rng.integers(0, 2, len(boxes)))
        pictures.append(painted(rng, size, boxes, labels[-1]))
        cv2.imwrite(str(tmp_path / f"{row}.png"), pictures[-1][..., ::-1])
    table = Annotations(np.arange(6), [f"{r}.png" for r in range(6)], [p.shape[:2] for p in pictures], [0] * 7,
                        np.zeros((0, 4)), [], ("a", "b"), root=tmp_path)  # fmt: skip
    eye = Eye()
    sliced = SlicedArtifact(eye, (100, 120), 0.2, whole)
    for found in (sliced(pictures, batch_size=3), sliced.predict(table, batch_size=3, progress=False)):
        assert found.num_images == 6
        for row in range(6):
            assert same_set(found.of(row), truth[row].astype(float), labels[row])
    seen = [shape for batch in eye.looks for shape in batch]
    assert max(map(len, eye.looks)) == 3
    windows = [w for p in pictures for w in sliced.windows(p.shape[:2]).tolist()]
    assert seen == [(y2 - y1, x2 - x1) for x1, y1, x2, y2 in windows] * 2


def tiny(folder):
    "A detector with weights of chance that says something everywhere."
    import torch

    from neo_nb.models import create_model, save_weights

    torch.manual_seed(0)
    model = create_model("rtdetr_nano", class_names=("person", "head"), num_queries=30).eval()
    model.size = (96, 96)
    save_weights(model, folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


def test_without_overlap_a_slice_says_what_the_tile_alone_says(tmp_path):
    artifact = load_artifact(tiny(tmp_path))
    image = smooth(np.random.default_rng(0), (200, 290))
    sliced = SlicedArtifact(artifact, (100, 145), 0.0, whole=False, lowest=0.0)
    said = sliced([image])
    inside = 0
    for window in sliced.windows((200, 290)).tolist():
        x1, y1, x2, y2 = window
        alone = artifact([image[y1:y2, x1:x2]])
        moved, frames = to_whole(alone, np.array([window]), (200, 290))
        for box, score, label in zip(*(getattr(moved.nms(0.6), k) for k in ("boxes_xyxy", "scores", "labels"))):
            if not np.isnan(frames).all() and any(abs(box - window) <= 2):
                continue  # cut: joined with what the neighbour says
            near = abs(said.boxes_xyxy - box).max(1) < 0.01
            inside += bool((near & (said.labels == label) & (abs(said.scores - score) < 1e-4)).any())
    assert inside > 0
    one = SlicedArtifact(artifact, (500, 500), lowest=0.0)([image])
    direct = artifact([image])
    assert np.array_equal(one.boxes_xyxy, direct.boxes_xyxy) and np.array_equal(one.scores, direct.scores)


# from one end to the other


@pytest.fixture
def neo(tmp_path, monkeypatch, capsys):
    "The command line in a workspace of its own: exit status, standard output, standard error."
    place = tmp_path / "place"
    (place / "data_manifests").mkdir(parents=True)
    for name in ("settings.ini", "pyproject.toml", "nbs"):
        (place / name).symlink_to(ROOT / name)
    monkeypatch.chdir(place)
    monkeypatch.setenv("NEO_ROOT", str(place))
    for key in ("reports", "data"):
        monkeypatch.setenv(f"NEO_{key.upper()}", str(place / key))
    monkeypatch.setenv("TRACKIO_DIR", str(place / "trackio"))

    def call(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        return status, *capsys.readouterr()

    return call


SCENES = """format: scenes
root: crowd
classes: [person, head]
size: [180, 320]
splits:
  train: {num_images: 6, seed: 0}
  val: {num_images: 3, seed: 1}
"""


def test_a_data_set_in_tiles_is_a_data_set(neo, tmp_path):
    place = tmp_path / "place"
    (place / "data_manifests" / "crowd.yaml").write_text(SCENES)
    status, out, err = neo("data", "tile", "crowd", "--tile", 96, 128, "--overlap", 0.25, "--json")
    assert status == 0, err
    said = json.loads(out)
    from neo_nb.data.manifest import load_dataset

    for split in ("train", "val"):
        table, source = load_dataset("crowd-tiles", split), load_dataset("crowd", split)
        expected, counted = tile_table(source, (96, 128), 0.25, empty=0.15 if split == "train" else 1e9)
        assert len(table) == len(expected) == said[split]["tiles"] and said[split] == counted.__dict__
        assert table.boxes_xyxy == pytest.approx(expected.boxes_xyxy, abs=0.01)
        assert np.array_equal(table.labels, expected.labels) and np.array_equal(table.iscrowd, expected.iscrowd)
        assert np.array_equal(table.sizes, expected.sizes)
        for row in range(len(table)):
            assert read_image(table.of(row).path).shape[:2] == table.of(row).size
    assert said["val"]["empty_left_out"] == 0
    status, out, err = neo("data", "check", "crowd-tiles", "--json")
    assert status == 0, out
    status, _, err = neo("data", "tile", "crowd")
    assert status == 2 and "already" in err and "--to" in err
    assert neo("data", "tile", "crowd", "--split", "val", "--tile", 64, 64, "--to", "small")[0] == 0
    assert neo("data", "check", "small")[0] == 0


@pytest.mark.parametrize("words, told", [
    (("--tile", 8, 8), "at least 32"), (("--tile", 64, 64, "--overlap", 1), "0..1"), (("--tile", 64), "tile"),
])  # fmt: skip
def test_tiles_that_cannot_be_are_refused_before_anything_starts(neo, tmp_path, words, told):
    (tmp_path / "place" / "data_manifests" / "crowd.yaml").write_text(SCENES)
    weights = tiny(tmp_path)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((100, 100, 3), np.uint8))
    for line in (
        ("data", "tile", "crowd"),
        ("predict", weights, tmp_path / "a.png"),
        ("evaluate", weights, "--data", "crowd"),
    ):
        status, out, err = neo(*line, *words)
        assert (status, out) == (2, "") and told in err and len(err.strip().splitlines()) == 1, (line, err)
    assert not list((tmp_path / "place").glob("reports/*"))


def test_predict_and_evaluate_in_tiles(neo, tmp_path):
    (tmp_path / "place" / "data_manifests" / "crowd.yaml").write_text(SCENES)
    weights = tiny(tmp_path)
    rng = np.random.default_rng(0)
    for name, size in (("a", (180, 320)), ("b", (64, 64))):
        cv2.imwrite(str(tmp_path / f"{name}.png"), smooth(rng, size))
    files = tmp_path / "a.png", tmp_path / "b.png"
    status, out, err = neo("predict", weights, *files, "--threshold", 0.001, "--tile", 96, 96, "--json")
    assert status == 0, err
    found = json.loads(out)
    sliced = SlicedArtifact(load_artifact(weights), (96, 96), 0.2)
    for path, image in zip(files, found["images"]):
        direct = sliced([read_image(path)]).above(0.001)
        assert len(direct) == len(image["detections"]) > 0
        boxes = np.array([one["box"] for one in image["detections"]])
        assert boxes == pytest.approx(direct.boxes_xyxy, abs=0.02)
    status, out, err = neo("evaluate", weights, "--data", "crowd", "--tile", 96, 128, "--overlap", 0.25, "--json")
    assert status == 0, err
    metrics = json.loads(out)
    from neo_nb.data.manifest import load_dataset
    from neo_nb.evaluate.coco_metrics import coco_metrics

    table = load_dataset("crowd", "val")
    direct = SlicedArtifact(load_artifact(weights), (96, 128), 0.25).predict(table, progress=False)
    assert metrics["AP"] == pytest.approx(coco_metrics(direct, table)["AP"], abs=1e-6)
