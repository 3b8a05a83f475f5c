"""What a platform gives a job: data in a bucket of a real S3 server, a backend, an environment."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer
from platform_backend import Backend, Running
from train_worker import images

ROOT = Path(__file__).parents[1]
SECRETS = {
    "EXTERNAL_STORAGE_ACCESS_KEY": "reader-AK7731",
    "EXTERNAL_STORAGE_SECRET_KEY": "opensesame-external",
    "INTERNAL_STORAGE_ACCESS_KEY": "writer-AK9914",
    "INTERNAL_STORAGE_SECRET_KEY": "opensesame-internal",
    "CALLBACK_TOKEN": "bearer-opensesame",
}
DATASETS, CHECKPOINTS = "training-datasets", "training-checkpoints"
CONFIG = {
    "epochs": 2, "batch": 4, "imgsz": 128, "workers": 0, "device": "cpu",
    "advanced_config": {"passes_per_epoch": 1, "cache": False, "policy": "none", "pretrained": "none"},
}  # fmt: skip


def nested(folder: Path, count: int = 10) -> dict[str, Any]:
    """Drawn images in a folder, and the platform's nested document about them; every fifth one is a negative."""
    table = images(folder / "images", count)
    names = ("__background__", *table.class_names)
    rows = []
    for i, (name, size) in enumerate(zip(table.file_names.tolist(), table.sizes.tolist())):
        start, end = table.offsets[i], table.offsets[i + 1]
        annotations = [
            {"id": k, "image_id": i, "class_id": int(table.labels[k]) + 1, "class_name": names[int(table.labels[k]) + 1],
             "bbox": [float(x), float(y), float(x2 - x), float(y2 - y)], "bbox_format": "xywh", "iscrowd": False,
             "area": float((x2 - x) * (y2 - y)), "segmentation": None, "attributes": {}}
            for k, (x, y, x2, y2) in zip(range(start, end), table.boxes_xyxy[start:end].tolist())
        ]  # fmt: skip
        row = {"id": i, "file_name": name, "width": int(size[1]), "height": int(size[0]), "depth": 3, "split": None}
        rows.append(row | {"annotations": annotations, "metadata": {}})
    document = {
        "format_version": "1.0",
        "dataset_id": "cells",
        "dataset_name": "Cells",
        "task_type": "object_detection",
    }
    document |= {"storage_info": {"image_root": "datasets/cells/images/"}, "images": rows}
    return document | {
        "classes": [{"id": i, "name": n, "color": "#fff", "supercategory": ""} for i, n in enumerate(names)]
    }


@dataclass
class Platform:
    """A storage, a backend, a folder for jobs."""

    folder: Path

    def __post_init__(self):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.storage = ThreadedMotoServer(port=0, verbose=False)
        self.storage.start()
        host, port = self.storage.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self.backend = Backend()
        self.running = Running(self.backend)
        for bucket in (DATASETS, CHECKPOINTS):
            self.s3.create_bucket(Bucket=bucket)
        self.document = nested(self.folder / "data")
        self.put_data("cells", self.document, self.folder / "data/images")

    @cached_property
    def s3(self):
        keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, **keys)

    def put_data(self, name: str, document: dict, folder: Path) -> None:
        text = json.dumps(document).encode()
        self.s3.put_object(Bucket=DATASETS, Key=f"datasets/{name}/annotations_detection.json", Body=text)
        for path in folder.iterdir():
            self.s3.put_object(Bucket=DATASETS, Key=f"datasets/{name}/images/{path.name}", Body=path.read_bytes())

    def keys(self, prefix: str = "", bucket: str = CHECKPOINTS) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [row["Key"] for page in pages for row in page.get("Contents", [])]

    def read(self, key: str, bucket: str = CHECKPOINTS) -> bytes:
        return self.s3.get_object(Bucket=bucket, Key=key)["Body"].read()

    def environment(self, job: int, disk: str = "disk", **more: str) -> dict[str, str]:
        """As a container gets it; `disk` names one that attempts may share."""
        (self.folder / disk).mkdir(exist_ok=True)
        known = {
            "CALLBACK_URL": f"{self.backend.url}/api/v1",
            "JOB_ID": str(job),
            "TASK_TYPE": "object_detection",
            "MODEL_NAME": "rtdetr-nano",
            "DATASET_ID": "cells",
            "CONFIG": json.dumps(CONFIG),
            "EXTERNAL_STORAGE_ENDPOINT": self.endpoint,
            "INTERNAL_STORAGE_ENDPOINT": self.endpoint,
            "CALLBACK_RETRY_DELAY": "0.05",
            "DATASET_CACHE_DIR": str(self.folder / "cache"),
            "TMPDIR": str(self.folder / disk),
        }
        return known | SECRETS | more

    def start(self, kind: str, environment: dict[str, str], log: Path | None = None) -> subprocess.Popen:
        """`python -m neo_nb.jobs.KIND` in this environment and no other."""
        keep = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
        quiet = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_ALBUMENTATIONS_UPDATE": "1",
        }
        out = (log or self.folder / "job.log").open("a")
        command = [sys.executable, "-m", f"neo_nb.jobs.{kind}"]
        return subprocess.Popen(command, env=keep | quiet | environment, stdout=out, stderr=out, cwd=self.folder)

    def run(self, kind: str, environment: dict[str, str], timeout: float = 300) -> int:
        return self.start(kind, environment).wait(timeout)

    def close(self) -> None:
        self.running.stop()
        self.storage.stop()


class Cutting:
    """A proxy to a storage that ends each connection after so many bytes of an answer, some times over."""

    def __init__(self, endpoint: str, after: int, times: int):
        self.target, self.after, self.times = endpoint.removeprefix("http://").split(":"), after, times
        self.server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        upstream = socket.create_connection((self.target[0], int(self.target[1])))

        def copy(source: socket.socket, to: socket.socket, most: int) -> None:
            sent = 0
            try:
                while data := source.recv(65536):
                    if sent + len(data) > most and self.times > 0:
                        self.times -= 1
                        to.sendall(data[: most - sent])
                        break
                    to.sendall(data)
                    sent += len(data)
            except OSError:
                pass
            for end in (source, to):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=copy, args=(client, upstream, 2**40), daemon=True).start()
        copy(upstream, client, self.after)


class Stalling(Cutting):
    """A proxy to a storage that takes requests with certain words in them and never answers."""

    def __init__(self, endpoint: str, words: bytes):
        self.words, self.held, self.asleep = words, [], False
        super().__init__(endpoint, 0, 0)

    def serve(self, client: socket.socket) -> None:
        upstream = socket.create_connection((self.target[0], int(self.target[1])))

        def answers() -> None:
            with contextlib.suppress(OSError):
                while data := upstream.recv(65536):
                    client.sendall(data)

        threading.Thread(target=answers, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if self.held.count(client) or (not self.asleep and self.words in data.split(b"\r\n")[0]):
                    self.held.append(client)
                else:
                    upstream.sendall(data)
        upstream.close()


def wait_for(true: Callable[[], bool], job: subprocess.Popen, timeout: float = 300) -> None:
    """Until something is true; a job that ended before is an error."""
    began = time.monotonic()
    while not true():
        assert job.poll() is None, f"the job ended with status {job.returncode} before that"
        assert time.monotonic() - began < timeout, "it took too long"
        time.sleep(0.02)


def workers(folder: Path, name: str, words: str = "") -> list[int]:
    """Processes that work for a job in this folder, and not its supervisor; those with these words in their command."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            known = (place / "environ").read_bytes().split(b"\0")
            root = next((word for word in known if word.startswith(b"NEO_ROOT=")), b"").decode()
            mine = f"NEO_JOB={name}".encode() in known and root.startswith(f"NEO_ROOT={folder}/")
            if mine and words in (place / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                found.append(int(place.name))
        except OSError:
            continue
    return found
