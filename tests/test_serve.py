"""A service under real clients: equal to `predict`, refusing what is wrong, too much or too late, ending without a loss."""

import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
import yaml
from browser import CHROMIUM, Browser
from command import ROOT, free_port, page_of
from command import neo as command
from serve_clients import post, storm
from test_export import opinionated, photos
from test_runs import QUIET, place

from neo_nb.deploy.detector import TorchDetector, load_detector
from neo_nb.deploy.onnx import export_onnx

SERVER = """
import sys
from neo_nb.deploy.detector import load_detector
from neo_nb.deploy.service import Service, serve
from neo_nb.deploy.uploads import Limits
from neo_nb.deploy.retrain_pool import RetrainPool
detector = load_detector(sys.argv[1])
before, after = sys.argv[4], sys.argv[5]
eval(before)
settings = eval(sys.argv[3])
eval(after)
serve(detector, Service(**settings), port=int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A file in batches of any number."
    return export_onnx(
        opinionated("rtdetr_nano"), tmp_path_factory.mktemp("m") / "m.onnx", size=(90, 160), batch="dynamic"
    )


def start(model: Path, settings: str = "{}", more: str = "None", after: bool = False):
    "A server of its own, ready; its address. `more` is done before its settings are made, or after."
    port = free_port()
    environment = os.environ | QUIET | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SERVER, model, str(port), settings, *(("None", more) if after else (more, "None"))], env=environment,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    for _ in range(600):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return process, port
        except httpx.TransportError:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
    raise AssertionError("not ready within a minute")


def stop(process) -> str:
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    return told


@pytest.fixture(scope="module")
def server(model):
    "With little patience."
    settings = "dict(queue_size=8, limits=Limits(megabytes=1, megapixels=1, files=4, upload_seconds=1.0))"
    process, port = start(model, settings)
    yield port
    stop(process)


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def test_it_answers_what_predict_finds_alone_and_together(server, model):
    images = photos(6)
    direct = load_detector(model)(images, threshold=0.05)
    alone = [post(server, png(image), "threshold=0.05") for image in images]
    together = httpx.post(
        f"http://127.0.0.1:{server}/detect?threshold=0.05",
        files=[("file", (f"{i}.png", png(x))) for i, x in enumerate(images[:4])],
    ).json()["images"]
    for i in range(6):
        found = direct.for_image(i)
        order = np.argsort(-found.scores, kind="stable")
        for answer in [json.loads(alone[i][1])["images"][0], *together[i : i + 1]]:
            assert (answer["height"], answer["width"]) == (90, 160)
            boxes = np.array([one["box"] for one in answer["detections"]])
            np.testing.assert_allclose(boxes, found.boxes_xyxy[order], atol=0.02)
            np.testing.assert_allclose([d["score"] for d in answer["detections"]], found.scores[order], atol=1e-3)
            assert [d["label"] for d in answer["detections"]] == [direct.class_names[n] for n in found.labels[order]]
    only = json.loads(post(server, png(images[0]), "threshold=0&classes=head")[1])["images"][0]["detections"]
    assert only and {one["label"] for one in only} == {"head"}


def raw(port: int, data: bytes, pause: float = 0.0, step: int = 1 << 16, hang_up: bool = False) -> int:
    "The status of what is sent piece by piece, by a client that listens while it sends, as curl does."
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        for start_ in range(0, len(data), step):
            wire.sendall(data[start_ : start_ + step])
            if select.select([wire], [], [], pause)[0]:
                break
        if hang_up:
            return -1
        answer = wire.recv(4096)
    return int(answer.split()[1])


def body(content: bytes, name: bytes = b"file") -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a"\r\n\r\n%s\r\n--x--\r\n' % (name, content)


def head(length: int | str, kind: str = "multipart/form-data; boundary=x") -> bytes:
    sized = "Transfer-Encoding: chunked" if length == "chunked" else f"Content-Length: {length}"
    return f"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{sized}\r\n\r\n".encode()


def test_whatever_is_wrong_is_answered_in_the_400s_and_the_next_is_served(server):
    good = png(photos(1)[0])
    jpeg = cv2.imencode(".jpg", photos(1)[0])[1].tobytes()
    bomb = cv2.imencode(".png", np.zeros((4000, 4000), np.uint8))[1].tobytes()
    rng = np.random.default_rng(0)
    for content, status in (
        (jpeg[: len(jpeg) // 2], 422),
        (b"", 415),
        (rng.bytes(5000), 415),
        (b"<svg/>", 415),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), 415),
        (bomb, 413),
        (bytes(1_100_000), 413),
    ):
        whole = body(content)
        assert raw(server, head(len(whole)) + whole) == status, (content[:20], status)
    assert raw(server, head(10**12) + body(good)) == 413, "announced"
    endless = b"%x\r\n%s\r\n" % (1 << 18, bytes(1 << 18))
    assert raw(server, head("chunked") + b"%x\r\n%s\r\n" % (len(body(b"")) - 9, body(b"")[:-9]) + endless * 8) in (
        413,
        0,
    )
    for kind, content in (
        ("image/png", good),
        ("multipart/form-data", body(good)),
        ("text/html", b"x"),
        ("multipart/form-data; boundary=y", body(good)),
    ):
        assert raw(server, head(len(content), kind) + content) == 400, kind
    assert raw(server, head(len(body(good, b"image"))) + body(good, b"image")) == 400
    many = b"".join(body(good)[:-6] + b"\r\n" for _ in range(6)) + b"--x--\r\n"
    assert raw(server, head(len(many)) + many) == 413
    slow = body(good)
    begin = time.monotonic()
    assert raw(server, head(len(slow)) + slow, pause=0.05, step=300) == 408 and time.monotonic() - begin < 8
    assert raw(server, head(len(slow)) + slow[: len(slow) // 2], hang_up=True) == -1
    assert raw(server, b"garbage\r\n\r\n") == 400
    for path, status in (("detect", 405), ("nothing", 404)):
        assert httpx.get(f"http://127.0.0.1:{server}/{path}").status_code == status
    for query in ("threshold=2", "threshold=x", "classes=cat"):
        assert post(server, good, query)[0] == 422
    assert post(server, good)[0] == 200
    told = httpx.get(f"http://127.0.0.1:{server}/metrics").text
    assert 'neo_requests_total{status="413"}' in told and 'neo_stage_seconds_bucket{le="0.005",stage="decode"}' in told


def test_more_than_it_can_do_is_refused_and_the_rest_stays_quick(model):
    "A short form of tests/serve_load.py."
    process, server = start(model, "dict(queue_size=8)")
    images = [png(image) for image in photos(8)]
    answers = storm(server, images, clients=32, seconds=5)
    statuses = {status for status, _, _ in answers}
    assert statuses <= {200, 429} and 200 in statuses, statuses
    times = np.array([seconds for status, seconds, _ in answers if status == 200])
    assert np.quantile(times, 0.99) < 8
    known = {
        i: json.loads(post(server, data, "threshold=0.1")[1])["images"][0]["detections"]
        for i, data in enumerate(images)
    }
    for status, _, (which, text) in answers:
        if status == 200:
            found = json.loads(text)["images"][0]["detections"]
            expected = [d for d in known[which] if d["score"] >= 0.3]
            assert abs(len([d for d in found if d["score"] >= 0.3]) - len(expected)) <= 1
    stop(process)


def test_what_takes_too_long_is_answered_so_and_logged(model):
    process, port = start(model, "dict(image_seconds=0.004)")
    statuses = {post(port, png(cv2.resize(photos(1)[0], (4000, 3000))))[0] for _ in range(3)}
    assert statuses == {504}
    assert 'neo_violations_total{kind="time_limit"} 3.0' in httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert stop(process).count("no answer within 0.004 s: 'a.png'") == 3


def test_told_to_end_it_answers_what_it_accepted(model):
    process, port = start(model)
    images = [png(image) for image in photos(4)]
    answers: list = []
    thread = threading.Thread(target=lambda: answers.extend(storm(port, images, clients=8, seconds=4)))
    thread.start()
    time.sleep(1.5)
    told = stop(process)
    thread.join()
    statuses = [status for status, _, _ in answers]
    assert statuses.count(200) > 8 and set(statuses) <= {200, 429, "refused", "lost"}, (set(statuses), told)
    assert statuses.count("lost") <= 2, "connections that the kernel had taken, and the service not yet"
    assert statuses.index("refused") > 8 and "Traceback" not in told


def test_a_token_guards_it_and_others_cannot_reach_it_without(model, tmp_path):
    folder = place(tmp_path / "workspace")
    ended = command("serve", str(model), "--host", "0.0.0.0", cwd=folder, **QUIET)
    assert ended.returncode == 2 and "without a token" in ended.stderr and "NEO_SERVE_TOKEN" in ended.stderr
    port, pool = free_port(), tmp_path / "pool"
    words = ("serve", str(model), "--port", str(port), "--pool", str(pool), "--pool-share", "1")
    process = command(*words, wait=False, cwd=folder, **QUIET, NEO_SERVE_TOKEN="secret")
    try:
        page_of(f"http://127.0.0.1:{port}/healthz", process)
        images = [png(image) for image in photos(8)]
        assert {post(port, data)[0] for data in images} == {401}
        assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 401
        with ThreadPoolExecutor(4) as several:
            statuses = set(several.map(lambda data: post(port, data, token="secret")[0], images * 2))
        assert statuses == {200}
        busy = command("serve", str(model), "--port", str(port), cwd=folder, **QUIET)
        assert busy.returncode == 2 and f"port {port}" in busy.stderr
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    process.stdout.seek(0)
    assert "secret" not in process.stdout.read()
    read = command("data", "import", str(pool), "mine", "--json", cwd=folder, **QUIET)
    assert read.returncode == 0, read.stderr
    assert len(list((pool / "images").iterdir())) == len(list((pool / "labels").iterdir())) == 8
    assert len((pool / "pool.jsonl").read_text().splitlines()) == 8


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_sees_the_boxes(server, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(f"http://127.0.0.1:{server}/")
        browser.wait("document.getElementById('drop') !== null")
        data = list(png(photos(1)[0]))
        browser.run(f"send(new File([new Uint8Array({data})], 'a.png', {{type: 'image/png'}}))")
        told = browser.wait("/ ms, \\d+ of [1-9]\\d* boxes/.test(el('told').textContent) && el('told').textContent")
        assert browser.run("el('seen').width") == 720  # small ones are shown large
        least = browser.run("least.value = 0; least.oninput(); el('told').textContent")
        assert int(least.split()[2]) > int(told.split()[2]), (least, told)
        browser.run(f"send(new File([new Uint8Array({data[:50]})], 'b.png'))")
        assert "422" in browser.wait("el('told').textContent.startsWith('4') && el('told').textContent")
        if folder := os.environ.get("NEO_SCREENS"):
            browser.run(f"send(new File([new Uint8Array({data})], 'a.png', {{type: 'image/png'}}))")
            browser.wait("/ of /.test(el('told').textContent)")
            browser.image(Path(folder) / "service.png")
    finally:
        browser.close()


def test_the_files_for_containers_keep_the_rules_of_their_tools(model, tmp_path):
    """hadolint's and Kubernetes' own; compose by what it must say. Nothing is built: there is no engine here."""
    folder = place(tmp_path / "workspace")
    done = command("serve", str(model), "--files", "serve", cwd=folder, **QUIET)
    assert done.returncode == 0 and "uv build --wheel" in done.stdout, done.stderr
    assert (folder / "serve/m.onnx").read_bytes() == model.read_bytes()
    again = command("serve", str(model), "--files", "serve", cwd=folder, **QUIET)
    assert again.returncode == 2 and "there already" in again.stderr
    kinds = {"Dockerfile.cpu", "Dockerfile.cuda", "Dockerfile.jetson"}
    for name in kinds:
        text = (folder / "serve" / name).read_text()
        assert 'CMD ["/models/m.onnx", "--host", "0.0.0.0"' in text and "USER 10001" in text and "$model" not in text
    lint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if lint:
        files = [folder / "serve" / name for name in kinds]
        # DL3013: versions of what is not ours are the wheel's to say
        told = subprocess.run([lint, "--ignore", "DL3013", *files], capture_output=True, text=True)
        assert told.returncode == 0 and not told.stdout.strip(), told.stdout
    compose = yaml.safe_load((folder / "serve/compose.yaml").read_text())["services"]["neo-serve"]
    assert compose["read_only"] and compose["environment"]["NEO_SERVE_TOKEN"].startswith("${NEO_SERVE_TOKEN:?")
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for part in yaml.safe_load_all((folder / "serve/kubernetes.yaml").read_text()):
        validate.validate(part, "1.32", strict=True)


def test_an_image_that_waited_too_long_takes_nobody_along(model):
    """Its client has left when the detecting thread comes to it; the thread goes on."""
    slow = "[setattr(d, 'infer', (lambda f: lambda b: (__import__('time').sleep(1.0), f(b))[1])(d.infer)) for d in [detector]]"
    process, port = start(model, "dict(max_batch=1, image_seconds=3.0)", slow)
    with ThreadPoolExecutor(6) as several:
        statuses = list(several.map(lambda _: post(port, png(photos(1)[0]))[0], range(6)))
    assert set(statuses) <= {200, 504} and statuses.count(504) >= 2, statuses
    assert [post(port, png(photos(1)[0]))[0] for _ in range(2)] == [200, 200]
    stop(process)


def test_a_batch_with_one_bad_answer_answers_the_others_or_says_so():
    from neo_nb.deploy.batching import MicroBatcher

    detector = TorchDetector(opinionated("rtdetr_nano"), (90, 160))
    infer = detector.infer

    def broken(batch):
        boxes, scores, labels = infer(batch)
        boxes[-1] = np.nan
        return boxes, scores, labels

    detector.infer = broken
    batcher = MicroBatcher(detector)
    futures = [batcher.submit(image) for image in photos(6)]
    assert all(future.exception(30) is not None or future.result() for future in futures)
    detector.infer = infer
    assert batcher.submit(photos(1)[0]).result(30).detections.num_boxes > 0
    batcher.close()


def test_what_cameras_and_strangers_send_is_no_server_error(server):
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.fromarray(photos(1)[0])
    picture.save(buffer, "MPO", save_all=True, append_images=[picture])
    assert post(server, buffer.getvalue())[0] == 200, "a JPEG with a second picture behind it"
    odd = body(png(photos(1)[0])).replace(b'filename="a"', b'filename="+2AA-"')
    assert raw(server, head(len(odd), "multipart/form-data; boundary=x; charset=utf-7") + odd) in (200, 400)
    with socket.create_connection(("127.0.0.1", server), timeout=20) as silent:  # sends no whole head
        silent.sendall(b"GET / HT")
        assert silent.recv(10) == b"", "hung up on, after a second here"
    assert post(server, png(photos(1)[0]))[0] == 200


def test_a_pool_that_cannot_be_written_costs_no_answer(model, tmp_path):
    settings = f"dict(pool=RetrainPool({str(tmp_path / 'pool')!r}, detector.class_names, share=1))"
    process, port = start(
        model, settings, f"__import__('shutil').rmtree({str(tmp_path / 'pool/labels')!r})", after=True
    )
    (tmp_path / "pool/labels").write_text("a file where a folder was")
    assert post(port, png(photos(1)[0]))[0] == 200
    assert "was not kept" in stop(process)
