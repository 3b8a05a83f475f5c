"""neo job under faults, longer than a test may take: python tests/platform_faults.py [--moments 10] writes reports/kept/cpu/platform-faults.md.

Trainings are killed at random moments (the runner, the kernel, or the whole container) and tried again on another disk
or on the same one; backend and storage are down for half of a training. What must hold: every epoch is known once,
the last state is told, and the weights are those of the training that nobody disturbed.
"""

import argparse
import io
import json
import os
import random
import shutil
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moto.server import ThreadedMotoServer
from platform_job import CONFIG, ROOT, Platform, Stalling, wait_for, workers
from safetensors.numpy import load

EPOCHS = 4
KEPT = ROOT / "reports" / "kept" / "cpu" / "platform-faults.md"


def environment(platform: Platform, job: int, disk: str, **more: str) -> dict[str, str]:
    return platform.environment(job, disk=disk, CONFIG=json.dumps(CONFIG | {"epochs": EPOCHS}), **more)


def weights(platform: Platform, job: int) -> dict:
    packed = zipfile.ZipFile(io.BytesIO(platform.read(f"checkpoints/{job}/last.pt")))
    return load(packed.read("weights.safetensors"))


def same(platform: Platform, job: int, reference: dict) -> bool:
    found = weights(platform, job)
    return found.keys() == reference.keys() and all((found[key] == reference[key]).all() for key in found)


def of(platform: Platform, job: int, name: str) -> list[dict]:
    return [body for word, body in platform.backend.heard if word == name and body.get("job_id") == job]


def kill_at(platform: Platform, job: int, process, whom: str, moment: float) -> str:
    """Kill somebody so many seconds after the worker began; where the training was then."""
    name = f"train-{job}"
    while not workers(platform.folder, name, "ipykernel_launcher") and process.poll() is None:
        time.sleep(0.05)
    until = time.monotonic() + moment
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    if process.poll() is not None:
        return "it had ended"
    words = {"runner": "neo_nb.cli.main", "kernel": "ipykernel_launcher", "container": ""}[whom]
    victims = ([process.pid] if whom == "container" else []) + workers(platform.folder, name, words)
    for victim in victims:
        try:
            os.kill(victim, 9)
        except ProcessLookupError:
            continue
    seen = [body["current_epoch"] for body in of(platform, job, "progress")]
    return f"after epoch {seen[-1]}" if seen else "before anything was said"


def one(platform: Platform, job: int, seed: int, longest: float, reference: dict) -> dict:
    """A training that is killed at a random moment, and its second attempt."""
    rng = random.Random(seed)
    whom, moment = ("runner", "kernel", "container")[seed % 3], rng.uniform(0, longest)
    first = platform.start("train", environment(platform, job, f"{job}-a"), platform.folder / f"{job}.log")
    where = kill_at(platform, job, first, whom, moment)
    status = first.wait(300)
    again = f"{job}-a" if rng.random() < 0.3 else f"{job}-b"
    second = platform.start("train", environment(platform, job, again), platform.folder / f"{job}.log").wait(600)
    told = [body["status"] for body in of(platform, job, "completion")]
    rows = [body["epoch"] for body in of(platform, job, "results")]
    values = {body["epoch"]: body["primary_metric_value"] for body in of(platform, job, "results")}
    row = {"killed": whom, "seconds": round(moment, 1), "when": where, "first": status, "second": second}
    row |= {"disk": "same" if again.endswith("a") else "another", "told": ", ".join(told)}
    row |= {"epochs": ("once each" if sorted(rows) == list(range(1, EPOCHS + 1)) else f"{rows}")}
    row |= {"all": sorted(values) == list(range(1, EPOCHS + 1)), "weights": same(platform, job, reference)}
    print(json.dumps(row), flush=True)
    return row


def backend_down(platform: Platform, reference: dict) -> dict:
    """Nobody listens until the third epoch is stored; then every message comes, in order."""
    platform.running.stop()
    process = platform.start("train", environment(platform, 90, "90"), platform.folder / "90.log")
    spool = platform.folder / "90/neo-jobs/train-90/spool/callbacks"
    most = 0
    while process.poll() is None and "checkpoints/90/best.pt" not in platform.keys("checkpoints/90/"):
        most = max(most, len(list(spool.glob("[0-9]*.json"))))
        time.sleep(0.1)
    time.sleep(2)
    most = max(most, len(list(spool.glob("[0-9]*.json"))))
    platform.running.start()
    status = process.wait(600)
    epochs = [body["current_epoch"] for body in of(platform, 90, "progress")]
    ordered = epochs == list(range(EPOCHS + 1)) and bool(of(platform, 90, "completion"))
    return {
        "fault": "the backend is down",
        "status": status,
        "waited on disk": most,
        "holds": ordered and same(platform, 90, reference),
    }


def backend_silent(platform: Platform, reference: dict) -> dict:
    """The backend takes the first message and says nothing for a minute; then 500, 502, no JSON, and 422 once."""
    answers = ["time out", 500, 502, "<html>", 422]

    def behave(path: str, body: dict):
        return answers.pop(0) if "/jobs/91/" in path and "logs" not in path and answers else None

    platform.backend.behave = behave
    began = time.monotonic()
    status = platform.start("train", environment(platform, 91, "91"), platform.folder / "91.log").wait(900)
    platform.backend.behave = lambda path, body: None
    epochs = sorted({body["epoch"] for body in of(platform, 91, "results")})
    holds = len(epochs) >= EPOCHS - 1 and bool(of(platform, 91, "completion")) and same(platform, 91, reference)
    took = f"{time.monotonic() - began:.0f} s in all"
    return {
        "fault": f"silence, 500, 502, no JSON, a refusal ({took})",
        "status": status,
        "waited on disk": "",
        "holds": holds,
    }


def storage_down(platform: Platform, reference: dict) -> dict:
    """The storage goes when the data are there, and comes back when the training has nearly ended."""
    port = int(platform.endpoint.rpartition(":")[2])
    process = platform.start("train", environment(platform, 92, "92"), platform.folder / "92.log")
    while not workers(platform.folder, "train-92", "ipykernel_launcher") and process.poll() is None:
        time.sleep(0.05)
    platform.storage.stop()
    while process.poll() is None and len(of(platform, 92, "results")) < EPOCHS:
        time.sleep(0.1)
    time.sleep(1)
    platform.storage = ThreadedMotoServer(port=port, verbose=False)
    platform.storage.start()
    status = process.wait(600)
    holds = bool(of(platform, 92, "completion")) and same(platform, 92, reference)
    return {"fault": "the storage is down", "status": status, "waited on disk": "", "holds": holds}


def storage_hangs(platform: Platform, reference: dict) -> dict:
    """The storage takes checkpoints and never answers; then the container is told to stop, and tried again elsewhere."""
    stalling = Stalling(platform.endpoint, b"/checkpoints/93/")
    stalling.asleep = True
    hung = environment(platform, 93, "93-a", INTERNAL_STORAGE_ENDPOINT=stalling.endpoint)
    process = platform.start("train", hung, platform.folder / "93.log")
    while not workers(platform.folder, "train-93", "ipykernel_launcher") and process.poll() is None:
        time.sleep(0.05)
    stalling.asleep = False
    wait_for(lambda: bool(stalling.held) and len(of(platform, 93, "results")) > 1, process)
    process.terminate()
    began = time.monotonic()
    wait_for(lambda: not workers(platform.folder, "train-93"), process)  # it has saved, and stopped
    stopped = time.monotonic() - began
    wait_for(lambda: bool(of(platform, 93, "completion")), process)
    told = time.monotonic() - began - stopped
    status = process.wait(60)
    second = platform.start("train", environment(platform, 93, "93-b"), platform.folder / "93.log").wait(600)
    words = [body["status"] for body in of(platform, 93, "completion")]
    holds = told < 15 and words == ["failed", "completed"] and not second and same(platform, 93, reference)
    fault = f"the storage hangs, and SIGTERM: the worker stopped in {stopped:.0f} s, told {told:.0f} s later"
    return {"fault": fault, "status": f"{status}, then {second}", "waited on disk": "", "holds": holds}


def page(rows: list[dict], faults: list[dict], undisturbed: float) -> str:
    """What was found, for people."""
    drawn, rows = len(rows), [row for row in rows if row["first"] != 0]  # a first attempt that ended well was not hit
    good = sum(row["weights"] and row["all"] and row["second"] == 0 for row in rows)
    lines = ["# neo job under faults", ""]
    lines += [
        f"`python tests/platform_faults.py`: rtdetr_nano at 128 pixels, {EPOCHS} epochs, on two CPU cores that were shared; an undisturbed job took {undisturbed:.0f} s.",
        "",
    ]
    lines += [
        f"Killed by SIGKILL at {len(rows)} random moments, and tried again: {good} of {len(rows)} came to the same weights, bit by bit, with every epoch known to the backend.",
        "",
    ]
    if drawn > len(rows):
        lines[-1:] = [f"{drawn - len(rows)} of {drawn} signals hit nobody: that job ended well by itself.", ""]
    names = ["killed", "seconds", "when", "disk", "told", "epochs", "weights"]
    lines += [
        "| killed | s after the kernel began | when | second attempt's disk | last words | validation rows | weights |",
        "|---" * 7 + "|",
    ]
    lines += [
        "| " + " | ".join(str(row[n]) if n != "weights" else "the same" if row[n] else "others" for n in names) + " |"
        for row in rows
    ]
    lines += [
        "",
        "A container that is killed as a whole has no last word; the second attempt's is the only one. An epoch that it had said and not stored is said again, and its row overwritten.",
        "",
    ]
    lines += [
        "| fault | exit status | messages that waited on disk | every message that was not refused, in order; the same weights |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {f['fault']} | {f['status']} | {f['waited on disk']} | {'yes' if f['holds'] else 'no'} |" for f in faults
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--at-once", type=int, default=2)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="platform-"))
    platform = Platform(folder)
    threading.excepthook = lambda args: None  # a server that is stopped in the middle of an answer
    began = time.monotonic()
    status = platform.start("train", environment(platform, 1, "1"), folder / "1.log").wait(600)
    undisturbed = time.monotonic() - began
    assert status == 0, (folder / "1.log").read_text()[-2000:]
    reference = weights(platform, 1)
    print(f"undisturbed: {undisturbed:.0f} s", flush=True)
    with ThreadPoolExecutor(asked.at_once) as pool:
        jobs = [pool.submit(one, platform, 10 + k, k, 0.8 * undisturbed, reference) for k in range(asked.moments)]
        rows = [job.result() for job in jobs]
    faults = []
    for fault in (backend_down, backend_silent, storage_down, storage_hangs):
        faults.append(fault(platform, reference))
        print(json.dumps(faults[-1]), flush=True)
    KEPT.write_text(page(rows, faults, undisturbed), encoding="utf-8")
    wrong = platform.backend.wrong
    platform.close()
    assert not wrong, wrong
    if all(row["weights"] and row["all"] and not row["second"] for row in rows) and all(f["holds"] for f in faults):
        shutil.rmtree(folder)
    else:
        raise SystemExit(f"not all held; the logs are in {folder}")


if __name__ == "__main__":
    main()
