"""Two nodes of one training on this machine: one is taken away, the next attempt ends as if nothing had happened."""

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from command import free_port
from train_worker import images

from neo_nb.base.nodes import NODE_LOST, PREEMPTED
from neo_nb.data.coco import write_coco
from neo_nb.runs.run import find_job, read_record
from neo_nb.train.checkpoint import load_state

HOST = "127.0.0.2"  # another address than localhost, as another machine has; Linux has all of 127/8
EPOCHS = 4  # so many that a signal comes before the end also on a machine that is busy
FLAGS = f"--data data_manifests/drawn.yaml --model rtdetr_nano --size 64 96 --epochs {EPOCHS} --passes-per-epoch 1"
FLAGS += " --batch-size 2 --grad-accum-steps 1 --no-aug-epochs 1 --num-workers 0 --num-queries 20 --checkpoint-steps 1"
FLAGS += " --device cpu --target cpu --no-cache --seed 3"


def reachable() -> bool:
    import socket

    with socket.socket() as probe:
        try:
            probe.bind((HOST, 0))
        except OSError:
            return False
    return True


pytestmark = pytest.mark.skipif(not reachable(), reason=f"{HOST} is no address of this machine")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    write_coco(images(folder / "data/drawn/images", 12), folder / "data/drawn/a.json")
    (folder / "settings.ini").write_text("[DEFAULT]\ndata = data\n")
    (folder / "data_manifests").mkdir()
    entry = "{annotations: a.json, images: images}"
    text = f"format: coco\nroot: drawn\nclasses: [tall, wide]\nsplits:\n  train: {entry}\n  val: {entry}\n"
    (folder / "data_manifests/drawn.yaml").write_text(text)
    return folder


NODE = """
import json, sys
from neo_nb.train.config import TrainConfig
from neo_nb.train.launch import join_training, train_processes
rank, record, run, resume = sys.argv[1:]
if rank == "0":
    config = TrainConfig.model_validate(json.load(open(record))["config"])
    found = train_processes(config, run, "data_manifests/drawn.yaml", 1, resume=resume == "resume")
    sys.exit(75 if found["interrupted"] else 0)
sys.exit(75 if join_training(1) else 0)
"""


def start(workspace: Path, *words: str) -> list[subprocess.Popen]:
    """Both nodes of an attempt, as an engine starts them: the same command, and who they are in the environment."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("NEO_")}
    known |= {"NEO_NODES": "2", "NEO_RENDEZVOUS": f"{HOST}:{free_port()}", "NEO_JOB": "night", "OMP_NUM_THREADS": "1"}
    known |= {"NEO_REPORTS": str(workspace / "reports"), "TRACKIO_DIR": str(workspace / "trackio")}
    known |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{Path(__file__).parents[1]}:{known.get('PYTHONPATH', '')}"}
    nodes = []
    for rank in map(str, range(2)):
        place = {"cwd": workspace, "env": known | {"NEO_NODE_RANK": rank}, "stdout": tempfile.TemporaryFile("w+")}
        code = (
            [NODE, rank] if words[0] != "train" else ["import sys; from neo_nb.cli.main import main; sys.exit(main())"]
        )
        nodes.append(
            subprocess.Popen([sys.executable, "-c", *code, *words], stderr=subprocess.STDOUT, text=True, **place)
        )
        nodes[-1].stdout = place["stdout"]
    return nodes


def ended(nodes: list[subprocess.Popen]) -> list[int]:
    """Their exit statuses, as a shell has them; what they printed, when one failed."""
    status = [process.wait(timeout=300) for process in nodes]
    for process in nodes:
        process.stdout.seek(0)
        print(process.stdout.read())
    return [128 - code if code < 0 else code for code in status]


def wait_for_steps(nodes: list[subprocess.Popen], workspace: Path, steps: int) -> None:
    for _ in range(3000):
        found = list(workspace.glob("reports/*/weights/last.pt"))
        if found and load_state(found[0])["position"]["step"] >= steps:
            return
        assert all(process.poll() is None for process in nodes), ended(nodes)
        time.sleep(0.05)
    raise AssertionError("nothing was saved within 150 seconds")


def take_away(node: subprocess.Popen) -> None:
    """Power off: everything that belongs to the node is killed at once."""
    own, found = {}, [node.pid]
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            own.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
        except OSError:
            continue
    for pid in found:
        found += own.get(pid, [])
    for pid in found:
        os.kill(pid, signal.SIGKILL)


def tensors(run: Path) -> dict:
    state = load_state(run / "weights/last.pt")
    assert state["identity"]["processes"] == 2 and len(state["rows"]) == EPOCHS
    return {f"{kind}.{name}": state[kind][name] for kind in ("model", "ema") for name in state[kind]}


def test_nodes_are_taken_away_and_the_last_attempt_ends_as_if_nothing_had_happened(workspace):
    nodes = start(workspace, "train", *FLAGS.split())
    wait_for_steps(nodes, workspace, 2)
    take_away(nodes[1])
    assert ended(nodes) == [NODE_LOST, 137], "the node that is left asks for another attempt"
    [run] = (workspace / "reports").glob("0*")
    known = read_record(run)
    assert (known["status"], known["job"]) == ("stopped", "night") and find_job("night", workspace / "reports") == run
    killed = load_state(run / "weights/last.pt")["position"]["step"]

    again = str(run / "run.json"), str(run), "resume"
    nodes = start(workspace, *again)
    wait_for_steps(nodes, workspace, killed + 1)
    nodes[1].send_signal(signal.SIGTERM)
    assert ended(nodes) == [PREEMPTED, PREEMPTED], "all nodes save and stop when one is asked to"
    position = load_state(run / "weights/last.pt")["position"]
    assert killed < position["step"] and position["epoch"] < EPOCHS

    assert ended(start(workspace, *again)) == [0, 0]
    assert ended(start(workspace, again[0], str(workspace / "unbroken"), "new")) == [0, 0]
    whole, pieces = tensors(workspace / "unbroken"), tensors(run)
    assert [name for name in whole if not torch.equal(whole[name], pieces[name])] == []
    [curves] = (workspace / "trackio").glob("*.db")
    with sqlite3.connect(curves) as database:
        found = database.execute("SELECT DISTINCT run_name FROM metrics ORDER BY 1").fetchall()
    assert found == [(run.name,), ("unbroken",)], "the curves of three attempts are those of one run"
