"""Videos: nothing waits for anything, what is damaged or full costs no more than it must, and people keep their numbers."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from command import neo as command
from test_export import opinionated
from test_runs import QUIET, place

from neo_nb.base.boxes import box_iou
from neo_nb.base.core import InputError
from neo_nb.base.detections import Detections
from neo_nb.data.video import VideoReader, VideoWriter
from neo_nb.deploy.detector import TorchDetector
from neo_nb.deploy.onnx import export_onnx
from neo_nb.deploy.tracking import Tracker
from neo_nb.deploy.video_predict import VideoPredictor, predict_video
from neo_nb.synthetic.crowds import make_scenes


def film(path: Path, count: int, size: tuple[int, int] = (96, 160)) -> Path:
    "Moving stripes."
    writer = VideoWriter(path, size, 25)
    columns = np.arange(size[1])
    for i in range(count):
        stripes = 40 + 180 * ((columns + 2 * i) // 20 % 2)
        writer.write(np.broadcast_to(stripes[None, :, None], (*size, 3)).astype(np.uint8).copy(), i / 25)
    return writer.finish()


class Sleeper(TorchDetector):
    "A network that is as slow as it is told to be, and leaves the CPU alone meanwhile, as one on a GPU does."

    pause = 0.02

    def infer(self, batch):
        time.sleep(self.pause * len(batch))
        count = len(batch)
        return (
            np.zeros((count, 1, 4), np.float32),
            np.full((count, 1), 0.9, np.float32),
            np.zeros((count, 1), np.int64),
        )


def test_decoding_detecting_and_writing_overlap(tmp_path):
    "Counted, not timed against a clock: the network is busy nearly all of the time."
    detector = Sleeper(opinionated("rtdetr_nano"), (90, 160))
    source = film(tmp_path / "in.mp4", 60, (180, 320))
    found = predict_video(VideoPredictor(detector, source), tmp_path / "out", progress=False)
    assert found["frames"] == 60 and found["counts"] == {"person": 60}
    assert found["seconds of detecting"] >= 60 * 0.02
    lines = [json.loads(line) for line in (tmp_path / "out/detections.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(60)) and lines[30]["seconds"] == pytest.approx(1.2)
    assert len(list(VideoReader(tmp_path / "out/video.mp4"))) == 60
    assert not (tmp_path / "out/video.part.mp4").exists() and not (tmp_path / "out/mot.txt").exists()


def test_batches_and_single_frames_find_the_same_and_slow_ones_are_told(tmp_path, capsys):
    detector = TorchDetector(opinionated("rtdetr_nano"), (90, 160))
    source = film(tmp_path / "in.mp4", 10)
    one, four = ([r.detections.scores for r in VideoPredictor(detector, source, 0.05, batch_size=n)] for n in (1, 4))
    assert len(one) == len(four) == 10
    for a, b in zip(one, four):
        np.testing.assert_allclose(np.sort(a), np.sort(b), atol=1e-4)
    slow = VideoPredictor(detector, source, image_seconds=1e-6)
    assert len(list(slow)) == 10 and slow.slow == 10 and "frame 3 (0.12 s) took" in capsys.readouterr().err


def test_a_damaged_and_a_torn_video_give_what_is_whole(tmp_path):
    detector = Sleeper(opinionated("rtdetr_nano"), (90, 160))
    detector.pause = 0
    data = film(tmp_path / "in.mp4", 120).read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(6):
        hurt = bytearray(data)
        for start in rng.integers(2000, len(data) - 300, 3):
            hurt[start : start + 200] = rng.bytes(200)
        (tmp_path / "hurt.mp4").write_bytes(hurt)
        found = predict_video(VideoPredictor(detector, tmp_path / "hurt.mp4"), tmp_path / f"{trial}", progress=False)
        lines = (tmp_path / f"{trial}/detections.jsonl").read_text().splitlines()
        assert found["frames"] == len(lines) <= 120
    (tmp_path / "torn.mp4").write_bytes(data[: len(data) // 2])
    found = predict_video(VideoPredictor(detector, tmp_path / "torn.mp4"), tmp_path / "torn", progress=False)
    assert 0 < found["frames"] < 120 and len(list(VideoReader(tmp_path / "torn/video.mp4"))) == found["frames"]


def test_a_full_disk_keeps_what_was_done(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small tmpfs can be mounted by root only")
    before = threading.active_count()
    try:
        detector = Sleeper(opinionated("rtdetr_nano"), (90, 160))
        detector.pause = 0
        writer = VideoWriter(tmp_path / "in.mp4", (240, 320), 25)
        rng = np.random.default_rng(0)
        for i in range(150):
            writer.write(rng.integers(0, 255, (240, 320, 3), np.uint8), i / 25)
        writer.finish()
        with pytest.raises(InputError, match="the disk is full.*frames are kept in"):
            predict_video(VideoPredictor(detector, tmp_path / "in.mp4"), disk / "out", progress=False)
        lines = (disk / "out/detections.jsonl").read_text().splitlines()
        assert 0 < len(lines) < 150 and all(json.loads(line)["frame"] == i for i, line in enumerate(lines))
        assert not (disk / "out/video.mp4").exists()
        if (disk / "out/video.part.mp4").stat().st_size > 100_000:
            assert len(list(VideoReader(disk / "out/video.part.mp4"))) > 0
    finally:
        subprocess.run(["umount", "-l", disk], check=False)
    assert threading.active_count() <= before + 3  # one is the log's; none is left for the frames


def test_from_the_shell_a_video_becomes_a_run_and_ctrl_c_ends_it_well(tmp_path):
    folder = place(tmp_path / "workspace")
    model = export_onnx(opinionated("rtdetr_nano"), folder / "m.onnx", size=(90, 160))
    film(folder / "in.mp4", 40)
    done = command("predict", str(model), "in.mp4", "--track", "--threshold", "0.1", "--json", cwd=folder, **QUIET)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    run = Path(folder / found["run"]) if not Path(found["run"]).is_absolute() else Path(found["run"])
    assert found["frames"] == 40 and found["objects"] > 0 and found["ended"] == "at its end"
    mot = [line.split(",") for line in (run / "mot.txt").read_text().splitlines()]
    assert mot and all(len(row) == 9 and int(row[1]) > 0 for row in mot)
    assert "<video" in (run / "report.html").read_text()
    for words, told in (
        (("in.mp4", "data/cells/images"), "one video at a time"),
        (("data/cells/images", "--track"), "images have no tracks"),
        (("none.mp4",), "no such video"),
        (("in.mp4", "--classes", "cat"), "no such class"),
    ):
        ended = command("predict", str(model), *words, cwd=folder, **QUIET)
        assert ended.returncode == 2 and told in ended.stderr, ended.stderr
    assert len(list((folder / "reports").glob("0*"))) == 1, "bad input leaves no run"
    film(folder / "long.mp4", 3000)
    process = command("predict", str(model), "long.mp4", wait=False, cwd=folder, **QUIET)
    lines = folder / "reports/0002-predict-long-m/detections.jsonl"
    for _ in range(600):
        if lines.exists() and lines.stat().st_size > 20_000:
            break
        time.sleep(0.1)
    assert process.poll() is None, "three thousand frames take longer than that"
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    kept = [json.loads(line)["frame"] for line in lines.read_text().splitlines()]
    assert kept == list(range(len(kept))) and len(kept) < 3000
    assert len(list(VideoReader(lines.with_name("video.mp4")))) == len(kept)
    assert json.loads(lines.with_name("video.json").read_text())["ended"] == "ended by Ctrl-C"


def walk(scene, frames: int, rng) -> tuple[np.ndarray, np.ndarray]:
    "Boxes of every person in every frame, walking at their own pace; and how much of each is in sight."
    start = scene.boxes_xyxy[scene.labels == 0].astype(np.float64)
    height = start[:, 3] - start[:, 1]
    pace = height * rng.uniform(-0.03, 0.03, len(start))
    steps = np.arange(frames)[:, None, None] * np.stack([pace, 0 * pace, pace, 0 * pace], 1)[None]
    boxes = start[None] + steps
    seen = np.ones(boxes.shape[:2])
    for i in range(len(start)):  # whoever stands lower is nearer, and hides
        for j in np.flatnonzero(start[:, 3] > start[i, 3]):
            wide = np.minimum(boxes[:, i, 2], boxes[:, j, 2]) - np.maximum(boxes[:, i, 0], boxes[:, j, 0])
            high = np.minimum(boxes[:, i, 3], boxes[:, j, 3]) - np.maximum(boxes[:, i, 1], boxes[:, j, 1])
            area = (boxes[:, i, 2] - boxes[:, i, 0]) * (boxes[:, i, 3] - boxes[:, i, 1])
            seen[:, i] = np.minimum(seen[:, i], 1 - wide.clip(0) * high.clip(0) / area)
    return boxes, seen


def test_people_of_drawn_crowds_keep_their_numbers(tmp_path):
    "IDF1 by motmetrics, of a detector that misses one in twenty, sees hidden people badly, and trembles."
    mm = pytest.importorskip("motmetrics")
    rng = np.random.default_rng(0)
    account = mm.MOTAccumulator(auto_id=True)
    for row, scene in enumerate(make_scenes(3, (540, 960), 4, tmp_path / "drawn")):
        boxes, seen = walk(scene, 75, rng)
        tracker = Tracker(("person",), fps=25, threshold=0.5)
        for t in range(75):
            here = np.flatnonzero(seen[t] > 0.25)
            found = here[rng.random(len(here)) > 0.05]
            side = (boxes[t, found, 3] - boxes[t, found, 1])[:, None]
            shaken = boxes[t, found] + rng.normal(0, 0.01, (len(found), 4)) * side
            scores = (0.15 + 0.8 * seen[t, found]).clip(0, 0.95)
            given = Detections([0] * len(found), shaken, scores, [0] * len(found), 1, ("person",))
            numbers = tracker.update(given)
            known = numbers >= 0
            far = 1 - box_iou(boxes[t, here], given.boxes_xyxy[known].astype(np.float64))
            far[far > 0.5] = np.nan
            account.update(here + 1000 * row, numbers[known] + 1000 * row, far)
    result = mm.metrics.create().compute(account, metrics=["idf1", "num_switches", "mota"], name="crowd")
    print(result)
    assert result.loc["crowd", "idf1"] > 0.85, result


def test_a_video_of_a_phone_is_seen_as_it_was_held(tmp_path):
    """The turn stands in the track's matrix, as phones write it; a quarter clockwise here."""
    data = bytearray(film(tmp_path / "in.mp4", 5).read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows forty bytes of times and flags
    turn = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    (tmp_path / "phone.mp4").write_bytes(data)
    lying, upright = (next(iter(VideoReader(tmp_path / name))).image for name in ("in.mp4", "phone.mp4"))
    assert upright.shape == (160, 96, 3)
    assert np.abs(upright.astype(int) - np.rot90(lying, -1)).mean() < 2


class Camera(VideoReader):
    """Thirty frames a second that do not wait."""

    def __init__(self, source):
        super().__init__(source)
        self.live = True

    def __iter__(self):
        for frame in super().__iter__():
            time.sleep(1 / 30)
            yield frame


def test_a_camera_is_not_fallen_behind(tmp_path):
    detector = Sleeper(opinionated("rtdetr_nano"), (90, 160))
    detector.pause = 0.2
    predictor = VideoPredictor(detector, film(tmp_path / "in.mp4", 90))
    predictor.reader = Camera(tmp_path / "in.mp4")
    predictor.ahead = type(predictor.ahead)(predictor.reader, detector, None)
    seen = [result.frame.index for result in predictor]
    assert predictor.ahead.dropped > 20 and len(seen) + predictor.ahead.dropped == 90
    steps = np.diff(seen[:-3])
    assert steps[len(steps) // 2 :].mean() > 1.5, "it keeps up by leaving frames out, from the first to the last"


def test_a_password_stays_out_of_records(tmp_path):
    ended = command("predict", "none.onnx", "rtsp://admin:secret@127.0.0.1:9/s1", cwd=place(tmp_path / "w"), **QUIET)
    assert ended.returncode == 2 and "secret" not in ended.stderr + ended.stdout
