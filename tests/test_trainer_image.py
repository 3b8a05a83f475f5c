"""The image of a platform's trainer, without an engine: its files by their tools' own rules, and the README's command."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from command import ROOT, neo

pytest.importorskip("moto", reason="moto, the S3 server of the tests, is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from platform_job import SECRETS, Platform  # noqa: E402

from neo_nb.jobs.capabilities import TRAINED  # noqa: E402
from neo_nb.jobs.environment import SPELLINGS  # noqa: E402
from neo_nb.models.zoo import list_models  # noqa: E402

DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """What `neo job --files` writes."""
    folder = tmp_path_factory.mktemp("image")
    done = neo("job", "--files", "trainer", cwd=folder)
    assert done.returncode == 0 and "uv build --wheel" in done.stdout, done.stderr
    again = neo("job", "--files", "trainer", cwd=folder)
    assert again.returncode == 2 and "there already" in again.stderr
    return folder / "trainer"


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Its steps: word, rest."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def command_of(dockerfile: Path) -> list[str]:
    [words] = [json.loads(rest) for word, rest in instructions(dockerfile) if word == "CMD"]
    return words


def docker_run() -> tuple[dict[str, str | None], list[str]]:
    """The README's line: its variables, None for those of the shell, and what stands behind the image's name."""
    [block] = re.findall(r"```bash\n(docker run .*?)```", README, re.S)
    words = shlex.split(block.replace("\\\n", " "))
    variables, rest = {}, []
    take = iter(words[2:])
    for word in take:
        if word == "-e":
            name, equals, value = next(take).partition("=")
            variables[name] = value if equals else None
        elif word in ("--gpus", "--shm-size"):
            next(take)
        elif word != "--rm":
            rest.append(word)
    assert rest[0] == "trainer-neo"
    return variables, rest[1:]


def test_the_files_keep_the_rules_of_their_tools(image):
    lint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if lint:
        files = [image / name for name in DOCKERFILES]
        told = subprocess.run([lint, "--ignore", "DL3013", *files], capture_output=True, text=True)
        assert told.returncode == 0 and not told.stdout.strip(), told.stdout
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    job = yaml.safe_load((image / "job.yaml").read_text())
    validate.validate(job, "1.32", strict=True)
    pod = job["spec"]["template"]["spec"]
    assert (job["spec"]["backoffLimit"], job["spec"]["activeDeadlineSeconds"]) == (2, 86_400)
    assert pod["restartPolicy"] == "Never" and pod["containers"][0]["command"] == command_of(image / "Dockerfile.cuda")
    plain = [variable["name"] for variable in pod["containers"][0]["env"]]
    assert not {*plain} & {*SECRETS}, "keys come from the Secret"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_each_step_of_an_image_finds_what_it_wants(image, name):
    """What is copied is there, what is installed is an extra of ours, what is run is a command, the user owns it."""
    steps = instructions(image / name)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    copied = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1] if source[0] != "-"]
    assert copied[0] == "neo_nb-*.whl" and all((image / source).is_file() for source in copied[1:])
    [asked] = re.findall(r"neo_nb-\*\.whl\)\[([\w,]+)\]", str(steps))
    assert {"train", "platform"} <= {*asked.split(",")} <= {*extras}
    run = [rest for word, rest in steps if word == "RUN"]
    [models] = [rest for rest in run if rest.startswith("neo ")]
    assert neo(*models.partition(" >")[0].split()[1:], "--help").returncode == 0
    words = [word for word, _ in steps]
    assert words.index("USER") < words.index("WORKDIR") < words.index("CMD")
    assert (image / command_of(image / name)[1]).is_file()


def test_the_readme_s_docker_run_trains_to_the_end(image, tmp_path):
    """As an engineer who reads it for the first time: only hosts are others, and the image is its command, run here."""
    variables, words = docker_run()
    platform = Platform(tmp_path)
    try:
        hosts = {"http://backend:8000": platform.backend.url, "http://storage:9000": platform.endpoint}
        known = {name: SECRETS[name] if value is None else value for name, value in variables.items()}
        for host, here in hosts.items():
            known = {name: value.replace(host, here) for name, value in known.items()}
        platform.put_data(known["DATASET_ID"], platform.document | {"storage_info": {}}, tmp_path / "data/images")
        own = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        own |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        own |= {"TMPDIR": str(tmp_path), "DATASET_CACHE_DIR": str(tmp_path / "cache")}
        command = words or command_of(image / "Dockerfile.cuda")
        command = [sys.executable if command[0] == "python" else command[0], *command[1:]]
        done = subprocess.run(command, cwd=image, env=own | known, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert platform.backend.wrong == []
        progress = platform.backend.named("progress")
        assert [body["current_epoch"] for body in progress] == [0, 1, 2] and progress[0]["job_id"] == 123
        [ended] = platform.backend.named("completion")
        assert ended["status"] == "completed" and ended["best_checkpoint_path"].endswith("checkpoints/123/best.pt")
        assert {"checkpoints/123/best.pt", "checkpoints/123/run/report.html"} <= {*platform.keys("checkpoints/123/")}
        assert "without effect" not in done.stdout and "taken in place" not in done.stdout, "the README's own settings"
        assert not [value for value in SECRETS.values() if value in done.stdout + done.stderr]
    finally:
        platform.close()


def test_the_readme_names_every_variable():
    section = README.partition("## A training platform's container")[2].partition("\n## ")[0]
    table = " ".join(line for line in section.splitlines() if line.startswith("|"))
    wanted = {name for name in docker_run()[0] if not name.startswith(("EXTERNAL", "INTERNAL"))}
    wanted |= {variable for variable, _ in SPELLINGS.values() if variable}
    assert not [name for name in sorted(wanted) if name not in table]


def test_validated_are_the_models_that_tests_train():
    for file, models in TRAINED.items():
        text = (ROOT / file).read_text()
        read = f'TRAINED["{file}"]' in text  # the test goes through the list itself
        assert {*models} <= {*list_models()}
        assert read or not [name for name in models if f'"{name}"' not in text], file
    from test_families import WALKED

    assert {*TRAINED["tests/test_families.py"]} == {*WALKED}, "a model that every command is walked with is validated"
