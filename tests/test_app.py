"""A detector is trained and opened up: the App shows the very boxes that the metrics counted, and its tags come back."""

import json
import signal
import urllib.request
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from browser import CHROMIUM, Browser
from command import free_port, neo, page_of

from neo_nb.evaluate.errors import KINDS, find_errors
from neo_nb.review import fiftyone_db as database
from neo_nb.runs.results import open_evaluation

pytestmark = [
    pytest.mark.skipif(database.database_problem() is not None, reason=f"FiftyOne: {database.database_problem()}"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # FiftyOne's own
]
DRAWN = """format: scenes
root: drawn
classes: [person, head]
size: [160, 256]
splits:
  train: {num_images: 48, seed: 0}
  val: {num_images: 10, seed: 1}
"""
SHOWN = {
    "false positives, surest first": ("localisation", "classification", "duplicate", "background", "both"),
    "confusions": ("classification",),
    "duplicates": ("duplicate",),
    "localisation errors": ("localisation",),
    "seen in nothing": ("background",),
}
TRAIN = "--data drawn --model rtdetr_nano --size 160 256 --epochs 1 --passes-per-epoch 16 --batch-size 8 --num-queries 100 --tracker none --cache"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> SimpleNamespace:
    """A detector that was trained, and `neo errors` on it."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "data_manifests").mkdir()
    (folder / "data_manifests" / "drawn.yaml").write_text(DRAWN)
    (folder / "settings.ini").write_text("[DEFAULT]\n")
    trained = neo("train", *TRAIN.split(), cwd=folder)
    assert trained.returncode == 0, trained.stderr
    done = neo("errors", "1", "--threshold", "0.03", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "reports").glob("0001-train-*")
    return SimpleNamespace(folder=folder, run=run, found=json.loads(done.stdout))


@pytest.fixture(scope="module")
def app(workspace):
    """The App of that run, served by `neo errors --serve`."""
    port = free_port()
    served = neo("errors", "1", "--serve", "--port", str(port), wait=False, cwd=workspace.folder)
    name, root = workspace.run.name, f"http://127.0.0.1:{port}"

    def stop() -> None:
        if served.poll() is None:
            served.send_signal(signal.SIGINT)
            served.wait(120)

    try:
        assert "FiftyOne" in page_of(f"{root}/datasets/{name}", served)
        yield SimpleNamespace(root=root, name=name, stop=stop)
    finally:
        stop()


@pytest.fixture(scope="module")
def expected(workspace) -> SimpleNamespace:
    """What the metrics counted; `tables`, by view: the field, its rows in order, and what they are sorted by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.folder)
        predicted, table, metrics = open_evaluation(workspace.run)
    threshold, count = workspace.found["threshold"], len(table)
    errors = find_errors(predicted, table, 0.5, threshold, max_dets=metrics["max_dets"])
    assert workspace.found["counts"] == errors.counts()
    kinds = {name: [KINDS.index(kind) for kind in some] for name, some in SHOWN.items()}
    rows = {name: np.flatnonzero(np.isin(errors.kind, some)) for name, some in kinds.items()}
    tables = {name: ("predictions", some, predicted.scores[some]) for name, some in rows.items()}
    missed = np.flatnonzero(errors.missed)
    tables["misses, largest first"] = ("ground_truth", missed, table.areas[missed])
    tables["misses, smallest first"] = ("ground_truth", missed, -table.areas[missed])
    lost = table.image_index[~errors.found & ~table.iscrowd]
    wrong = np.bincount(predicted.image_index[rows["false positives, surest first"]], minlength=count)
    wrong += np.bincount(lost, minlength=count)
    tables["images with the most errors"] = ("", np.flatnonzero(wrong), wrong[wrong > 0])
    for name, (field, some, by) in tables.items():
        order = np.argsort(-by, kind="stable")
        tables[name] = field, some[order], by[order]
    return SimpleNamespace(predicted=predicted, table=table, tables=tables)


def ask(app: SimpleNamespace, path: str, **words: Any) -> dict[str, Any]:
    """What the App's server answers."""
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{app.root}{path}", json.dumps(words).encode(), head)
    answer = json.load(urllib.request.urlopen(request, timeout=120))
    assert not answer.get("errors"), answer
    return answer


DATASET = """query($name: String!, $slug: String) { dataset(name: $name) { stages(slug: $slug) savedViews { name slug } } }"""
SAMPLES = """query($name: String!, $view: BSONArray!) {
  samples(dataset: $name, view: $view, first: 10000) {
    ... on SampleItemStrConnection { edges { node { ... on ImageSample { sample } } } } } }"""


def view_of(app: SimpleNamespace, name: str) -> tuple[str, list[dict[str, Any]]]:
    """What a saved view is called in an address, and its stages."""
    slugs = {view["name"]: view["slug"] for view in dataset_of(app, "")["savedViews"]}
    return slugs[name], dataset_of(app, slugs[name])["stages"]


def dataset_of(app: SimpleNamespace, slug: str) -> dict[str, Any]:
    return ask(app, "/graphql", query=DATASET, variables={"name": app.name, "slug": slug})["data"]["dataset"]


def samples_in(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [edge["node"]["sample"] for edge in answer["data"]["samples"]["edges"]]


def rows_of(samples: list[dict[str, Any]], field: str) -> list[int]:
    """Rows of the tables: of the box that a crop shows, or of the image."""
    return [(sample[field] if field else sample)["row"] for sample in samples]


def test_the_app_is_given_the_boxes_that_were_counted(app, expected):
    for name, (field, rows, by) in expected.tables.items():
        variables = {"name": app.name, "view": view_of(app, name)[1]}
        samples = samples_in(ask(app, "/graphql", query=SAMPLES, variables=variables))
        given = rows_of(samples, field)
        assert sorted(given) == sorted(rows.tolist()), name
        place = {row: value for row, value in zip(rows.tolist(), by)}
        assert [place[row] for row in given] == by.tolist(), f"{name}: in order"
        table = {"predictions": expected.predicted, "ground_truth": expected.table}.get(field)
        for row, sample in zip(given, samples) if field else ():
            height, width = expected.table.sizes[table.image_index[row]]
            x, y, w, h = np.array(sample[field]["bounding_box"]) * (width, height, width, height)
            assert np.allclose((x, y, x + w, y + h), table.boxes_xyxy[row], atol=0.01), name
            assert sample[field]["label"] == table.class_names[table.labels[row]]
            assert sample["filepath"].endswith(str(expected.table.file_names[table.image_index[row]]))
    assert all(len(expected.tables[name][1]) for name in ("false positives, surest first", "misses, largest first"))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_every_view(app, expected, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        for name, (field, rows, by) in expected.tables.items():
            if not len(rows):
                continue
            browser.open(f"{app.root}/datasets/{app.name}?view={view_of(app, name)[0]}")
            told = f"{len(rows):,} {'patch' if field else 'sample'}{'' if len(rows) == 1 else 'es' if field else 's'}"
            browser.wait(f"document.body?.innerText.includes({json.dumps(told)})")
            received = browser.wait("window.answers.filter((text) => text.includes('SampleItemStrConnection'))")
            given = [row for text in received for row in rows_of(samples_in(json.loads(text)), field)]
            place = dict(zip(rows.tolist(), by.tolist()))
            assert len(given) >= min(20, len(rows)), name  # as many as fit on the screen
            assert [place[row] for row in given] == by.tolist()[: len(given)], name
        browser.wait("document.querySelectorAll('canvas').length > 4")
        image = cv2.imread(str(browser.image(tmp_path / "app.png")))
        assert image.std() > 10
    finally:
        browser.close()


def test_tags_set_in_the_app_come_back(app, workspace, expected):
    second = neo("errors", "1", "--pull", cwd=workspace.folder)
    assert second.returncode == 2 and "has FiftyOne's database open" in second.stderr
    wanted = {}
    for tag, name in {"hard_negative": "seen in nothing", "label_error": "misses, smallest first"}.items():
        stages, field = view_of(app, name)[1], expected.tables[name][0]
        answer = ask(app, "/graphql", query=SAMPLES, variables={"name": app.name, "view": stages})
        crop = samples_in(answer)[1]
        one = {"labelId": crop[field]["_id"], "label_id": crop[field]["_id"], "sample_id": crop["_id"], "field": field}
        wanted[tag] = crop[field]["row"], field
        ask(app, "/tag", dataset=app.name, view=stages, target_labels=True, label_fields=[field], labels=[one],
            changes={tag: True}, filters={}, modal=False)  # fmt: skip
    whole = samples_in(ask(app, "/graphql", query=SAMPLES, variables={"name": app.name, "view": []}))[2]
    ask(app, "/tag", dataset=app.name, view=[], target_labels=False, sample_ids=[whole["_id"]],
        changes={"golden": True}, filters={}, modal=False)  # fmt: skip
    app.stop()
    done = neo("errors", "1", "--pull", cwd=workspace.folder)
    assert done.returncode == 0, done.stderr
    tags = json.loads((workspace.run / "tags.json").read_text())
    assert tags["golden"] == [whole["image_id"]]
    assert {box["tag"]: (box["row"], box["source"]) for box in tags["boxes"]} == wanted and len(tags["boxes"]) == 2
