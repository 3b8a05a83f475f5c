"""Mining: the golden set stays untouched, look-alikes count once, weights are kept to, and training goes on from it.

The detector of these tests finds everything red. Squares are the objects; discs are what it invents."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from neo_nb.base.annotations import Annotations
from neo_nb.base.core import InputError
from neo_nb.base.detections import Detections
from neo_nb.cli.main import main
from neo_nb.data.coco import write_coco
from neo_nb.data.hard_negatives import read_mined
from neo_nb.data.loader import make_loader, read_image
from neo_nb.data.manifest import load_dataset
from neo_nb.data.manifest_file import Manifest, Split, load_manifest, write_manifest
from neo_nb.data.near_duplicates import find_copies
from neo_nb.data.validate import check_dataset
from neo_nb.deploy.detector import TorchDetector
from neo_nb.deploy.embeddings import embed_boxes, embed_images
from neo_nb.models.weights import save_weights
from neo_nb.models.zoo import create_model
from neo_nb.recipes.mine_round import build_pool, choose_from, score_before, tags_of, write_round
from neo_nb.review.mining import deduplicate, require_trainable_split
from neo_nb.runs.run import new_run, read_record, record

SIZE = (96, 128)


def draw(path: Path, squares: int, discs: int, seed: int) -> list[tuple[int, int, int, int]]:
    """A grey image with red squares, whose boxes come back, and red discs, each of its own size and shade."""
    rng = np.random.default_rng([seed, 7])
    image = np.full((*SIZE, 3), rng.integers(90, 160), np.uint8)
    image[:: int(rng.integers(5, 12))] += 20  # something for a network to look at
    places = [(x, y) for x in (4, 36, 68, 100) for y in (4, 36, 68)]
    places = [places[i] for i in rng.permutation(len(places))[: squares + discs]]
    boxes = []
    for i, (x, y) in enumerate(places):
        side, red = int(rng.integers(10, 24)), (int(rng.integers(0, 40)), int(rng.integers(0, 40)), 255 - i)
        if i < squares:
            image[y : y + side, x : x + side] = red
            boxes.append((x, y, x + side, y + side))
        else:
            cv2.circle(image, (x + side // 2, y + side // 2), side // 2, red, -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
    return boxes


class Reds(TorchDetector):
    """Says "logo" of everything red, the redder the surer; its features are an untrained network's."""

    def predict(self, annotations, batch_size=None, progress=True, num_workers=0):
        rows = []
        for i in range(len(annotations)):
            image = read_image(annotations[i].path)
            mask = (image[..., 0] > 200) & (image[..., 2] < 80)
            _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
            for x, y, w, h, _ in stats[1:].tolist():
                rows.append((i, (x, y, x + w, y + h), image[y + h // 2, x + w // 2, 0] / 260))
        index, boxes, scores = map(list, zip(*rows)) if rows else ([], np.zeros((0, 4)), [])
        return Detections(index, boxes, scores, [0] * len(index), len(annotations), ("logo",))


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return Reds(create_model("rtdetr_nano", class_names=["logo"]), size=SIZE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A workspace with the data set `logos`: 10 images to train on, 4 golden ones, and a folder without objects."""
    monkeypatch.setenv("NEO_ROOT", str(tmp_path))
    monkeypatch.setenv("NEO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NEO_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    for split, count, seed in (("train", 10, 0), ("val", 4, 100)):
        boxes = [draw(tmp_path / f"data/{split}/{split}{i}.png", 1 + i % 3, i % 4, seed + i) for i in range(count)]
        offsets, flat = np.cumsum([0] + [len(b) for b in boxes]), [box for b in boxes for box in b]
        files = [f"{split}{i}.png" for i in range(count)]
        table = Annotations(range(1, count + 1), files, [SIZE] * count, offsets, flat, [0] * len(flat), ["logo"],
                            root=tmp_path / "data" / split)  # fmt: skip
        write_coco(table, tmp_path / "data" / f"{split}.json")
    for i in range(5):
        draw(tmp_path / f"data/pool/pool{i}.png", 0, i % 3, 200 + i)
    splits = {s: Split(annotations=f"{s}.json", images=s) for s in ("train", "val")}
    write_manifest(
        Manifest(format="coco", root=".", classes=["logo"], splits=splits), tmp_path / "data_manifests/logos.yaml"
    )
    return tmp_path


ABOUT = {"run": "0001-train-logos", "before": {"F1": 0.5, "data": "logos/val"}, "rule": {"threshold": 0.3}}


def mined(detector, place, data="logos", tags=None, images="pool", **options) -> tuple:
    """One round: the table it makes, its JSON, and what was chosen."""
    ground = build_pool(data, images=images and place / "data" / images, tags=tags)
    found, chosen = choose_from(detector, ground, 0.3, **({"similarity": 1.0, "progress": False} | options))
    path = write_round(data, "train", ground, found, chosen, **ABOUT)
    return load_dataset(path.stem, "train", strict=True), read_mined(path.with_suffix(".json")), ground, chosen


# ---- what is mined


def test_every_invented_object_is_mined_and_no_real_one(detector, place):
    table, record_, ground, _ = mined(detector, place)
    discs = {i + 1: i % 4 for i in range(10)}
    found = {image: sum(n.image == image for n in record_.negatives) for image in discs}
    assert found == discs
    weights = dict(zip(table.image_ids.tolist(), table.weights.tolist()))
    assert [weights[i] > 1 for i in range(1, 11)] == [discs[i] > 0 for i in range(1, 11)]
    assert all(n.kind == "background" and n.label == "logo" and n.score >= 0.3 for n in record_.negatives)
    # of the folder only images in which something was invented came along: 0, 1, 2, 0, 1 discs
    assert [Path(image.file).name for image in record_.images] == ["pool1.png", "pool2.png", "pool4.png"]
    assert len(table) == 13 and np.diff(table.offsets)[10:].tolist() == [0, 0, 0]
    assert ground.counts["on images without objects"] == 4


def test_more_and_surer_errors_weigh_more_up_to_the_most(detector, place):
    table, record_, _, _ = mined(detector, place, most=2.5)
    sums = {i: sum(n.score for n in record_.negatives if n.image == i) for i in range(1, 11)}
    for image, weight in zip(table.image_ids.tolist()[:10], table.weights.tolist()):
        assert weight == pytest.approx(min(1 + sums[image], 2.5), abs=1e-3)
    assert max(table.weights) == 2.5


# ---- the golden set


def digests(paths) -> set[bytes]:
    return {Path(path).read_bytes() for path in paths}


@pytest.mark.parametrize("split", ["val", "test", "golden", "Valid", "minival"])
def test_a_golden_split_is_refused_by_name(place, split):
    with pytest.raises(InputError, match="mining never touches it"):
        require_trainable_split(split)
    with pytest.raises(InputError, match="mining never touches it"):
        build_pool("logos", split)


def test_a_golden_image_is_never_mined_under_whatever_name(detector, place, capsys):
    golden = sorted((place / "data/val").iterdir())
    for i, path in enumerate(golden):  # copies in the folder, one of them under a wrong suffix, and one in the split
        (place / f"data/pool/innocent{i}.{'jpg' if i == 1 else 'png'}").write_bytes(path.read_bytes())
    (place / "data/train/train3.png").write_bytes(golden[3].read_bytes())
    again = cv2.resize(cv2.imread(str(golden[0])), None, fx=1.5, fy=1.5)  # as another program saves it
    cv2.imwrite(str(place / "data/pool/again.jpg"), again, [cv2.IMWRITE_JPEG_QUALITY, 80])
    table, record_, ground, _ = mined(detector, place)
    hard = [table[i].path for i in np.flatnonzero(table.weights > 1).tolist()]
    assert hard and not digests(hard) & digests(golden)
    assert not digests(place / "data" / image.file for image in record_.images) & digests(golden)
    assert 4 not in {n.image for n in record_.negatives}
    assert (
        ground.counts["images refused: a copy of a golden one"] == 6
        and ground.counts["errors refused: a copy of a golden one"] > 0
    )
    assert "6 images are images of the golden set" in capsys.readouterr().out


def test_an_image_that_is_tagged_golden_is_out_and_so_are_its_copies(detector, place):
    (place / "data/pool/copy.png").write_bytes((place / "data/train/train7.png").read_bytes())
    _, before, _, _ = mined(detector, place)
    assert 8 in {n.image for n in before.negatives} and "pool/copy.png" in {i.file for i in before.images}
    _, after, ground, _ = mined(detector, place, tags={"golden": ["8"], "hard_negative": [8]})
    assert 8 not in {n.image for n in after.negatives} and "pool/copy.png" not in {i.file for i in after.images}
    assert 8 not in dict(after.weights), "golden, whatever else a person tagged"
    assert (
        ground.counts["images refused: golden"] == 1 and ground.counts["images refused: a copy of a golden one"] == 1
    )


def test_a_copy_is_found_however_it_was_saved_and_nothing_else_is(place):
    table, val = load_dataset("logos", "train"), load_dataset("logos", "val")
    assert find_copies(table, [val]) == {}
    path, golden = place / "data/train/train0.png", place / "data/val/val2.png"
    for quality in (95, 60, 30):
        path.write_bytes(cv2.imencode(".jpg", cv2.imread(str(golden)), [cv2.IMWRITE_JPEG_QUALITY, quality])[1])
        assert find_copies(table, [val]) == {0: str(golden)}, quality
    image = cv2.imread(str(golden))
    image[30:46, 40:60] = 255 - image[30:46, 40:60]  # the same place, with something in it
    cv2.imwrite(str(path), image)
    assert find_copies(table, [val]) == {}
    path.unlink()
    assert find_copies(table, [val]) == {}  # a missing file is for others to report


# ---- tags


def test_label_errors_are_left_out_and_hard_negatives_always_in(detector, place):
    tags = {"label_error": [4], "hard_negative": ["1", 77]}  # image 1 has no error at all
    table, record_, ground, _ = mined(detector, place, tags=tags)
    assert 4 not in {n.image for n in record_.negatives} and table.weights[3] == 1
    assert table.weights[0] == 4 and [n.kind for n in record_.negatives if n.image == 1] == ["tagged"]
    assert ground.counts["tagged hard_negative, not among them"] == 1
    assert ground.counts["images refused: label error"] == 1 and ground.counts["errors refused: label error"] == 3


def test_tags_speak_of_the_images_that_they_were_set_on(place, capsys):
    run = new_run(data="logos")
    (run / "tags.json").write_text('{"hard_negative": [1], "boxes": [{"tag": "golden"}]}')
    (run / "metrics.json").write_text('{"data": "logos/val"}')
    assert tags_of(run, "logos/train") == {}
    assert "speaks of logos/val, not of logos/train" in capsys.readouterr().out
    assert tags_of(run, "logos/train", run / "tags.json")["hard_negative"] == [1], "a file that is named is meant"


# ---- look-alikes


def test_the_same_image_again_and_again_is_one_error(detector, place):
    image = cv2.imread(str(place / "data/pool/pool1.png"))  # one disc
    for i in range(6):
        cv2.imwrite(str(place / f"data/pool/again{i}.png"), image, [cv2.IMWRITE_PNG_COMPRESSION, i])
    assert len(digests((place / "data/pool").glob("again*"))) > 1, "unlike as files, alike as images"
    _, record_, ground, chosen = mined(detector, place, similarity=0.9999)
    files = {image.id: Path(image.file).name for image in record_.images}
    same = [n for n in record_.negatives if files.get(n.image, "").startswith(("again", "pool1"))]
    assert len(same) == 1 and same[0].alike == 7
    assert ground.counts["near duplicates"] == 6
    assert chosen.alike.sum() == len(chosen.rows) + 6


@pytest.mark.parametrize("seed", range(8))
def test_distinct_is_the_greedy_choice_for_any_block(seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(int(rng.integers(1, 300)), 4)) + rng.normal(size=4)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    limit = rng.uniform(0.5, 0.99)
    greedy = []
    for i, v in enumerate(vectors):
        if not any(v @ vectors[k] >= limit for k in greedy):
            greedy.append(i)
    for block in (1, 7, 1000):
        kept, like = deduplicate(vectors, limit, block)
        assert kept.tolist() == greedy
        assert ((vectors * vectors[kept[like]]).sum(1) >= limit - 1e-12).all(), "each goes because of one that stays"


def test_an_error_that_looks_alike_is_nearer_than_others(detector, place):
    table = load_dataset("logos", "train")
    shown = detector.predict(table)
    vectors = embed_boxes(detector, table, shown, batch_size=3)
    assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(table))  # other neighbours in a batch, the same vectors
    back = detector.predict(table.select(order))
    again = embed_boxes(detector, table.select(order), back, batch_size=4)
    key = np.lexsort((back.boxes_xyxy[:, 1], back.boxes_xyxy[:, 0], order[back.image_index]))
    own = np.lexsort((shown.boxes_xyxy[:, 1], shown.boxes_xyxy[:, 0], shown.image_index))
    assert np.allclose(again[key], vectors[own], atol=1e-4)
    assert embed_images(detector, table).shape == (len(table), vectors.shape[1])


# ---- weights in the loader


def bits(batch) -> list[bytes]:
    return [batch.images.numpy().tobytes(), batch.image_index.numpy().tobytes()]


def test_a_weighted_loader_gives_the_same_batches_with_workers_and_from_the_middle(place):
    table = load_dataset("logos", "train")
    heavy = replace(table, weights=[1, 4, 1, 1, 2.5, 1, 1, 1, 1, 3])
    given = dict(size=SIZE, divisor=32, batch_size=3, policy="mild", shuffle=True, seed=4, quiet=True)
    plain = make_loader(heavy, **given)
    plain.set_epoch(2)
    batches = [bits(batch) for batch in plain]
    assert len(batches) == len(plain) == 6  # 16.5 draws, 16 of them
    other = make_loader(heavy, num_workers=2, **given)
    other.set_epoch(2, start_batch=3)
    assert [bits(batch) for batch in other] == batches[3:]
    plain.set_epoch(2)
    views = [(int(i), im.numpy().tobytes()) for b in plain for i, im in zip(b.image_index, b.images)]
    second = [view for row, view in views if row == 1]
    assert len(second) == 4 or len(second) == 3
    assert len(set(second)) == len(second), "each copy is another view"
    unit = [bits(b) for b in make_loader(replace(table, weights=[1.0] * 10), **given)]
    assert unit == [bits(b) for b in make_loader(table, **given)]
    with pytest.raises(InputError, match="the weights of all images are 0"):
        make_loader(replace(table, weights=[0] * 10), **given)
    assert len(make_loader(heavy, **given | {"shuffle": False})) == 4, "evaluation sees each image once"


# ---- the manifest, and training that goes on


def test_rounds_add_up_and_the_golden_set_stays_the_same(detector, place):
    first, _, _, _ = mined(detector, place)
    second, record_, ground, _ = mined(detector, place, data="logos-mined-1", limit=1)
    assert record_.round == 2 and [row["round"] for row in record_.rounds()] == [1, 2]
    assert (second.weights[: len(first)] >= first.weights - 1e-4).all() and len(second) == len(first)
    assert ground.counts["images of the folder"] == 2, "what was added before is in the split"
    old, new = (load_manifest(name).splits["val"] for name in ("logos", "logos-mined-2"))
    assert old == new
    assert [load_dataset(n, "val").file_names.tolist() for n in ("logos", "logos-mined-2")][0] == [
        f"val{i}.png" for i in range(4)
    ]
    assert check_dataset("logos-mined-2", progress=False).ok


def test_tiles_of_mined_images_keep_their_weights(detector, place, monkeypatch):
    monkeypatch.chdir(place)
    whole, record_, _, _ = mined(detector, place)
    assert main(["data", "tile", "logos-mined-1", "--to", "pieces", "--tile", "64", "64", "--empty", "9"]) == 0
    tiles = load_dataset("pieces", "train", strict=True)
    assert (tiles.weights > 1).any() and len(set(tiles.file_names.tolist())) == len(tiles)
    assert set(tiles.weights.round(3).tolist()) == set(whole.weights.round(3).tolist())
    assert read_mined(load_manifest("pieces").mined).rounds() == record_.rounds()


def test_a_mined_manifest_that_has_lost_its_data_says_so(detector, place):
    _, record_, _, _ = mined(detector, place)
    path = place / "data_manifests/logos-mined-1.json"
    text = path.read_text()
    path.write_text(text.replace("[2, ", "[222, ", 1))
    with pytest.raises(InputError, match="1 images that are not there, the first is 222; the data have changed"):
        load_dataset("logos-mined-1")
    path.write_text(text.replace("[2, ", "[2, 1", 1))
    with pytest.raises(InputError, match="weights of images differ"):
        load_dataset("logos-mined-1", strict=True)
    path.unlink()
    with pytest.raises(InputError, match="it belongs to the manifest of the same name"):
        load_dataset("logos-mined-1")
    assert len(load_dataset("logos", "train")) == 10


def test_the_score_before_is_the_runs_own_only_if_it_is_of_this_golden_set(detector, place):
    from neo_nb.base.annotations import fingerprint

    golden, run = load_dataset("logos", "val"), new_run(data="logos")
    measured = score_before(run, detector, golden)
    assert 0 < measured["F1"] < 1 and measured["data"] == "logos/val"
    (run / "metrics.json").write_text(json.dumps({"F1": 0.25, "AP": 0.1, "threshold": 0.4, "images": 4}))
    record(run, data={"fingerprint of val": "of another set"})
    assert score_before(run, detector, golden) == measured
    record(run, data={"fingerprint of val": fingerprint(golden)})
    assert score_before(run, detector, golden)["F1"] == 0.25


def test_neo_mine_and_a_training_that_goes_on_from_it(detector, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    run = new_run(data="logos")
    best, detector.model.size = run / "weights" / "best.safetensors", SIZE
    save_weights(detector.model, best, data="logos/train")
    record(run, config={"model": "rtdetr_nano"}, data={"name": "logos"})
    flags = ["--images", "data/pool", "--threshold", "0", "--similarity", "1", "--limit", "8", "--json"]
    assert main(["mine", "1", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "logos-mined-1" and found["counts"]["negatives"] == 8
    assert list(read_record(run)["mined"]) == ["logos-mined-1"], "the run remembers its rounds"
    folder = Path(found["run"])
    assert len(list((folder / "gallery/mined").glob("*.jpg"))) == 8
    assert "Rounds of mining" in (folder / "report.html").read_text()
    assert main(["data", "check", "logos-mined-1"]) == 0
    tiny = [
        "--epochs",
        "1",
        "--passes-per-epoch",
        "1",
        "--batch-size",
        "4",
        "--size",
        "96",
        "128",
        "--tracker",
        "none",
    ]
    assert main(["train", "--data", "logos-mined-1", "--weights", str(best), *tiny]) == 0
    last = next((place / "reports").glob("0003-*"))
    known, page = read_record(last), (last / "report.html").read_text()
    assert known["rounds"][0]["before"] == found["before"]
    assert known["data"]["fingerprint of val"] == found["before"]["fingerprint"], "the same golden set"
    part = page[page.index("Rounds of mining") :]
    metrics = json.loads((last / "metrics.json").read_text())
    change = metrics["F1"] - found["before"]["F1"]
    assert f"{change:+.3f}" in part[: part.index("</section>")]
    capsys.readouterr()
    assert main(["mine", "1", "--split", "val"]) == 2
    assert "mining never touches it" in capsys.readouterr().err
