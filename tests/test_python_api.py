"""Python as people write it: any image, any name of a run, detections that are a sequence of images; and `neo runs`."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_rtdetr_properties import lively

from neo_nb.base.annotations import Annotations
from neo_nb.base.core import InputError
from neo_nb.base.detections import Detections
from neo_nb.cli.main import main
from neo_nb.data.coco import read_coco
from neo_nb.data.image_inputs import ImageSource, array_to_rgb, pil_to_rgb, read_inputs
from neo_nb.data.loader import read_image
from neo_nb.deploy.detector import TorchDetector, load_detector
from neo_nb.deploy.tiled import TiledDetector
from neo_nb.models.weights import save_weights
from neo_nb.models.zoo import create_model

NAMES = ("person", "head", "cat")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A workspace with a training and an evaluation of it, and two cameras with photos of one name."
    folder = tmp_path_factory.mktemp("place")
    (folder / "data_manifests").mkdir()
    (folder / "settings.ini").write_text("[DEFAULT]\n")
    model = lively(1)
    model.class_names, model.category_ids, model.size = NAMES, (7, 3, 5), (64, 96)
    run = folder / "reports/0001-train-d-rtdetr_nano"
    save_weights(model, run / "weights/best.safetensors", metrics={"threshold": 0.02, "max_dets": 100})
    known = {"status": "done", "config": {"model": "rtdetr_nano"}, "data": {"name": "d"}}
    (run / "run.json").write_text(json.dumps(known))
    (run / "metrics.json").write_text(json.dumps({"data": "d/val", "AP": 0.4, "AP50": 0.6, "F1": 0.5}))
    about = folder / "reports/0003-evaluate-d-rtdetr_nano"
    about.mkdir()
    (about / "run.json").write_text(json.dumps({"config": {"detector": "$WORKSPACE/reports/" + run.name}}))
    rng = np.random.default_rng(0)
    for camera in ("cam1", "cam2"):
        (folder / "photos" / camera).mkdir(parents=True)
        photo = cv2.resize(rng.integers(0, 256, (6, 9, 3), np.uint8), (96, 64), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"photos/{camera}/0001.png"), photo)
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    for name in ("NEO_ROOT", "NEO_REPORTS", "NEO_DATA"):
        monkeypatch.delenv(name, raising=False)
    return place


@pytest.fixture
def neo(capfd):
    def call(*words: object) -> tuple[int, str, str]:
        status = main(list(map(str, words)))
        return status, *capfd.readouterr()

    return call


def same(one: Detections, other: Detections) -> None:
    assert np.array_equal(one.labels, other.labels) and np.abs(one.scores - other.scores).max(initial=0) < 1e-5
    assert np.abs(one.boxes_xyxy - other.boxes_xyxy).max(initial=0) < 1e-3


# any image


def test_every_way_to_give_an_image_finds_the_same(here):
    detector = load_detector("best")
    path = here / "photos/cam1/0001.png"
    pixels = read_image(path)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    expected = detector.detect_images([pixels]).filter(0.02)
    assert expected.num_boxes > 10
    ways = [path, str(path), Image.open(path), pixels, tensor, tensor / 255, tensor.double().numpy() / 255, [pixels]]
    for way in ways:
        found = detector(way)
        assert len(found) == 1
        same(found, expected)
    mixed = detector(ways)
    assert len(mixed) == len(ways) and mixed.num_boxes == len(ways) * expected.num_boxes
    for one in mixed:
        same(one, expected)
    assert detector(here / "photos").images[1].name.endswith("cam2/0001.png")
    assert len(detector([])) == 0 and len(detector(iter([pixels, pixels]))) == 2
    assert len(detector(np.stack([pixels] * 3))) == 3


def test_every_kind_of_detector_is_called_alike(here):
    photos = here / "photos"
    plain = load_detector(1)(photos, threshold=0.05, classes="head")
    assert set(plain.labels) == {1} and plain.category_ids == (7, 3, 5)
    tiled = TiledDetector(load_detector(1), (48, 64))(photos, threshold=0.05)
    assert len(tiled) == 2 and tiled.category_ids == (7, 3, 5) and tiled[1].plot().size == (96, 64)


def test_a_thousand_images_are_not_in_memory_at_once():
    most = 0

    class Counted(TorchDetector):
        def detect_images(self, images, batch_size=None):
            nonlocal most
            most = max(most, len(images))
            return Detections.empty(len(images), self.class_names)

    model = create_model("rtdetr_nano", class_names=NAMES)
    detector = Counted(model, (64, 96))
    small = (np.zeros((8, 8, 3), np.uint8) for _ in range(1000))
    assert len(detector(small, batch_size=4)) == 1000 and most == 16
    most = 0
    large = (np.broadcast_to(np.zeros(3, np.uint8), (6000, 6000, 3)) for _ in range(3))
    assert len(detector(large)) == 3 and most == 2, "large ones wait in pairs"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_a_pil_image_is_read_as_its_file_is(mode, tmp_path):
    rng = np.random.default_rng(1)
    colour = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    image = (
        colour.convert(mode) if mode != "I;16" else Image.fromarray(rng.integers(0, 65536, (20, 30)).astype(np.uint16))
    )
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    ours, theirs = pil_to_rgb(Image.open(path)), read_image(path)
    assert ours.shape == theirs.shape == (20, 30, 3)
    if mode != "CMYK":  # each library has its own inks
        assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_exif_turns_a_pil_image_as_it_turns_the_file(turn, tmp_path):
    image = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    (pixels, source), (theirs, _) = read_inputs([tmp_path / "a.jpg", Image.open(tmp_path / "a.jpg")])
    assert pixels.shape == theirs.shape and source.size == pixels.shape[:2]
    assert np.abs(pixels.astype(int) - theirs).mean() < 2


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((3, 20, 3), np.uint8), "the channels could be the first axis or the last"),
        (torch.zeros(3, 20, 3), "the channels could be the first axis or the last"),
        (np.zeros((20, 30, 4), np.uint8), "leave the transparency out"),
        (np.zeros((20, 30, 2), np.uint8), "is no image"),
        (np.zeros((0, 30, 3), np.uint8), "is no image"),
        (np.zeros((20, 30, 3), np.uint16), "values of type uint16"),
        (np.zeros((20, 30, 3), bool), "values of type bool"),
        (np.full((20, 30, 3), 255.0), "divide by 255"),
        (torch.full((3, 20, 30), -1.5), "do not normalise"),
        (np.full((20, 30, 3), np.nan), "expected 0..1"),
    ],
)
def test_what_could_mean_two_things_is_refused(image, words):
    with pytest.raises(InputError, match=words):
        array_to_rgb(image, "image 4")


def test_bad_calls_are_refused_before_anything_is_read(here):
    detector = load_detector("last")
    table = Annotations([1], ["a.png"], [(9, 9)], [0, 0], np.zeros((0, 4)), [], NAMES)
    for given, words in (({"threshold": 30}, "a threshold is in 0..1"), ({"classes": ["haed"]}, "did you mean head?")):
        with pytest.raises(InputError, match=words):
            detector(here / "none.png", **given)
    for image, words in ((table, "detector.predict"), (b"abc", "bytes is no image"), ("none.png", "cannot be read"),
                         (here / "reports/0003-evaluate-d-rtdetr_nano", "no image in this folder")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            detector(image)


# a sequence of images


def random_table(seed: int) -> Detections:
    rng = np.random.default_rng(seed)
    images, boxes = int(rng.integers(1, 12)), int(rng.integers(0, 40))
    corner = rng.uniform(0, 50, (boxes, 2))
    sources = [ImageSource(f"{i}.png", (90, 90)) for i in range(images)]
    columns = (
        rng.integers(0, images, boxes),
        np.hstack([corner, corner + 9]),
        rng.random(boxes),
        rng.integers(0, 2, boxes),
    )
    return Detections(*columns, images, NAMES, (7, 3, 5), sources)


@pytest.mark.parametrize("seed", range(20))
def test_indexing_slicing_and_masks_are_those_of_a_list(seed):
    found, rng = random_table(seed), np.random.default_rng(seed)
    each = list(found)
    assert len(found) == len(each) == found.num_images and sum(one.num_boxes for one in found) == found.num_boxes
    mask, order = rng.random(len(found)) < 0.5, rng.permutation(len(found))
    picks = [(slice(1, None, 2), each[1::2]), (order, [each[i] for i in order]), (slice(None, None, -1), each[::-1]),
             (mask, [one for one, kept in zip(each, mask) if kept]), ([], []), ([-1], each[-1:])]  # fmt: skip
    for index, expected in picks:
        some = found[index]
        assert len(some) == len(expected) == len(some.images)
        for one, other in zip(some, expected):
            assert one.images == other.images and one.category_ids == (7, 3, 5)
            same(one, other)
    assert found.filter(classes=[]).num_boxes == 0 and len(found.filter(1.0)) == len(found)
    for bad in (len(found), -len(found) - 1):
        with pytest.raises(IndexError):
            found[bad]
    with pytest.raises(IndexError):
        found[np.ones(len(found) + 1, bool)]


def test_annotations_are_indexed_alike():
    table = Annotations(
        [5, 6, 7], ["a", "b", "c"], [(9, 9)] * 3, [0, 1, 1, 2], [[0, 0, 5, 5], [1, 1, 4, 4]], [0, 1], NAMES
    )
    assert [len(table), table[-1].image_id, table[1:].image_ids.tolist(), table[[2, 0]].image_ids.tolist()] == [
        3, 7, [6, 7], [7, 5]]  # fmt: skip
    assert len(table[np.array([True, False, True])].labels) == 2 and len(table[[]]) == 0


def test_pandas_and_coco_there_and_back(tmp_path):
    found = random_table(3)
    back = Detections.from_pandas(found.to_pandas(), NAMES, len(found))
    same(back, found)
    coco = found.save(tmp_path / "coco.json", "coco")
    for name in json.loads(coco.read_text())["images"]:
        cv2.imwrite(str(tmp_path / name["file_name"]), np.zeros((90, 90, 3), np.uint8))
    table = read_coco(coco, tmp_path)
    assert len(table) == len(found) and set(table.class_names) == set(NAMES)
    assert np.abs(np.sort(table.boxes_xyxy, 0) - np.sort(found.boxes_xyxy, 0)).max() < 0.02
    assert len(Detections.from_pandas(found.to_pandas().iloc[:0], NAMES)) == 0


def test_tables_in_the_wrong_order_are_named_and_public_names_come_late():
    code = """
import sys
import neo_nb.train
print("torch" in sys.modules, neo_nb.load_detector.__name__, neo_nb.train.train.__name__)
import numpy as np
from neo_nb.base.annotations import Annotations
from neo_nb.base.core import InputError
from neo_nb.base.detections import Detections, to_coco_results
from neo_nb.evaluate import analyse, coco_metrics, compare_detections, evaluate, find_errors, threshold_curves
truth = Annotations([1], ["a"], [(9, 9)], [0, 1], [[0, 0, 5, 5]], [0], ("x",))
found = Detections([0], [[0, 0, 5, 5]], [0.5], [0], 1, ("x",))
calls = [lambda f=f: f(truth, found) for f in (evaluate, coco_metrics, find_errors, threshold_curves, to_coco_results)]
for call in [*calls, lambda: compare_detections(truth, found, found), lambda: evaluate(found, found)]:
    try:
        call()
    except InputError as error:
        print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    names, *lines = ended.stdout.splitlines() or [""]
    assert names == "False load_detector train", ended
    swapped = "detections are wanted here, found Annotations; detections come first, then annotations"
    assert lines[:6] == [swapped] * 6 and "annotations are wanted here, found Detections" in lines[6], ended


# names of runs


def test_a_run_has_many_names(here, capfd):
    plain = load_detector(here / "reports/0001-train-d-rtdetr_nano/weights/best.safetensors")
    names = [1, "1", "0001-train-d-rtdetr_nano", "best", "last", "3", "reports/0001-train-d-rtdetr_nano"]
    for name in names:
        assert repr(load_detector(name)) == repr(plain)
    told = capfd.readouterr().err
    assert "best: 0001-train-d-rtdetr_nano, AP 0.400, the only training on d/val" in told
    assert "0003-evaluate-d-rtdetr_nano has no weights: those of 0001-train-d-rtdetr_nano are taken" in told
    for name, words in (("bset", "did you mean best?"), ("9", "no such run"), ("x.onnx", "no such file of weights")):
        with pytest.raises(InputError, match=words):
            load_detector(name)


def test_a_file_needs_no_workspace(place, tmp_path, monkeypatch):
    monkeypatch.delenv("NEO_ROOT", raising=False)
    monkeypatch.delenv("NEO_REPORTS", raising=False)
    monkeypatch.chdir(tmp_path)
    run = place / "reports/0001-train-d-rtdetr_nano"
    for name in (run, run / "weights", run / "weights/best.safetensors"):
        assert load_detector(name).class_names == NAMES
    with pytest.raises(InputError, match="not in a workspace"):
        load_detector("last")


# the command line


def test_predict_writes_what_others_read(here, neo, capfd):
    status, out, err = neo("predict", "3", "photos", "--threshold", "0.05", "--classes", "head", "--format", "coco",
                           "--device", "cpu", "--json")  # fmt: skip
    assert status == 0 and "those of 0001-train-d-rtdetr_nano are taken" in err, err
    found = json.loads(out)
    run = here / "reports" / found["run"].rpartition("/")[2]
    assert {"coco.json", "images", "predictions.json", "report.html", "run.json"} <= {p.name for p in run.iterdir()}
    assert len(list((run / "images").iterdir())) == 2 and list(found["counts"]) == ["head"]
    box = found["images"][0]["detections"][0]
    assert box["category_id"] == 3 and all(len(str(x).partition(".")[2]) <= 2 for x in box["box"])
    coco = json.loads((run / "coco.json").read_text())
    assert [i["file_name"] for i in coco["images"]] == ["cam1/0001.png", "cam2/0001.png"]
    assert len(coco["annotations"]) == sum(found["counts"].values())
    assert load_detector(run).class_names == NAMES, "a prediction stands for what predicted"
    assert capfd.readouterr().err.startswith(f"{run.name} has no weights: those of 0001-train-d-rtdetr_nano")
    for words, told in ((("--classes", "haed"), "did you mean head?"), (("--format", "xml"), "--format")):
        status, out, err = neo("predict", "1", "photos", *words, "--device", "cpu")
        assert status == 2 and told in err and len(err.strip().splitlines()) == 1, err


def test_runs_are_listed_in_a_second(tmp_path, neo, monkeypatch):
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    for number in range(1, 501):
        run = tmp_path / f"reports/{number:04d}-train-d-m"
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"status": "done", "config": {"lr": [1] * 400}}))
        (run / "metrics.json").write_text(
            json.dumps({"data": "d/val", "AP": number / 1000, "per_class": {"a": [1] * 400}})
        )
    monkeypatch.setenv("NEO_ROOT", str(tmp_path))
    monkeypatch.delenv("NEO_REPORTS", raising=False)
    status, out, err = neo("runs", "--sort", "AP", "--limit", "2", "--json")
    assert status == 0 and [row["number"] for row in json.loads(out)["runs"]] == [500, 499], err
    from neo_nb.base.run_folders import list_runs

    start = time.process_time()
    assert len(list_runs(tmp_path / "reports")) == 500
    assert time.process_time() - start < 1
    status, out, err = neo("runs", "--kind", "trian")
    assert status == 2 and "did you mean train?" in err


def test_replacing_classes_forgets_their_ids():
    found = random_table(5)
    assert found.to_classes(("head",)).category_ids == ()
    with pytest.raises(InputError, match="3 category ids for 1 classes"):
        replace(found.select([]), class_names=("a",))
