"""Regions of an image: the same pixels whoever reads them, and large images that are never held."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_tiles import smooth

from neo_nb.base.core import InputError
from neo_nb.data.loader import read_image
from neo_nb.data.tiles import RegionReader, tile_grid


def written(folder, kind, rng):
    "An image of some kind, and whether libvips must give the very same pixels."
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
def test_regions_are_the_image_whoever_reads_it(tmp_path, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(2):
        path = written(tmp_path, kind, rng)
        upright = read_image(path).shape[:2]
        for size in {upright, upright[::-1]} if "turned" in kind else {upright}:
            whole = read_image(path, size)
            if whole.shape[:2] != size:
                continue
            held, by_region = RegionReader(path, size), RegionReader(path, size, large=0)
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
        regions = RegionReader(tmp_path / "a.png", (40, 60), large)
        for window in ((0, 0, 61, 40), (-1, 0, 5, 5), (5, 5, 5, 9), (0, 30, 10, 41)):
            with pytest.raises(InputError, match="lies outside"):
                regions.read(window)
        for name, words in (("b.png", "b.png"), ("c.jpg", "c.jpg"), ("d.jpg", "d.jpg")):
            with pytest.raises(InputError, match=words) as told:
                RegionReader(tmp_path / name, (40, 60), large).read((0, 0, 10, 10))
            assert "\n" not in str(told.value)
    with pytest.raises(InputError, match="is 40 x 60, annotated as 60 x 61"):
        RegionReader(tmp_path / "a.png", (60, 61), large=0)


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
from neo_nb.base.annotations import Annotations
from neo_nb.data.tiles import make_tiles
boxes = np.array([[100, 100, 160, 160], [8000, 6000, 8050, 6040], [15900, 12400, 16000, 12500]])
table = Annotations([1], ["big.jpg"], [[12500, 16000]], [0, 3], boxes, [0, 0, 0], ("a",), root=Path(sys.argv[1]))
tiles, said = make_tiles(table, Path(sys.argv[1]) / "tiles", (640, 640), progress=False, empty=10)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(said.tiles, said.lost, int(peak) // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read in /proc")
def test_a_image_of_200_megapixels_is_cut_without_being_held(tmp_path):
    # each in a process of its own; VmHWM, as ru_maxrss would begin with the peak of the process that started it
    subprocess.run([sys.executable, "-c", BIG, tmp_path / "big.jpg"], check=True)
    done = subprocess.run([sys.executable, "-c", CUT, tmp_path], check=True, capture_output=True, text=True)
    tiles, lost, peak, _ = map(int, done.stdout.split())
    assert tiles >= 33 and lost == 0
    assert peak < 1200, f"{peak} MiB"
