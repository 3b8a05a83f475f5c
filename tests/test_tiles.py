"""Windows and what tiles hold against plain loops over random cases; tiles on disk."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from neo_nb.base.annotations import Annotations
from neo_nb.base.core import InputError
from neo_nb.data.loader import read_image
from neo_nb.data.tiles import SMALL, make_tiles, parse_tile_id, tile_grid, tile_id, tile_table

ROOT = Path(__file__).resolve().parent.parent


# windows


def a_grid(rng):
    "A random image, tile and overlap."
    size = tuple(int(n) for n in rng.integers(1, 400, 2))
    tile = tuple(int(n) for n in rng.integers(1, 200, 2))
    return size, tile, float(rng.choice([0.0, 0.1, 0.2, 1 / 3, 0.5, rng.uniform(0, 0.8)]))


@pytest.mark.parametrize("seed", range(150))
def test_windows_cover_the_image_and_overlap_as_they_must(seed):
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


def test_a_tile_is_named_by_its_image_and_place():
    for image in ("7", "a@b", "mail@1,2,3,4", "shot#3", "#", "", "x y"):
        if image:
            assert parse_tile_id(tile_id(image, (1, 2, 30, 40))) == (image, (1, 2, 30, 40))
            assert parse_tile_id(tile_id(image, (1, 2, 30, 40)) + "#2") == (image, (1, 2, 30, 40))
    for name in ("", "7", "@1,2,3,4", "7@1,2,3", "7@1,2,3,-4", "7@1,2,3,x", "7@1,2,3,4#x"):
        with pytest.raises(InputError, match="is no tile"):
            parse_tile_id(name)


# what tiles hold


def a_table(rng, images=4, most=14):
    "Random images with boxes of all sizes, some of them crowds, some without any."
    sizes = rng.integers(40, 260, (images, 2))
    counts = rng.integers(0, most, images) * (rng.random(images) < 0.8)
    boxes = []
    for (h, w), count in zip(sizes.tolist(), counts.tolist()):
        for _ in range(count):
            bw, bh = np.minimum(np.exp(rng.uniform(np.log(2), np.log(250), 2)), (w, h))
            x, y = rng.uniform(0, w - bw), rng.uniform(0, h - bh)
            boxes.append((x, y, x + bw, y + bh))
    count = int(counts.sum())
    return Annotations(
        np.arange(images) * 3 + 5, [f"{i}.png" for i in range(images)], sizes,
        np.concatenate([[0], np.cumsum(counts)]), np.array(boxes, np.float32).reshape(-1, 4),
        rng.integers(0, 3, count), ("a", "b", "c"), iscrowd=rng.random(count) < 0.15, name="random",
        lines=np.arange(count), tags=rng.choice(["", "night", "night rain"], images),
        weights=rng.uniform(0.5, 4, images),
    )  # fmt: skip


def by_loop(table, tile, overlap, min_area_ratio):
    "Each tile of each image, in order: its id, and its boxes as (row, box, whether it counts, share)."
    tiles = []
    for row in range(len(table)):
        for x1, y1, x2, y2 in tile_grid(tuple(table.sizes[row].tolist()), tile, overlap).tolist():
            held = []
            for box in range(int(table.offsets[row]), int(table.offsets[row + 1])):
                a, b, c, d = map(float, table.boxes_xyxy[box])
                left, top, right, bottom = max(a, x1), max(b, y1), min(c, x2), min(d, y2)
                if left < right and top < bottom:
                    share = (right - left) * (bottom - top) / ((c - a) * (d - b))
                    counts = not table.iscrowd[box] and share >= min_area_ratio
                    held.append((box, (left - x1, top - y1, right - x1, bottom - y1), counts, share))
            tiles.append((tile_id(int(table.image_ids[row]), (x1, y1, x2, y2)), held))
    return tiles


@pytest.mark.parametrize("seed", range(80))
def test_tiles_hold_what_a_loop_says(seed):
    rng = np.random.default_rng(seed)
    table = a_table(rng)
    tile, overlap = tuple(int(n) for n in rng.integers(30, 150, 2)), float(rng.uniform(0, 0.6))
    rule = {"min_area_ratio": float(rng.uniform(0.1, 1)), "empty": float(rng.choice([0, 0.3, 1e9])),
            "oversample_small": int(rng.integers(1, 4)), "seed": int(rng.integers(9))}  # fmt: skip
    found, stats = tile_table(table, tile, overlap, **rule)
    tiles = dict(by_loop(table, tile, overlap, rule["min_area_ratio"]))
    order = {name: i for i, name in enumerate(tiles)}

    full = [name for name, held in tiles.items() if any(counts for _, _, counts, _ in held)]
    bare = [name for name in tiles if name not in set(full)]
    taken = min(len(bare), int(np.ceil(rule["empty"] * len(full)))) if full else min(len(bare), 1)
    small = {n for n in full if any(counts and table.areas[box] < SMALL for box, _, counts, _ in tiles[n])}
    names = [str(name).partition("#")[0] for name in found.image_ids]
    assert [name for name in dict.fromkeys(names) if name in set(full)] == full  # every tile with an object, in order
    assert len(set(names)) == len(full) + taken and stats.empty_left_out == len(bare) - taken
    assert [order[n] for n in names] == sorted(order[n] for n in names)
    for name in set(names):
        repeats = rule["oversample_small"] if name in small else 1
        mine = [str(i) for i in found.image_ids if str(i).partition("#")[0] == name]
        assert mine == [name] + [f"{name}#{n}" for n in range(2, repeats + 1)]
    assert stats.tiles == len(found) == len(names) and stats.repeated == len(names) - len(set(names))

    whole = cut = ignored = 0
    held_well = set()
    for row, name in enumerate(names):
        rows = slice(int(found.offsets[row]), int(found.offsets[row + 1]))
        held, image = tiles[name], table.image_ids.tolist().index(int(parse_tile_id(name)[0]))
        boxes = [box for box, *_ in held]
        assert found.boxes_xyxy[rows] == pytest.approx(np.array([b for _, b, *_ in held]).reshape(-1, 4), abs=1e-3)
        assert (~found.iscrowd[rows]).tolist() == [counts for _, _, counts, _ in held]
        assert found.labels[rows].tolist() == table.labels[boxes].tolist()
        assert found.lines[rows].tolist() == table.lines[boxes].tolist()
        assert np.array_equal(found.extras["whole_xyxy"][rows], table.boxes_xyxy[boxes])
        shares = np.array([share for *_, share in held])
        assert found.areas[rows] == pytest.approx(table.areas[boxes] * shares, rel=1e-4)
        x1, y1, x2, y2 = parse_tile_id(name)[1]
        assert found.sizes[row].tolist() == [y2 - y1, x2 - x1]
        for key in ("file_names", "tags", "weights"):
            assert getattr(found, key)[row] == getattr(table, key)[image]
        whole += sum(counts and share > 1 - 1e-6 for _, _, counts, share in held)
        cut += sum(counts and share <= 1 - 1e-6 for _, _, counts, share in held)
        ignored += sum(not counts for _, _, counts, _ in held)
        held_well |= {box for box, _, counts, _ in held if counts}
    lost = int((~table.iscrowd).sum()) - len(held_well)
    assert (stats.whole, stats.cut, stats.ignored, stats.lost) == (whole, cut, ignored, lost)
    assert len(set(found.box_ids.tolist())) == len(found.box_ids)


@pytest.mark.parametrize("seed", range(40))
def test_whole_boxes_lie_where_the_tile_says(seed):
    rng = np.random.default_rng(seed)
    table = a_table(rng)
    found, _ = tile_table(table, (70, 90), 0.3, min_area_ratio=0.01, empty=1e9)
    for row, name in enumerate(found.image_ids):
        window = np.array(parse_tile_id(name)[1], np.float32)
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
    _, stats = tile_table(table.select_boxes(small), (80, 80), 0.4, min_area_ratio=1.0)
    assert stats.lost == 0


def test_the_choice_of_empty_tiles_is_the_seeds():
    table = a_table(np.random.default_rng(3), images=12, most=4)
    ids = [tile_table(table, (40, 40), empty=0.5, seed=s)[0].image_ids.tolist() for s in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == len(ids[2])


@pytest.mark.parametrize(
    "rule", [{"min_area_ratio": 0}, {"min_area_ratio": 1.1}, {"empty": -1}, {"oversample_small": 0}]
)
def test_a_rule_that_makes_no_sense(rule):
    with pytest.raises(InputError, match="oversample_small"):
        tile_table(a_table(np.random.default_rng(0)), (40, 40), **rule)


def test_no_image_no_tiles():
    with pytest.raises(InputError, match="no image to cut"):
        tile_table(a_table(np.random.default_rng(0)).select([]), (40, 40))


# images


def drawn(folder, rng, **kwargs):
    "A random table, and its images."
    table = replace(a_table(rng, **kwargs), root=folder)
    for row in range(len(table)):
        known = table[row]
        cv2.imwrite(str(known.path), smooth(rng, known.size))
    return table


def smooth(rng, size, channels=3):
    "An image without sharp edges: JPEG keeps it."
    small = rng.integers(0, 255, (5, 6, channels)).astype(np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


def test_tiles_are_cut_once_and_anew_when_anything_changes(tmp_path):
    table = drawn(tmp_path, np.random.default_rng(0), images=3)
    folder = tmp_path / "tiles"

    def cut(table=table, tile=(60, 60), **rule):
        found, stats = make_tiles(table, folder, tile, progress=False, **({"empty": 1e9} | rule))
        files = {str(found[row].path) for row in range(len(found))}
        assert files == {str(path) for path in (folder / "images").iterdir()}
        return found, stats, max(path.stat().st_mtime_ns for path in (folder / "images").iterdir())

    first, stats, when = cut()
    again, said_again, when_again = cut()
    assert (stats, when) == (said_again, when_again)
    for key in ("image_ids", "file_names", "boxes_xyxy", "labels", "iscrowd", "areas", "sizes", "offsets"):
        assert np.array_equal(getattr(first, key), getattr(again, key)), key
    assert np.array_equal(first.extras["whole_xyxy"], again.extras["whole_xyxy"])
    for row in range(len(first)):
        image, (x1, y1, x2, y2) = parse_tile_id(first.image_ids[row])
        source = read_image(table[table.image_ids.tolist().index(int(image))].path)[y1:y2, x1:x2]
        tile = read_image(first[row].path).astype(int)
        assert tile.shape == source.shape and abs(tile - source).mean() < 4

    for change in (
        {"tile": (50, 60)},
        {"overlap": 0.4},
        {"min_area_ratio": 0.9},
        {"empty": 0.0},
        {"oversample_small": 2},
    ):
        _, other, later = cut(**change)
        assert other != stats and later > when, change
        when = later
    moved = replace(table, boxes_xyxy=table.boxes_xyxy * 0.5)
    cut()
    found, _, later = cut(moved)
    assert later > when
    assert np.array_equal(np.unique(found.extras["whole_xyxy"], axis=0), np.unique(moved.boxes_xyxy, axis=0))


def test_what_was_left_half_cut_is_cut_anew(tmp_path):
    table = drawn(tmp_path, np.random.default_rng(1), images=3)
    whole, stats = make_tiles(table, tmp_path / "t", (60, 60), progress=False)
    names = sorted(path.name for path in (tmp_path / "t" / "images").iterdir())
    missing = table[2].path.read_bytes()
    table[2].path.unlink()
    with pytest.raises(InputError, match="2.png"):
        make_tiles(table, tmp_path / "t", (60, 60), progress=False, overlap=0.5)
    assert not (tmp_path / "t" / "tiles.json").exists()
    table[2].path.write_bytes(missing)
    assert make_tiles(table, tmp_path / "t", (60, 60), progress=False)[1] == stats
    assert sorted(path.name for path in (tmp_path / "t" / "images").iterdir()) == names
