"""The GPU suite, rehearsed whole at small sizes on a CPU."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from neo_nb.gpu.suite import PARTS, Findings, keep, main, markdown

ROOT = Path(__file__).parents[1]


def bare_python(folder: Path) -> tuple[Path, Path]:
    """A Python that finds what the device script says a machine has and what it packs, and nothing else of ours."""
    script = (ROOT / ".ci" / "device.sh").read_text()
    words = " ".join(re.findall(r'^(?:there|ours)="(.*)"$', script, re.M)).replace("$there", "")
    known = {_name(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
    wanted = [_name(word) for word in words.split()]
    assert len(wanted) > 20 and not set(wanted) - known.keys()
    for name in wanted:  # grows as it is read
        for needed in map(Requirement, known[name].requires or ()):
            if (not needed.marker or needed.marker.evaluate({"extra": ""})) and _name(needed.name) not in wanted:
                wanted.append(_name(needed.name))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    site = folder / "site"
    site.mkdir()
    for name in wanted:
        for file in known[name].files if name in known else ():
            top, link = file.parts[0], site / file.parts[0]
            if top not in ("..", "__pycache__") and not link.exists():
                link.symlink_to(Path(known[name].locate_file(top)))
    return folder / "venv" / "bin" / "python", site


def _name(words: str) -> str:
    return re.sub(r"[-_.]+", "-", words).lower()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    python, site = bare_python(folder)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    env |= {"PYTHONPATH": f"{ROOT}:{site}", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, "-m", "neo_nb.gpu.suite", folder, "--rehearse", "--seconds", "900"]
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    loaded = subprocess.run([python, "-c", "import fiftyone"], env=env, capture_output=True)
    assert loaded.returncode == 1  # what is not listed is not there
    return folder, [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", PARTS)
def test_every_part_says_something_and_none_fails(found, name):
    rows = [row for row in found[1] if row["part"] == name]
    assert rows and not [row for row in rows if {"failed", "skipped", "out_of_time"} & row.keys()], rows


def test_what_a_rehearsal_can_know_is_right(found):
    rows = found[1]

    def of(part, key):
        return [row[key] for row in rows if row["part"] == part and key in row]

    assert max(of("same", "largest_logit")) == 0  # one device
    assert of("out_of_memory", "went_on_with") == [4]
    assert of("killed", "ended_by") == [9] and of("killed", "epochs") == [3]
    assert set(of("step", "who")) == set(of("latencies", "who")) & {"ours", "transformers"}
    assert all(value > 0 for key in ("images_per_s", "tflop", "share_of_peak") for value in of("step", key))
    assert all(a <= b <= c for a, b, c in zip(*(of("latencies", f"p{p}_ms") for p in (50, 90, 99))))
    assert {"ours, compiled"} <= set(of("compiled", "who")) and of("compiled_step", "who") == ["ours, compiled"]
    assert of("marked", "outcome")[-1] == "skipped" and len(of("learning", "epoch")) == 1


def test_lines_and_page_are_whole_and_can_be_kept(found, tmp_path):
    folder, rows = found
    assert rows[-1]["ended"] and rows[-1]["seconds_left"] > 0
    page = (folder / "gpu.md").read_text()
    assert all(f"## {part.title}\n" in page for part in PARTS.values())
    assert keep(folder / "gpu.jsonl", tmp_path) == tmp_path / "kept" / "rehearsal" / "gpu.md"
    kept = (tmp_path / "kept" / "rehearsal" / "gpu.md").read_text()
    assert kept.splitlines()[2].split(",")[0] == "`python -m neo_nb.gpu.suite FOLDER --rehearse --seconds 900`"


def test_a_card_names_its_folder(tmp_path, capsys, monkeypatch):
    findings = Findings(tmp_path, "bash .gpu/run.sh FOLDER")
    findings.say("machine", card="NVIDIA H100 80GB HBM3", memory_gib=79.123456)
    findings.say("step", images_per_s=float("nan"), who="a|b")
    capsys.readouterr()
    monkeypatch.setenv("NEO_ROOT", str(tmp_path))
    assert main([str(tmp_path / "gpu.jsonl"), "--keep"]) == 0
    place = tmp_path / "reports" / "kept" / "nvidia-h100-80gb-hbm3" / "gpu.md"
    assert capsys.readouterr().out.strip() == str(place)
    assert place.read_text().startswith("# NVIDIA H100 80GB HBM3\n\n`bash .gpu/run.sh FOLDER`")
    assert "| nan | a/b |" in markdown(findings.rows) and "79.12 |" in place.read_text()
    assert main([str(tmp_path / "none.jsonl"), "--keep"]) == 2
    assert "no findings of a suite" in capsys.readouterr().err
