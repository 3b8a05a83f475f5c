"""A service at twice of what it has room for (8 detected, 8 waiting), for a minute: what it answers, how quickly, and how much memory it takes.

    python tests/serve_load.py DETECTOR FOLDER [--clients 32] [--seconds 60] [--data bccd]

starts `neo serve DETECTOR`, times the bare detector and one client alternately, then lets all clients ask at once.
It writes serve-load.json and serve-load.md into FOLDER."""

import argparse
import http.client
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from command import free_port, page_of
from command import neo as command
from serve_clients import post, storm

from neo_nb.base.core import atomic_write
from neo_nb.data.loader import decode_image
from neo_nb.data.manifest import load_dataset
from neo_nb.deploy.detector import load_detector

QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def one_client(port: int, detector, images: list[bytes], rounds: int = 8, calls: int = 12) -> dict[str, float]:
    "Milliseconds at the median: decoding and detecting in this process, and over HTTP, in turns of some calls each."
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sides = {
        "bare": lambda data: detector.detect_images([decode_image(data, "a")]),
        "http": lambda data: post(port, data, wire=wire),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            for row in range(calls):
                begin = time.perf_counter()
                call(images[row % len(images)])
                times[name] += [time.perf_counter() - begin] * (row > 1)  # the first find the caches cold
    return {name: 1000 * float(np.median(seconds)) for name, seconds in times.items()}


def watch(process: psutil.Process, megabytes: list[float], ended: threading.Event) -> None:
    while not ended.wait(0.5):
        megabytes.append(process.memory_info().rss / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--data", default="bccd")
    asked = parser.parse_args()
    table = load_dataset(asked.data, "val")
    images = [table[row].path.read_bytes() for row in range(min(32, len(table)))]
    detector = load_detector(asked.detector, "cpu")
    port = free_port()
    words = (
        "serve",
        str(asked.detector),
        "--port",
        str(port),
        "--device",
        "cpu",
        "--queue-size",
        "8",
    )  # half of the clients fit
    process = command(*words, wait=False, **QUIET)
    megabytes: list[float] = []
    ended = threading.Event()
    try:
        page_of(f"http://127.0.0.1:{port}/healthz", process)
        median = one_client(port, detector, images)
        watcher = threading.Thread(target=watch, args=(psutil.Process(process.pid), megabytes, ended))
        watcher.start()
        answers = storm(port, images, asked.clients, asked.seconds)
        ended.set()
        direct = detector([decode_image(data, "a") for data in images], threshold=0.5)
        equal = all(
            len([d for d in json.loads(post(port, data, "threshold=0.5")[1])["images"][0]["detections"]])
            == direct.for_image(row).scores.size
            for row, data in enumerate(images)
        )
    finally:
        ended.set()
        process.terminate()
        code = process.wait(60)
    times = np.array([seconds for status, seconds, _ in answers if status == 200])
    statuses = {str(s): sum(status == s for status, _, _ in answers) for s in {a[0] for a in answers}}
    tenth = max(1, len(megabytes) // 10)
    found = {
        "model": detector.record["model"],
        "kind": detector.kind,
        "clients": asked.clients,
        "seconds": asked.seconds,
        "answers by status": statuses,
        "answered per second": len(times) / asked.seconds,
        "p50 ms": 1000 * float(np.median(times)),
        "p99 ms": 1000 * float(np.quantile(times, 0.99)),
        "one client, bare ms": median["bare"],
        "one client, HTTP ms": median["http"],
        "HTTP / bare": median["http"] / median["bare"],
        "MB, first tenth": float(np.mean(megabytes[tenth : 2 * tenth] or megabytes)),
        "MB, last tenth": float(np.mean(megabytes[-tenth:])),
        "same number of boxes as predict": equal,
        "exit": code,
    }
    asked.folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(asked.folder / "serve-load.json") as path:
        path.write_text(json.dumps(found, indent=2) + "\n")
    rows = [
        f"| {name} | {value:.1f} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in found.items()
    ]
    line = f"python tests/serve_load.py {asked.detector} FOLDER --clients {asked.clients} --seconds {asked.seconds:g}"
    with atomic_write(asked.folder / "serve-load.md") as path:
        path.write_text("\n".join(["# A service under load", "", f"`{line}`", "", "| | |", "|---|---|", *rows]) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    sys.exit(main())
