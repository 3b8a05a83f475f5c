"""`nbdev-test` of all chapters, some of them at a time: what a chapter made stays in its process until that ends.

python .ci/chapters.py [PATH]"""

import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import nbdev.test

PROCESSES, CHAPTERS = 2, 12  # At once; that both run before others take over: a chapter leaves up to a gigabyte


def some_at_a_time(function: Any, files: list[Path], n_workers: int, pause: float, **settings: Any) -> list:
    "What nbdev asks of its own pool, which keeps its processes to the end; the files that chapters write go with them."
    found: list = []
    for start in range(0, len(files), CHAPTERS):
        with tempfile.TemporaryDirectory(prefix="chapters-", ignore_cleanup_errors=True) as folder:
            with ProcessPoolExecutor(PROCESSES, initializer=write_to, initargs=(folder,)) as pool:
                found += pool.map(partial(function, **settings), files[start : start + CHAPTERS])
    return found


def write_to(folder: str) -> None:
    "`tempfile` of this process and of those that it starts."
    os.environ["TMPDIR"] = tempfile.tempdir = folder


if __name__ == "__main__":
    nbdev.test.parallel = some_at_a_time
    nbdev.test.nbdev_test.__wrapped__(
        *sys.argv[1:], n_workers=PROCESSES
    )  # without its own reading of the command line
