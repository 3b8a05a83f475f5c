"""The command line in a process of its own, as FiftyOne and a terminal have it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]


def neo(*words: str, wait: bool = True, cwd: Path | None = None, **environment: str):
    """What ended, or without `wait` the process that runs; nothing of this process's settings is handed on."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("FIFTYONE", "NEO_"))} | environment
    command = [sys.executable, "-c", "import sys; from neo_nb.cli.main import main; sys.exit(main())", *words]
    known["PYTHONPATH"] = f"{ROOT}:{known.get('PYTHONPATH', '')}"
    if wait:
        return subprocess.run(command, capture_output=True, text=True, env=known, timeout=900, cwd=cwd)
    message = tempfile.TemporaryFile("w+")  # a pipe that nobody reads may fill up, and a server then waits
    # a shell that runs the tests in the background has them ignore Ctrl-C, and their children with them
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    streams = {"stdout": message, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, **streams, env=known, cwd=cwd, preexec_fn=heed)
    process.stdout = message
    return process


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def page_of(address: str, process: subprocess.Popen) -> str:
    """What a server says, once it does."""
    for _ in range(720):  # longer than `neo errors --serve` waits itself
        if process.poll() is not None:
            process.stdout.seek(0)
            raise AssertionError(process.stdout.read())
        try:
            return urllib.request.urlopen(address, timeout=5).read().decode()
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"nothing was served at {address} within six minutes")
