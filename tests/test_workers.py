"""Loader processes where shared memory is short, as in a container: a child process with a /dev/shm of its own."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pytest

HEAD = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from neo_nb.base.annotations import Annotations
from neo_nb.data.loader import make_loader
folder, number = Path(sys.argv[1]), 24
names, sizes, none = [f"{i}.jpg" for i in range(number)], [(108, 192)] * number, np.zeros((0, 4), np.float32)
table = Annotations(range(number), names, sizes, [0] * (number + 1), none, np.zeros(0, int), ["a"], root=folder)
def loader(size=(1080, 1920), num_workers=4, **more):
    return make_loader(table, size=size, divisor=32, batch_size=1, num_workers=num_workers, **more)
def children():
    return [int(p) for p in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
"""
MOUNT = 'mount -t tmpfs -o size={mib}m tmpfs /dev/shm && exec "$0" "$@"'


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(24):
        cv2.imwrite(str(folder / f"{i}.jpg"), rng.integers(0, 255, (108, 192, 3), np.uint8))
    return folder


def child(code: str, images: Path, mib: int | None = None) -> subprocess.CompletedProcess:
    """Run it, with a /dev/shm of so many MiB; what hangs fails."""
    words = [sys.executable, "-W", "ignore", "-c", HEAD + textwrap.dedent(code), str(images)]
    if mib is not None:
        space = ["unshare", "-m", "bash", "-c", MOUNT.format(mib=mib)]
        trial = [*space, "true"]
        if not shutil.which("unshare") or subprocess.run(trial, capture_output=True).returncode:
            pytest.skip("a /dev/shm of its own needs unshare and mount, which are not permitted here")
        words = space + words
    return subprocess.run(words, capture_output=True, text=True, timeout=100, env=os.environ)


def test_an_update_of_eight_batches_goes_through_in_64_mib(images):
    """The settings of a 16 GB GPU (batch 1, accumulation 8, 4 workers, 1080x1920) in Docker's default."""
    done = child(
        """
        from neo_nb.train.loop import chunks
        seen, made = [], loader()
        for _ in range(2):
            for batches in chunks(made, 8):  # the last update's are still held while the next ones come
                seen += [int(row) for batch in batches for row in batch.image_index]
        print(made.num_workers, seen == [*range(24)] * 2, [p.name for p in Path("/dev/shm").iterdir() if "torch" in p.name])
        """,
        images,
        mib=64,
    )
    assert done.stdout.split("\n")[0] == "4 True []", done.stdout + done.stderr
    assert "pipes" not in done.stderr and "Traceback" not in done.stderr


def test_a_shared_memory_that_others_fill_does_not_stop_it(images):
    """What does not fit comes through pipes, the same pixels, and that is said once; nothing is left behind."""
    done = child(
        """
        plain, seen, made = [batch.images for batch in loader(num_workers=0)], [], loader(num_workers=2)
        for batch in made:
            if not seen:
                try:
                    with open("/dev/shm/filler", "wb", buffering=0) as file:
                        while True: file.write(bytes(2**18))
                except OSError: pass
            seen.append(batch.images)
        same = len(seen) == 24 and all((a == b).all() for a, b in zip(seen, plain))
        print(made.num_workers, bool(same), sorted(p.name for p in Path("/dev/shm").iterdir()))
        os.unlink("/dev/shm/filler")
        print(sum(len(batch.images) for batch in made))
        """,
        images,
        mib=64,
    )
    assert done.stdout.split("\n")[:2] == ["2 True ['filler']", "24"], done.stdout + done.stderr
    assert done.stderr.count("pipes") == 1 and "of 64 MiB free" in done.stderr and "Traceback" not in done.stderr


def test_a_worker_that_came_too_late_leaves_no_file(images):
    """There was room when it looked, and none when it wrote."""
    done = child(
        """
        import torch
        from neo_nb.data import workers
        workers.get_worker_info, workers._shared = (lambda: True), (lambda: (float("inf"), ""))
        packed = workers._hand_over({"images": torch.ones(2**21)})
        print(type(packed["images"]).__name__, packed["images"].min(), os.listdir("/dev/shm"))
        """,
        images,
        mib=4,
    )
    assert done.stdout.strip() == "ndarray 1.0 []", done.stdout + done.stderr


def test_training_processes_share_what_there_is(images):
    """The start of each sees all of it as free."""
    code = "print(loader(world_size=2).num_workers, loader(world_size=8).num_workers)"
    done = child(code, images, mib=64)
    assert done.stdout.split() == ["3", "0"], done.stdout + done.stderr
    assert "of 64 MiB free" in done.stderr


def test_no_room_for_anything_is_one_line(images):
    """Not even for the locks of a queue: none of the workers, or a message."""
    done = child(
        """
        made = loader(size=(32, 32), num_workers=1)
        with open("/dev/shm/filler", "wb", buffering=0) as file:
            try:
                while True: file.write(bytes(4096))
            except OSError: pass
        list(made)
        """,
        images,
        mib=1,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "InputError: loader: the processes that read images do not work" in last
    assert "/dev/shm has 0 of 1 MiB free" in last and "--num-workers 0" in last and "--shm-size" in last


@pytest.mark.parametrize("name, word", [("SIGBUS", "Bus error"), ("SIGKILL", "Killed")])
def test_a_worker_that_dies_is_one_line_wherever_this_process_is(images, name, word):
    """In the middle of a step, as most of the time."""
    done = child(
        f"""
        made = loader(size=(64, 96), num_workers=2)
        for batch in made:
            os.kill(children()[0], signal.{name})
            end = time.monotonic() + 20
            while time.monotonic() < end: sum(range(1000))
            print("still here")
        """,
        images,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "still here" not in done.stdout
    assert "InputError: loader: the processes that read images do not work: worker (pid " in last and word in last
    assert "/dev/shm has " in last and last.endswith("(docker run --shm-size=1g)")


def test_an_image_that_never_comes_ends_in_one_line(images, tmp_path):
    """A named pipe that nobody writes to: as a network disk that has gone away."""
    for path in images.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "7.jpg").unlink()
    os.mkfifo(tmp_path / "7.jpg")
    done = child(
        """
        from neo_nb.data import workers
        workers.PATIENCE = 3.0
        start, count = time.monotonic(), 0
        try:
            for batch in loader(size=(64, 96), num_workers=2): count += 1
        finally: print(count, 3 <= time.monotonic() - start < 30)
        """,
        tmp_path,
    )
    assert done.stdout.split() == ["7", "True"], done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "InputError: loader: no batch came for 0.05 minutes (2 workers, a batch takes 0.0 MiB" in last


def test_a_slow_disk_is_no_dead_one(images, tmp_path):
    """Each image comes after more than half of the patience, and a batch after nearly all of it."""
    for path in images.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "7.jpg").unlink()
    os.mkfifo(tmp_path / "7.jpg")
    done = child(
        f"""
        from neo_nb.data import workers
        workers.PATIENCE = 8.0
        def late():
            time.sleep(6)
            Path(folder, "7.jpg").write_bytes(Path({str(images)!r}, "7.jpg").read_bytes())
        made = loader(size=(64, 96), num_workers=2)
        threading.Thread(target=late, daemon=True).start()
        print(sum(len(batch.images) for batch in made))
        """,
        tmp_path,
    )
    assert done.stdout.split() == ["24"], done.stdout + done.stderr
