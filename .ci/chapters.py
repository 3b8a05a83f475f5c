"""`nbdev-test` of all chapters, by processes that end after some of them: what a chapter made stays in its process.

python .ci/chapters.py [PATH]"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import nbdev.test

from neo_nb.base.shape_checks import setup

PROCESSES, CHAPTERS = 2, 12  # At once; that a process runs before the next one takes over


def in_turn(function: Any, files: list[Path], n_workers: int, pause: float, **settings: Any) -> list:
    "What nbdev asks of its own pool."
    start = multiprocessing.get_context("forkserver")
    each = {"initializer": setup, "initargs": ([],), "max_tasks_per_child": CHAPTERS}
    with ProcessPoolExecutor(PROCESSES, mp_context=start, **each) as pool:
        return list(pool.map(partial(function, **settings), files))


if __name__ == "__main__":
    nbdev.test.parallel = in_turn
    nbdev.test.nbdev_test.__wrapped__(
        *sys.argv[1:], n_workers=PROCESSES
    )  # without its own reading of the command line
