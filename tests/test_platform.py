"""A training platform's container against a real S3 server and a real backend: what it says, keeps and survives."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import httpx
import pytest
from command import neo
from safetensors.numpy import load

pytest.importorskip("moto", reason="moto, the S3 server of the tests, is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from moto.core import DEFAULT_ACCOUNT_ID  # noqa: E402
from moto.s3.models import s3_backends  # noqa: E402
from platform_job import (  # noqa: E402
    CHECKPOINTS,
    CONFIG,
    DATASETS,
    SECRETS,
    Cutting,
    Platform,
    Stalling,
    nested,
    wait_for,
    workers,
)

from neo_nb.base.core import InputError  # noqa: E402
from neo_nb.jobs import export, predict, train  # noqa: E402
from neo_nb.jobs.dataset import bring  # noqa: E402
from neo_nb.jobs.environment import Bucket, read_address, read_order  # noqa: E402
from neo_nb.jobs.storage import S3, Folder, StorageFailed, open_place  # noqa: E402


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    made = Platform(tmp_path_factory.mktemp("platform"))
    yield made
    made.close()


def stored_weights(platform: Platform, key: str) -> dict:
    return load(zipfile.ZipFile(io.BytesIO(platform.read(key))).read("weights.safetensors"))


def of(platform: Platform, job: int, *names: str) -> list[dict]:
    return [body for name, body in platform.backend.heard if name in names and body.get("job_id") == job]


def no_secret_in(*texts: str) -> None:
    for text in texts:
        assert not [value for value in SECRETS.values() if value in text]


@pytest.fixture(scope="module")
def trained(platform):
    """Job 17 as it should be, and beside it job 18: its backend is down at first, its worker is killed, it is tried again."""
    down = {"left": 6}

    def behave(path, body):
        if "/jobs/18/" in path and down["left"] > 0:
            down["left"] -= 1
            return (500, 503, "no JSON")[down["left"] % 3]

    platform.backend.behave = behave
    config = CONFIG | {"epochs": 5}
    one = platform.environment(17, CONFIG=json.dumps(config))
    other = platform.environment(18, disk="second", CONFIG=json.dumps(config | {"colour": "red"}))
    jobs = [platform.start("train", known, platform.folder / f"{n}.log") for n, known in ((17, one), (18, other))]
    wait_for(lambda: "checkpoints/18/last.pt" in platform.keys("checkpoints/18/"), jobs[1])
    for process in workers(platform.folder, "train-18", "neo_nb.cli.main"):
        os.kill(process, 9)
    killed = jobs[1].wait(120)
    failed = of(platform, 18, "completion")
    again = platform.environment(18, disk="third", CONFIG=json.dumps(config))
    second = platform.start("train", again, platform.folder / "18-2.log")
    statuses = [jobs[0].wait(300), killed, second.wait(300)]
    return statuses, failed


def test_a_job_says_every_epoch_once_and_keeps_its_weights(platform, trained):
    statuses, _ = trained
    assert statuses == [0, 1, 0], (platform.folder / "17.log").read_text()[-3000:]
    assert platform.backend.wrong == []
    progress = of(platform, 17, "progress")
    assert [body["current_epoch"] for body in progress] == [0, 1, 2, 3, 4, 5]
    assert progress[0]["metrics"] is None and progress[1]["metrics"]["extra_metrics"]["loss"] > 0
    assert [body["epoch"] for body in of(platform, 17, "results")] == [1, 2, 3, 4, 5]
    [done] = of(platform, 17, "completion")
    assert done["total_epochs_completed"] == 5 and done["best_epoch"] in range(1, 6)
    for name in ("best", "last"):
        assert done[f"{name}_checkpoint_path"] == f"s3://{CHECKPOINTS}/checkpoints/17/{name}.pt"
        assert stored_weights(platform, f"checkpoints/17/{name}.pt")
    assert {body["event_type"] for body in of(platform, 17, "logs")} >= {"dataset_loaded", "validation_complete"}
    fetched = [(platform.folder / name).read_text().count("fetching cells") for name in ("17.log", "18.log")]
    assert sum(fetched) == 1, "two jobs at once bring the data once"


def test_a_killed_job_is_told_and_the_next_attempt_comes_to_the_same(platform, trained):
    _, [failed] = trained
    assert failed["error_message"].startswith("[Resource] the worker was ended by SIGKILL")
    assert failed["total_epochs_completed"] >= 1
    epochs = [body["current_epoch"] for body in of(platform, 18, "progress")]
    assert sorted(set(epochs)) == [0, 1, 2, 3, 4, 5] and len(epochs) == 7, "each once, and a start for each attempt"
    assert [body["epoch"] for body in of(platform, 18, "results")] == [1, 2, 3, 4, 5]
    assert [body["status"] for body in of(platform, 18, "completion")] == ["failed", "completed"]
    for name in ("best", "last"):
        one, two = (stored_weights(platform, f"checkpoints/{job}/{name}.pt") for job in (17, 18))
        assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one), name
    assert "going on after update" in (platform.folder / "18-2.log").read_text()
    assert "CONFIG.colour" in (platform.folder / "18.log").read_text()


def test_prediction_and_export_of_its_weights(platform, trained):
    wanted = {"conf": 0.0, "max_det": 5, "unheard": 1}
    asked = platform.environment(
        5,
        INFERENCE_JOB_ID="5",
        CHECKPOINT_S3_URI=f"s3://{CHECKPOINTS}/checkpoints/17/best.pt",
        IMAGES_S3_URI=f"s3://{DATASETS}/datasets/cells/images/",
        CONFIG=json.dumps(wanted),
    )
    written = platform.environment(6, EXPORT_JOB_ID="6", TRAINING_JOB_ID="17", EXPORT_FORMAT="onnx")
    written["CONFIG"] = json.dumps({"advanced_config": {"min_score": 0.001}})
    del written["DATASET_ID"]  # the training says which data prove it
    jobs = [platform.start(kind, known) for kind, known in (("predict", asked), ("export", written))]
    assert [job.wait(300) for job in jobs] == [0, 0], (platform.folder / "job.log").read_text()[-3000:]
    assert platform.backend.wrong == []
    started, done = (body for name, body in platform.backend.heard if body.get("type") == "inference")
    assert done["total_images"] == 10 and all(len(row["predictions"]) <= 5 for row in done["results"])
    kept = json.loads(platform.read("inference-results/5/predictions.json"))
    assert kept["results"] == done["results"] and kept["results"][0]["predictions"][0]["class_name"] in (
        "tall",
        "wide",
    )
    assert len(platform.keys("inference-results/5/labels/")) == len(platform.keys("inference-results/5/images/")) == 10
    [exported] = [body for name, body in platform.backend.heard if body.get("type") == "export" and "metadata" in body]
    archive = zipfile.ZipFile(io.BytesIO(platform.read(exported["output_s3_uri"].partition(f"{CHECKPOINTS}/")[2])))
    assert set(archive.namelist()) == {"model.onnx", "metadata.json", "runtime.py", "runtime.hpp"}
    assert json.loads(archive.read("metadata.json")) == exported["metadata"]
    fields = (
        "framework model_name export_format task_type input_shape input_dtype output_shape class_names num_classes"
    )
    fields += " outputs created_at export_config confidence_threshold iou_threshold preprocessing postprocessing"
    assert set(exported["metadata"]) == set(fields.split())
    archive.extractall(platform.folder / "export")
    assert exported["metadata"]["input_shape"][0] == 1
    images = sorted(map(str, (platform.folder / "data/images").iterdir()))[:3]  # more than the file takes at once
    command = [sys.executable, "-I", str(platform.folder / "export/runtime.py"), *images]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert list(told) == images


def test_no_secret_is_anywhere(platform, trained):
    no_secret_in(*(path.read_text() for path in platform.folder.glob("*.log")))
    no_secret_in(*(json.dumps(body) for _, body in platform.backend.heard))
    for folder in platform.folder.glob("*/neo-jobs/*"):
        texts = (
            path.read_text(errors="ignore")
            for path in folder.rglob("*")
            if path.suffix in (".ipynb", ".json", ".html")
        )
        no_secret_in(*texts)
    no_secret_in(*(platform.read(key).decode(errors="ignore") for key in platform.keys() if not key.endswith(".pt")))


def test_the_second_contract_stops_a_job_and_keeps_what_there_is(platform):
    known = platform.environment(19, BACKEND_BASE_URL=platform.backend.url, TRACE_ID="t-7")
    known |= {"CONFIG": json.dumps(CONFIG | {"epochs": 1000}), "DATASET_S3_URI": f"s3://{DATASETS}/datasets/cells/"}
    del known["CALLBACK_URL"]
    before = len(platform.backend.heard)
    job = platform.start("train", known, platform.folder / "19.log")
    heard = platform.backend.heard
    wait_for(lambda: any(name == "heartbeat" and body["epoch"] for name, body in heard[before:]), job)
    platform.backend.should_continue = False
    assert job.wait(120) == 0 and platform.backend.wrong == []
    platform.backend.should_continue = True
    heard = platform.backend.heard[before:]
    events = [body["event_type"] for name, body in heard if name == "event"]
    assert (
        events[:3] == ["dataset_loaded", "model_initialized", "validation_complete"] and "checkpoint_saved" in events
    )
    assert [name for name, _ in heard][-1] == "done"
    done = heard[-1][1]
    assert done["status"] == "succeeded" and done["artifacts"]["last_checkpoint"].endswith("checkpoints/19/last.pt")
    assert "checkpoints/19/last.pt" in platform.keys("checkpoints/19/")
    assert {h.get("authorization") for h in platform.backend.headers[-3:]} == {f"Bearer {SECRETS['CALLBACK_TOKEN']}"}
    lines = (platform.folder / "19.log").read_text().splitlines()
    assert all(line.startswith("[TRACE:t-7] [") for line in lines)


WRONG = {
    "task": (
        "train",
        {"TASK_TYPE": "instance_segmentation"},
        "[Config] TASK_TYPE instance_segmentation: rtdetr-nano is for",
        1,
    ),
    "model": ("train", {"MODEL_NAME": "centernet-r18"}, "[Config] MODEL_NAME centernet-r18: this trainer", 1),
    "value": ("train", {"EPOCHS": "many"}, "[Config] EPOCHS: ", 1),
    "delay": ("train", {"CALLBACK_RETRY_DELAY": "0"}, "[Config] CALLBACK_RETRY_DELAY: input should be greater", 1),
    "retries": (
        "export",
        {"CALLBACK_MAX_RETRIES": "1e9", "EXPORT_JOB_ID": "20"},
        "[Config] CALLBACK_MAX_RETRIES: input should be",
        3,
    ),
    "flag": ("train", {"ADVANCED_CONFIG": '{"amp": "perhaps"}'}, "[Config] advanced.amp: true or false was", 1),
    "half a key": (
        "train",
        {"INTERNAL_STORAGE_SECRET_KEY": ""},
        "[Config] INTERNAL_STORAGE_SECRET_KEY: is not set, and INTERNAL_STORAGE_ACCESS_KEY is",
        1,
    ),
    "no keys": (
        "predict",
        {"INFERENCE_JOB_ID": "20", "INTERNAL_STORAGE_SECRET_KEY": "", "INTERNAL_STORAGE_ACCESS_KEY": ""},
        "[Config] INTERNAL_STORAGE_ACCESS_KEY: is not set: what the job makes would be lost with its container",
        1,
    ),
    "hash": (
        "train",
        {"DATASET_VERSION_HASH": "0" * 64},
        "[Dataset] datasets/cells/: the annotations have changed",
        1,
    ),
    "data": ("train", {"DATASET_ID": "none"}, "[Dataset] datasets/none/: neither annotations_detection.json", 1),
    "room": ("train", {"DATASET_CACHE_MAX_GB": "0.000001", "DATASET_CACHE_DIR": "small"}, "[Resource] ", 1),
    "images": ("predict", {"INFERENCE_JOB_ID": "20", "CHECKPOINT_S3_URI": "s3://nowhere/x.pt"}, "[Checkpoint] ", 1),
    "format": ("export", {"EXPORT_JOB_ID": "20", "EXPORT_FORMAT": "coreml"}, "[Config] EXPORT_FORMAT coreml: ", 3),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_told_to_the_platform(platform, name, tmp_path, monkeypatch):
    kind, change, message, status = WRONG[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    main = {"train": train.main, "predict": predict.main, "export": export.main}[kind]
    before = len(platform.backend.heard)
    assert main(platform.environment(20) | change) == status
    last = [body for word, body in platform.backend.heard[before:] if word == "completion"]
    assert len(last) == 1 and last[0]["status"] == "failed" and last[0]["error_message"].startswith(message)
    assert platform.backend.wrong == []


def test_the_second_contract_has_no_other_place_than_the_bucket(platform, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    known = platform.environment(26, BACKEND_BASE_URL=platform.backend.url, CALLBACK_URL="", TRACE_ID="t-8")
    keys = {"INTERNAL_STORAGE_ACCESS_KEY": "", "INTERNAL_STORAGE_SECRET_KEY": ""}
    assert train.main(known | keys) == 1
    name, done = platform.backend.heard[-1]
    assert name == "done" and done["error"].startswith("[Config] INTERNAL_STORAGE_ACCESS_KEY: is not set")
    assert not list(tmp_path.rglob("storage")) and platform.backend.wrong == []


STOPPED = """
import sys, time
from pathlib import Path
from neo_nb.jobs import supervisor
from neo_nb.jobs.checkpoints import Keeper, result_place

supervisor.STOPPING = 1.0
worker = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('now', 'ready', flush=True); time.sleep(60)"


def act(job):
    if sys.argv[1] in ("worker", "platform"):
        job.must(job.work(["-c", worker], program=[sys.executable]))
    if sys.argv[1] == "upload":
        keeper = Keeper(job, result_place(job), {})
        job.after = keeper.last_word
        state = job.folder / "state"
        state.mkdir()
        (state / "last.pt").write_bytes(b"a state")
        keeper.take(state, {"step": 1, "epoch": 1}, ended=True)
        job.closing = True
        job.reporter.log("now ready")
        assert keeper.close()
        job.closing = False
        raise supervisor.JobFailed("Resource", f"stopped by {job.whom}: {keeper.error or 'it hangs'}")
    job.reporter.log("now ready")
    time.sleep(60)


sys.exit(supervisor.supervise(sys.argv[2], act))
"""


@pytest.mark.parametrize("where", ["worker", "before", "upload", "platform"])
def test_a_container_that_is_asked_to_stop_says_so(platform, where, tmp_path):
    known = platform.environment(25, disk=f"stopped-{where}") | {"PYTHONPATH": str(Path(__file__).parents[1])}
    log, stalling = tmp_path / "log", Stalling(platform.endpoint, b"/state.json")
    if where == "upload":
        known["INTERNAL_STORAGE_ENDPOINT"] = stalling.endpoint
    if where == "platform":
        known |= {"BACKEND_BASE_URL": platform.backend.url, "INFERENCE_JOB_ID": "25"}
    kind = "predict" if where == "platform" else "train"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", STOPPED, where, kind], env=os.environ | known, stdout=out)
    wait_for(lambda: "now ready" in log.read_text() and (where != "upload" or stalling.held), process)
    if where == "platform":
        platform.backend.should_continue = False
    else:
        process.terminate()
    assert process.wait(30) == 1
    platform.backend.should_continue = True
    told = of(platform, 25, "completion")[-1]["error_message"]
    assert told.startswith(
        "[Resource] stopped by the platform" if where == "platform" else "[Resource] stopped by SIGTERM"
    )
    assert not workers(platform.folder, "train-25")
    stalling.server.close()


BEATING = """
import sys
from neo_nb.jobs import reporter, train
reporter.BEAT = 0.2
sys.exit(train.main())
"""


def test_a_store_that_hangs_delays_neither_heartbeats_nor_the_last_word(platform, tmp_path):
    """Before anything is trained: the images of a data set do not come."""
    stalling = Stalling(platform.endpoint, b"/images/")
    known = platform.environment(27, disk="stalled", BACKEND_BASE_URL=platform.backend.url, TRACE_ID="t-9")
    known |= {"EXTERNAL_STORAGE_ENDPOINT": stalling.endpoint, "DATASET_CACHE_DIR": str(tmp_path / "cache")}
    known |= {"PYTHONPATH": str(Path(__file__).parents[1])}
    before = len(platform.backend.heard)
    process = subprocess.Popen([sys.executable, "-c", BEATING], env=os.environ | known, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(stalling.held) > 9, process)
    since = len(platform.backend.heard)
    wait_for(lambda: [name for name, _ in platform.backend.heard[since:]].count("heartbeat") > 3, process)
    process.terminate()
    began = time.monotonic()
    assert process.wait(30) == 1 and time.monotonic() - began < 15, "a request may take a minute, and four tries"
    heard = platform.backend.heard[before:]
    beats = [body for name, body in heard if name == "heartbeat"]
    assert {(beat["epoch"], beat["total_epochs"]) for beat in beats[-3:]} == {(0, CONFIG["epochs"])}
    assert of(platform, 27, "completion")[0]["error_message"] == "[Resource] stopped by SIGTERM"
    [done] = [body for name, body in heard if name == "done"]
    assert done["status"] == "failed" and platform.backend.wrong == []
    stalling.server.close()


def test_a_fault_of_the_data_that_the_worker_finds_is_one_of_the_data(platform):
    document = nested(platform.folder / "torn", 5)
    file = platform.folder / "torn/images/0.png"
    file.write_bytes(file.read_bytes()[:500])
    document["storage_info"] = {"image_root": "images/"}
    platform.put_data("torn", document, platform.folder / "torn/images")
    assert platform.run("train", platform.environment(28, disk="torn", DATASET_ID="torn")) == 1
    told = of(platform, 28, "completion")[-1]
    assert told["error_message"].startswith("[Dataset] ") and "0.png" in told["error_message"], told
    assert "neo_nb/data/" in told["traceback"], "where it was found is told too"


def test_a_refusal_of_the_last_word_is_an_exit_status(platform, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    from neo_nb.jobs.supervisor import supervise

    known = platform.environment(21)
    platform.backend.behave = lambda path, body: 410 if "/jobs/21/" in path else None
    assert supervise("train", lambda job: job.reporter.completed({}), known) == 2
    platform.backend.behave = lambda path, body: None
    assert supervise("train", lambda job: None, known) == 0


def test_a_thousand_and_one_images_come_in_pages_once(platform):
    document = nested(platform.folder / "pages", 2)
    first = document["images"][0]
    document["storage_info"] = {"image_root": "images/"}
    document["images"] = [first | {"id": i, "file_name": f"{i:04d}.png", "annotations": []} for i in range(1001)]
    content = (platform.folder / "pages/images" / first["file_name"]).read_bytes()
    storage = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]  # the server's own store: a thousand requests less
    for row in document["images"]:
        storage.put_object(DATASETS, f"datasets/many/images/{row['file_name']}", content)
    text = json.dumps(document).encode()
    platform.s3.put_object(Bucket=DATASETS, Key="datasets/many/annotations.json", Body=text)
    order = ordered(platform, DATASET_ID="many")
    for _ in range(2):
        with bring(order, lambda line: None) as brought:
            assert len(list(brought.images.iterdir())) == 1001


def ordered(platform: Platform, **change: str):
    known = platform.environment(22) | change
    return read_order(read_address("train", known), known)


def test_a_download_that_is_cut_off_goes_on_and_a_wrong_one_is_refused(platform, tmp_path):
    content = os.urandom(3_000_000)
    platform.s3.put_object(Bucket=DATASETS, Key="large/a.bin", Body=content)
    for times, whole in ((2, True), (100, False)):
        cutting = Cutting(platform.endpoint, 1_000_000, times)
        bucket = ordered(platform, EXTERNAL_STORAGE_ENDPOINT=cutting.endpoint).datasets
        if whole:
            S3(bucket).fetch("large/a.bin", tmp_path / "a.bin")
            assert (tmp_path / "a.bin").read_bytes() == content
        else:
            (tmp_path / "a.bin").unlink()
            cutting.after = 1000
            with pytest.raises(StorageFailed):
                S3(bucket).fetch("large/a.bin", tmp_path / "a.bin")
            assert not (tmp_path / "a.bin").exists()
        cutting.server.close()
    told = {"sha256": "0" * 64}
    platform.s3.put_object(Bucket=DATASETS, Key="large/b.bin", Body=b"other bytes", Metadata=told)
    with pytest.raises(StorageFailed, match="what came has another sha256"):
        S3(ordered(platform).datasets).fetch("large/b.bin", tmp_path / "b.bin")


def test_a_storage_that_denies_and_a_full_disk_are_said_at_once(platform, tmp_path):
    httpx.post(f"{platform.endpoint}/moto-api/reset-auth", content=b"0")  # from now on keys and rights are looked at
    try:
        with pytest.raises(InputError, match="access is denied"):
            list(open_place(f"s3://{DATASETS}/", ordered(platform).datasets)[0].entries(""))
    finally:
        httpx.post(f"{platform.endpoint}/moto-api/reset-auth", content=b"inf")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); sys.path.insert(0, {root!r})\n"
    )
    code += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nfrom pathlib import Path\n"
    code += "from neo_nb.jobs.callbacks import Message, Spool\nspool = Spool({folder!r})\n"
    code += "spool.add(Message('/a', {{'text': 'x' * 5000}}))\nassert len(spool) == 1\n"
    code += "assert not list(Path({folder!r}).iterdir())\n"
    text = code.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path / "spool"))
    assert subprocess.run([sys.executable, "-c", text]).returncode == 0, "what finds no room on disk is kept in memory"


def test_addresses_that_are_signed_for_an_upload(platform, tmp_path, monkeypatch):
    from neo_nb.jobs.checkpoints import Presigned
    from neo_nb.jobs.supervisor import supervise

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    signed = {"ClientMethod": "put_object", "ExpiresIn": 600}
    platform.backend.upload_url = lambda name: platform.s3.generate_presigned_url(
        **signed, Params={"Bucket": CHECKPOINTS, "Key": f"signed/{name}", "ContentType": "application/octet-stream"}
    )
    (tmp_path / "best.pt").write_bytes(b"weights")

    def act(job):
        place = Presigned(job.reporter.first, job.address.job_id)
        assert place.put(tmp_path / "best.pt", "checkpoints/23/best.pt") == "checkpoints/best.pt"
        platform.backend.upload_url = lambda name: "http://127.0.0.1:9/?X-Amz-Signature=abc"
        place.put(tmp_path / "best.pt", "checkpoints/23/best.pt")

    assert supervise("train", act, platform.environment(23)) == 1
    assert platform.read("signed/best.pt") == b"weights"
    assert of(platform, 23, "completion")[0]["error_message"].startswith("[Network] best.pt could not be uploaded")


def test_neo_job_is_told_by_its_environment_alone(platform):
    known = platform.environment(24) | {"TASK_TYPE": "pose"}
    ended = neo("job", **known)
    assert ended.returncode == 1 and "[ERROR] [Config] TASK_TYPE pose" in ended.stdout
    assert "--kind" in neo("job", "--help").stdout


def test_a_folder_is_a_place_too(tmp_path):
    (tmp_path / "a").write_text("content")
    place, _ = open_place(f"file://{tmp_path}", Bucket(name="none"))
    assert isinstance(place, Folder) and place.read("a") == b"content"
    started = time.monotonic()
    assert place.put(tmp_path / "a", "b/c") == str(tmp_path / "b/c") and time.monotonic() - started < 5
