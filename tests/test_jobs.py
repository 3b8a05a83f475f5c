"""Jobs for machines elsewhere: what each engine gets is read by that engine's own validator, without a network."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from command import ROOT, neo

from neo_nb.base.core import InputError
from neo_nb.cli import commands, train_command
from neo_nb.cli.launch_command import launch
from neo_nb.cli.main import main
from neo_nb.jobs.huggingface import hf_jobs
from neo_nb.jobs.job import Job, Volume
from neo_nb.jobs.kubernetes import k8s_manifests
from neo_nb.jobs.skypilot import sky_task
from neo_nb.jobs.slurm import slurm_script
from neo_nb.jobs.submit import ENGINES, preview, submit

SOURCES = {"hf": "hf://buckets/me/runs", "sky": "s3://runs/cells", "slurm": "/scratch/runs", "k8s": "runs"}
SECRET = "hf_" + "Z" * 34


def job(engine: str, **change) -> Job:
    known = {
        "name": "night",
        "image": "registry.example/neo_nb:1",
        "command": ("neo", "train", "--data", "bccd", "--weights", "it's here"),
        "accelerator": "a100",
        "count": 4,
        "retries": 3,
        "secrets": ("HF_TOKEN",),
        "env": {"NEO_DATA": "/data", "EXTRA": 'two "words" & $more'},
        "volumes": (Volume(SOURCES[engine], "/out"),),
    }
    return Job(**known | change)


VARIANTS = [{}, {"nodes": 2}, {"accelerator": None, "count": 0}, {"retries": 0, "volumes": (), "secrets": ()}]
variants = pytest.mark.parametrize("change", VARIANTS, ids=["single", "nodes", "cpu", "bare"])


@variants
def test_hugging_face_makes_its_payload_of_it(change):
    from huggingface_hub import Volume as HubVolume
    from huggingface_hub import run_job
    from huggingface_hub._jobs_api import JobHardware, _create_job_spec

    found = hf_jobs(job("hf", **change))
    assert len(found) == change.get("nodes", 1)
    for arguments in found:
        assert set(arguments) <= set(inspect.signature(run_job).parameters)
        made = {"volumes": [HubVolume(**volume) for volume in arguments["volumes"]]}
        sent = _create_job_spec(**arguments | made | {"secrets": dict.fromkeys(arguments["secrets"], "value")})
        assert sent["timeoutSeconds"] == 43_200 and sent["attempts"] == change.get("retries", 3) + 1
        assert sent["flavor"] in [flavor.value for flavor in JobHardware]
        assert all(isinstance(value, str) for value in sent["environment"].values())
        json.dumps(sent)
    if len(found) > 1:
        shell = subprocess.run(["bash", "-nc", found[0]["command"][2]], capture_output=True)
        assert shell.returncode == 0 and {one["env"]["NEO_NODE_RANK"] for one in found} == {"0", "1"}


READ_TASKS = """
import json, sys, sky
from sky.utils import schemas
for task in json.load(sys.stdin):
    known = set(schemas.get_resources_schema()["properties"])
    assert set(task["resources"]) <= known, set(task["resources"]) - known
    read = sky.Task.from_yaml_config(task)
    [resources] = read.resources
    print(json.dumps([read.num_nodes, resources.accelerators, resources.job_recovery]))
try:
    sky.Task.from_yaml_config(task | {"nodes": 2})
except ValueError:
    print('"an unknown key is refused"')
"""


def test_skypilot_reads_the_tasks(tmp_path):
    """SkyPilot wants older packages than ours, so it has an environment of its own, which uv makes and keeps."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("uv, which makes SkyPilot's environment, is not here")
    command = [uv, "run", "--no-project", "--isolated", "--quiet", "--python", sys.executable]
    command += ["--with", "skypilot==0.14.0", "python", "-c", READ_TASKS]
    tasks = [sky_task(replace(job("sky"), **change)) for change in VARIANTS]
    tasks.append(sky_task(job("sky", volumes=(Volume("s3://runs", "/out"), Volume("shared", "/data", True)))))
    known = {name: value for name, value in os.environ.items() if not name.startswith(("NEO_", "PYTHONPATH"))}
    cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True).stdout.strip()
    known |= {"HOME": str(tmp_path), "UV_CACHE_DIR": cache, "UV_LINK_MODE": "copy"}
    ended = subprocess.run(command, input=json.dumps(tasks), capture_output=True, text=True, env=known, cwd=tmp_path)
    if ended.returncode and "Traceback" not in ended.stderr:
        pytest.skip(f"SkyPilot cannot be had here: {ended.stderr.strip().splitlines()[-1]}")
    assert ended.returncode == 0, ended.stderr
    *read, refused = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [nodes for nodes, *_ in read] == [1, 2, 1, 1, 1] and refused == "an unknown key is refused"
    assert read[0][1] == {"A100": 4} and read[2][1] is None
    recovery = {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75, 143]}
    assert recovery.items() <= read[0][2].items() and not read[3][2]


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return dict(line.partition("=")[::2] for line in lines)


@variants
def test_slurm_scripts_are_shell_and_their_directives_are_submitits(change, tmp_path):
    submitit = pytest.importorskip("submitit.slurm.slurm", reason="submitit is not installed")
    script = slurm_script(job("slurm", **change))
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    ours = directives(script)
    nodes, count = change.get("nodes", 1), change.get("count", 4)
    options = {"nodes": nodes, "ntasks_per_node": 1, "job_name": "night", "time": 720, "signal_delay_s": 120}
    options |= {"gpus_per_node": f"a100:{count}"} if count else {}
    more = {"export": ours["export"], "requeue": ours.get("requeue"), "additional_parameters": {}}
    options["additional_parameters"] = {
        key: value or True for key, value in more.items() if value is not None and key != "additional_parameters"
    }
    theirs = directives(submitit._make_sbatch_string(command="true", folder=tmp_path, **options))
    for key in ("nodes", "ntasks-per-node", "job-name", "time", "gpus-per-node", "export", "open-mode", "requeue"):
        assert ours.get(key) == theirs.get(key), key
    assert theirs["signal"].endswith("@120") and ours["signal"] == "TERM@120"
    assert set(ours) <= set(theirs)


@variants
def test_kubernetes_schemas_take_the_objects(change):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    documents = list(yaml.safe_load_all(preview("k8s", job("k8s", **change))))
    assert documents == k8s_manifests(job("k8s", **change)) and len(documents) == change.get("nodes", 1)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "a"},
        "stringData": {"A": "b"},
        "type": "Opaque",
    }
    for document in [*documents, secret]:
        validate.validate(document, validate.latest_version(), strict=True)
    wrong = json.loads(json.dumps(documents[-1]))
    wrong["spec"]["backofLimit"] = 3
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, validate.latest_version(), strict=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_command_line_shows_a_job_and_no_secret(engine, nodes, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    kind = "a100" if engine != "k8s" else "NVIDIA-A100-SXM4-80GB"
    flags = (
        f"launch --on {engine} --image registry.example/neo_nb:1 --accelerator {kind}:4 --nodes {nodes} --name night"
    )
    flags += f" --volume {SOURCES[engine]}:/out --secret HF_TOKEN --env NEO_DATA=/data --timeout 90m --dry-run"
    assert main([*flags.split(), "--", "train", "--data", "bccd", "--epochs", "40"]) == 0
    shown = capsys.readouterr().out
    assert SECRET not in shown and "HF_TOKEN" in shown
    for word in ("night", "registry.example/neo_nb:1", "bccd", "/out/reports", "--gpus", "NEO_JOB"):
        assert word in shown, word
    assert ("NEO_RENDEZVOUS" in shown) == (nodes > 1)
    assert main([*flags.split(), "--json", "--", "train", "--data", "bccd", "--epochs", "40"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["job"].strip() == shown.strip() and known["retries"] == 3 and not known["submitted"]


def test_a_secret_as_text_is_refused_in_one_line(capsys):
    begin = ["launch", "--on", "slurm", "--dry-run"]
    for words in (
        [*begin, "--env", f"HF_TOKEN={SECRET}", "--", "train"],
        [*begin, "--env", f"A={SECRET}", "--", "train"],
    ):
        assert main(words) == 2
        message = capsys.readouterr()
        assert (
            SECRET not in message.err + message.out and "pass --secret" in message.err and message.err.count("\n") == 1
        )
    assert main([*begin, "--", "train", "--weights", SECRET]) == 2
    assert SECRET not in capsys.readouterr().err


def test_what_is_behind_the_dashes_is_the_other_commands(capsys):
    assert main(["launch", "--on", "slurm", "--dry-run", "--", "evaluate", "3", "--data", "bccd", "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#!/usr/bin/env bash") and "neo evaluate 3 --data bccd --json" in shown


def test_a_missing_client_or_login_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for engine, program in {"sky": "sky", "slurm": "sbatch", "k8s": "kubectl"}.items():
        with pytest.raises(InputError, match=f"{program} is not installed here"):
            submit(engine, job(engine))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match="not logged in to Hugging Face; run: hf auth login"):
        submit("hf", job("hf"))


def test_hugging_face_gets_values_at_submission_and_one_job_per_node(monkeypatch):
    sent = []

    class Info:
        id, url = "1", "https://huggingface.co/jobs/me/1"

    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: SECRET)
    monkeypatch.setattr("huggingface_hub.run_job", lambda **arguments: sent.append(arguments) or Info)
    said = submit("hf", job("hf", nodes=2))
    assert [one["secrets"] for one in sent] == [{"HF_TOKEN": SECRET}] * 2 and SECRET not in said
    assert [one["network_group"] for one in sent] == ["night", "night"]
    assert sent[0]["volumes"][0].to_dict()["source"] == "me/runs"


def test_the_next_attempt_of_a_job_goes_on_with_its_run(monkeypatch, tmp_path):
    """The same command, twice, under the same name; what executes the notebook only notes what it was told."""
    monkeypatch.setenv("NEO_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("NEO_JOB", "night")
    told = []

    def execute(name, run, parameters, new=True):
        from neo_nb.runs.run import record

        record(run, parameters={key: value for key, value in parameters.items() if key != "resume"})
        told.append((run, parameters, new))
        return commands.Result(run=run)

    monkeypatch.setattr(train_command, "run_notebook", execute)
    words = ["--data", "scenes", "--epochs", "3", "--device", "cpu"]
    first = train_command.train(words).run
    assert train_command.train(words).run == first and not told[1][1].get("resume"), "nothing was saved: begun anew"
    (first / "weights").mkdir()
    (first / "weights/last.pt").touch()
    assert train_command.train(words).run == first
    assert told[2][1]["resume"] and told[2][1]["epochs"] == 3 and told[2][2] is False
    monkeypatch.setenv("NEO_JOB", "another")
    assert train_command.train(words).run != first
    monkeypatch.delenv("NEO_JOB")
    assert train_command.train(words).run != first


def test_an_error_of_nodes_is_one_line(tmp_path):
    for known in ({"NEO_NODES": "2"}, {"NEO_NODES": "two"}):
        ended = neo("train", "--data", "scenes", cwd=tmp_path, NEO_ROOT=str(ROOT), **known)
        assert ended.returncode == 2 and ended.stderr.startswith("error: NEO_"), ended.stderr


def test_names_tell_jobs_apart():
    found = launch("--on slurm --dry-run -- data fetch bccd".split()).data["name"]
    assert found.startswith("data-fetch-") and launch("--on slurm --dry-run -- train --data bccd".split()).data[
        "name"
    ].startswith("train-bccd-")
    assert found != launch("--on slurm --dry-run -- train".split()).data["name"]
