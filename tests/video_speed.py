"""How much of the network's own speed a video keeps, when it is decoded, drawn and encoded beside.

    python tests/video_speed.py FOLDER [--model rtdetrv2_r18] [--size 640 640] [--frames 300]

makes a drawn video of 1080p, exports a fresh model, and compares frames per second: the network alone, on batches that
are ready, and `neo predict`'s whole way. Writes video-speed.md into FOLDER."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from neo_nb.base.core import atomic_write
from neo_nb.data.loader import read_image
from neo_nb.data.resize import prepare
from neo_nb.data.video import VideoWriter
from neo_nb.deploy.detector import load_detector
from neo_nb.deploy.onnx import export_onnx
from neo_nb.deploy.video_predict import VideoPredictor, predict_video
from neo_nb.models.zoo import create_model
from neo_nb.synthetic.crowds import make_scenes


def drawn_video(folder: Path, frames: int) -> Path:
    "A camera that pans over drawn crowds."
    path = folder / "crowd.mp4"
    if path.exists():
        return path
    scenes = [read_image(one.path) for one in make_scenes(4, (1080, 2880), 3, folder / "scenes")]
    writer = VideoWriter(path, (1080, 1920), 25)
    for i in range(frames):
        scene = scenes[i * len(scenes) // frames]
        left = 3 * (i % (frames // len(scenes)))
        writer.write(np.ascontiguousarray(scene[:, left : left + 1920]), i / 25)
    return writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="rtdetrv2_r18")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 640))
    parser.add_argument("--frames", type=int, default=300)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    video = drawn_video(asked.folder, asked.frames)
    model = create_model(asked.model, class_names=("person", "head")).eval()
    file = export_onnx(model, asked.folder / "model.onnx", size=tuple(asked.size))
    detector = load_detector(file)
    batch = prepare([np.zeros((1080, 1920, 3), np.uint8)], detector.size, detector.divisor, detector.resize)
    times = []
    for _ in range(40):
        begin = time.perf_counter()
        detector.infer(batch)
        times.append(time.perf_counter() - begin)
    alone = 1 / float(np.median(times[5:]))
    found = predict_video(VideoPredictor(detector, video, threshold=0.5), asked.folder / "out")
    rows = {
        "the network alone, frames per second": alone,
        "neo predict, frames per second": found["frames per second"],
    }
    rows |= {"share kept": found["frames per second"] / alone, "frames": found["frames"]}
    rows |= {"share of the time in which the network was at work": found["seconds of detecting"] / found["seconds"]}
    text = [f"# A video of 1080p, {asked.model} at {asked.size[0]}x{asked.size[1]}, one core for the network", ""]
    words = f"--model {asked.model} --size {asked.size[0]} {asked.size[1]} --frames {asked.frames}"
    text += [f"`python tests/video_speed.py FOLDER {words}`", "", "| | |", "|---|---|"]
    text += [f"| {name} | {value:.2f} |" for name, value in rows.items()]
    with atomic_write(asked.folder / "video-speed.md") as path:
        path.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
