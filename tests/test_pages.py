"""Pages of runs: whole, small, with links that lead somewhere, readable on a telephone and in the dark."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser import CHROMIUM, Browser

from neo_nb.base.annotations import Annotations
from neo_nb.base.detections import Detections
from neo_nb.base.draw import HEIGHT, grid, pack_rows
from neo_nb.evaluate.compare import compare_detections, find_changes
from neo_nb.evaluate.operating_point import evaluate
from neo_nb.runs.index import read_rows, write_index
from neo_nb.runs.report import write_report
from neo_nb.runs.results import save_changes, save_evaluation, save_predicted
from neo_nb.runs.run import new_run, record

CLASSES = tuple(f"class {i:02d} <b>" for i in range(80))
SHAPES = [(96, 128), (128, 96), (60, 300), (400, 120), (96, 96), (200, 320)]


def truth_of(folder: Path) -> Annotations:
    """Images of mixed shapes, eighty classes, and one image that has most of the objects."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    boxes, labels, counts = [], [], []
    for i, (height, width) in enumerate(SHAPES):
        cv2.imwrite(str(folder / f"IMG {i}.jpg"), rng.integers(0, 255, (height, width, 3), np.uint8))
        counts.append(60 if i == 0 else 6)
        corner = rng.uniform(0, 0.6, (counts[-1], 2)) * (width, height)
        boxes.append(np.concatenate([corner, corner + rng.uniform(8, 30, (counts[-1], 2))], 1))
        labels.append(rng.integers(0, 80, counts[-1]))
    names = [f"IMG {i}.jpg" for i in range(len(SHAPES))]
    return Annotations(np.arange(len(SHAPES)), names, SHAPES, np.cumsum([0, *counts]), np.concatenate(boxes),
                       np.concatenate(labels), CLASSES, root=folder, name="made_up/val")  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Path:
    """One run of each kind, each with what its command leaves, and their pages."""
    place = tmp_path_factory.mktemp("pages")
    truth, rng = truth_of(place / "images"), np.random.default_rng(1)
    folder = place / "reports"
    found = []
    for shift in (3.0, 1.0):
        boxes = truth.boxes_xyxy + rng.normal(0, shift, truth.boxes_xyxy.shape)
        scores = rng.uniform(0.2, 1, len(boxes))
        found.append(Detections(truth.image_index, boxes, scores, (truth.labels + (scores < 0.5)) % 80, 6, CLASSES))
    runs = []
    for one in found:
        runs.append(run := new_run(folder, "made_up", "rtdetr_nano"))
        if len(runs) == 1:
            save_evaluation(run, one, truth, evaluate(one, truth))
        (run / "results.csv").write_text("epoch,loss,loss_l1,val_loss_l1,AP\n1,9.5,2,3,0.1\n2,7.5,1,2,0.2\n")
        record(run, status="done", started="2026-01-01T10:00:00", config={"lr": 1e-4}, data={"name": "made_up"})
    compared = new_run(folder, "0001", "0002", "compare")
    changes = find_changes(*found, truth, (0.3, 0.3))
    save_changes(compared, changes, truth, tuple(found), (0.3, 0.3))
    names = [run.name for run in runs]
    told = {"first": names[0], "second": names[1], "numbers": compare_detections(*found, truth, draws=5)}
    told |= {"gained": 3, "lost": 1, "counts": {name: [1, 2, 3] for name in names}}
    (compared / "comparison.json").write_text(json.dumps(told))
    mined = new_run(folder, "made_up", "rtdetr_nano", "mine")
    told = {"name": "made_up-mined-1", "weights": str(runs[0]), "round": 1, "counts": {"errors": 12}}
    (mined / "mine.json").write_text(json.dumps(told))
    wrong = new_run(folder, "made_up", "0001", "errors")
    told = {"dataset": names[0], "threshold": 0.3, "counts": {"background": 4}, "costs": {"background": {"cost": 0.1}}}
    (wrong / "errors.json").write_text(json.dumps(told | {"views": {"seen in nothing": 4}}))
    exported = new_run(folder, "made_up", "rtdetr_nano", "export")
    (exported / "model.onnx").write_bytes(b"x")
    scores = {"AP": 0.5, "AP50": 0.7, "F1": 0.6}
    told = {"file": "model.onnx", "megabytes": 8.1, "torch": scores, "onnx": scores, "passed": True, "difference": 0.0}
    (exported / "export.json").write_text(json.dumps(told))
    predicted = new_run(folder, "photos", "rtdetr_nano", "predict")
    rows = [{"file": str(truth.root / name), "detections": []} for name in truth.file_names]
    rows[2]["detections"] = [{"box": [5, 5, 90, 50], "score": 0.9, "label": "class <i>"}]
    told = {"detector": "rtdetr_nano", "threshold": 0.3, "images": rows, "counts": {"class <i>": 1}}
    (predicted / "predictions.json").write_text(json.dumps(told))
    save_predicted(predicted, rows)
    failed = new_run(folder, "made_up", "rtdetr_nano")
    record(failed, status="failed", error="<the disk is full>")
    for run in (mined, wrong, exported, predicted, compared):
        record(run, status="done", config={"of": names[0]})
    for run in sorted(folder.glob("0*")):
        write_report(run)
    damaged = new_run(folder, "made_up", "rtdetr_nano", "evaluate")
    (damaged / "run.json").write_text('{"status"')
    write_index(folder)
    return folder


def pages(reports: Path) -> list[Path]:
    return [reports / "index.html", *sorted(reports.glob("*/report.html"))]


def test_every_page_is_whole_and_its_links_lead_somewhere(reports):
    assert len(pages(reports)) == 9
    for path in pages(reports):
        text = path.read_text()
        assert not re.search(r"""(src|href)=["']?(https?:|//)|url\(["']?http|@import|<link""", text), path
        for address in re.findall(r'href="([^"#]+)"', text):
            assert (path.parent / address).is_file(), f"{path}: {address}"
        for source in re.findall(r'src="([^"]{0,30})', text):
            assert source.startswith("data:image/jpeg"), source
        assert "<b>" not in re.sub(r"<b>[\d.+−–-]+</b>", "", text) and "<i>" not in text, f"{path}: names are escaped"
        assert path.stat().st_size < 6_000_000, path


def test_an_image_is_in_a_gallery_twice_at_most(reports):
    run = next(reports.glob("0001-*"))
    for kind in ("false_positives", "misses"):
        captions = json.loads((run / "gallery" / kind / "captions.json").read_text())
        shown = [name for name, _ in captions.values()]
        assert set(captions) == {path.name for path in (run / "gallery" / kind).glob("*.jpg")}
        assert len(shown) > 2 and max(map(shown.count, shown)) == 2
    text = (run / "report.html").read_text()
    part = text[text.index("Surest false positives") : text.index("Largest objects missed")]
    names = re.findall(r'alt="([^"]+)"', part)
    assert set(names) <= {f"IMG {i}.jpg" for i in range(6)} and max(map(names.count, names)) == 2


def test_letters_are_of_one_size_because_images_are_of_one_height(reports):
    found = {path: cv2.imread(str(path)).shape for path in reports.glob("0001-*/samples/*.jpg")}
    assert len(found) == 6
    assert {shape[0] for shape in found.values() if shape[1] < 3 * HEIGHT} == {HEIGHT}
    assert all(shape[1] <= 3 * HEIGHT for shape in found.values())


def test_many_classes_fold(reports):
    text = next(reports.glob("0001-*")).joinpath("report.html").read_text()
    classes = len(json.loads(next(reports.glob("0001-*/metrics.json")).read_text())["per_class"])
    assert f"<summary>{classes - 15} more classes" in text


@pytest.mark.parametrize(
    "kind, told",
    {
        "compare": ("By AP", "95 % interval", "Better in the second"),
        "mine": ("neo train --data made_up-mined-1 --weights 0001-train-made_up-rtdetr_nano",),
        "errors": ("AP50 won by fixing it", "seen in nothing", "neo errors 0001-train-made_up-rtdetr_nano --serve"),
        "export": ("load_detector(", "8.100", "0.5000"),
        "predict": ("images without a box", "class &lt;i&gt;", "IMG 2.jpg", "1 box"),
    }.items(),
)
def test_the_page_of_a_command_begins_with_what_it_found(reports, kind, told):
    text = next(reports.glob(f"*-{kind}-*/report.html")).read_text()
    text = text[text.index("<main>") :]
    for part in told:
        assert part in text.replace("&#34;", '"'), part


def test_the_index_has_every_run(reports):
    rows = {row["number"]: row["status"] for row in read_rows(reports)}
    assert rows == {**dict.fromkeys(range(1, 8), "done"), 8: "failed", 9: "damaged"}
    text = (reports / "index.html").read_text()
    assert text.count("<tr>") == 10 and "&lt;the disk is full&gt;" in text
    assert [p.name for p in reports.iterdir() if p.name.startswith(".")] == [".lock"], "a page is written whole"


def test_rows_of_mixed_shapes_fill_the_sheet():
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 40):
        aspects = np.exp(rng.normal(0, 0.6, count)).tolist()
        rows = pack_rows(aspects, 1000, 150, 4)
        assert [i for row, _ in rows for i in row] == list(range(count))
        for row, high in rows[:-1]:
            wide = sum(aspects[i] for i in row) * high + 4 * (len(row) - 1)
            assert abs(wide - 1000) <= 0.5 * sum(aspects[i] for i in row) + 1
    black = [np.zeros((*shape, 3), np.uint8) for shape in SHAPES * 3]
    sheet = grid(black, columns=4, width=200)
    last = pack_rows([w / h for h, w in SHAPES * 3], sheet.shape[1], 200 / np.median([w / h for h, w in SHAPES]), 4)[
        -1
    ][1]
    assert (sheet[: -last - 4] > 128).mean() < 0.05, "white cells"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser(reports, tmp_path):
    browser = Browser(tmp_path / "chromium")
    try:
        for path in pages(reports):
            browser("Emulation.setDeviceMetricsOverride", width=480, height=900, deviceScaleFactor=1, mobile=False)
            browser.open(path.as_uri())
            browser.wait(f"location.href === '{path.as_uri()}' && document.readyState === 'complete'", 30)
            assert browser.run("document.documentElement.scrollWidth") <= 480, f"{path}: scrolls sideways"
        browser("Emulation.setDeviceMetricsOverride", width=1400, height=900, deviceScaleFactor=1, mobile=False)
        back = "getComputedStyle(document.body).backgroundColor"
        light = browser.run(back)
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert browser.run(back) != light
        run = next(reports.glob("0001-*/report.html"))
        browser.open(run.as_uri())
        browser.wait(f"location.href === '{run.as_uri()}' && document.readyState === 'complete'", 30)
        tops = (
            "[...document.querySelectorAll('.images')[0].querySelectorAll('img')].map(i => i.getBoundingClientRect())"
        )
        rows = browser.run(f"{tops}.map(r => [Math.round(r.top), Math.round(r.height)])")
        assert all(len({h for t, h in rows if t == top}) == 1 for top, _ in rows), f"one height in a row: {rows}"
        browser.run("document.querySelector('.images img').click()")
        first = browser.run("document.querySelector('dialog').open && document.querySelector('dialog p').textContent")
        press = "document.querySelector('dialog').dispatchEvent(new KeyboardEvent('keydown', {{key: '{}'}}))"
        browser.run(press.format("ArrowRight"))
        assert first.startswith("1 / 6") and browser.run("document.querySelector('dialog p').textContent").startswith(
            "2 / 6"
        )
        for kind in ("rawKeyDown", "keyUp"):
            browser("Input.dispatchKeyEvent", type=kind, key="Escape", code="Escape", windowsVirtualKeyCode=27)
        browser.wait("!document.querySelector('dialog').open", 10)
        index = (reports / "index.html").as_uri()
        browser.open(index)
        browser.wait(f"location.href === '{index}' && document.readyState === 'complete'", 30)
        browser.run("document.querySelectorAll('th')[0].click(), document.querySelectorAll('th')[0].click()")
        assert browser.run("document.querySelector('tbody tr').cells[0].textContent") == "0001"
        browser.run(
            "(i => { i.value = 'failed'; i.dispatchEvent(new Event('input')) })(document.querySelector('input'))"
        )
        assert browser.run("[...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).length") == 1
    finally:
        browser.close()
