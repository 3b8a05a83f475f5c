"""Drawn logos are what their table says, and a training can hold its backbone and choose its best epoch by F1."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from train_worker import images as photos

from neo_nb.base.core import InputError
from neo_nb.data.loader import make_loader
from neo_nb.data.manifest import load_dataset, load_manifest
from neo_nb.synthetic.glyphs import LOOK_ALIKES, OUTLINES, Mark, draw_mark, random_mark
from neo_nb.synthetic.logos import HD_SIZES, draw_logos, make_logos
from neo_nb.train.checkpoint import load_state
from neo_nb.train.config import make_config
from neo_nb.train.trainer import Trainer, train

WORKER = Path(__file__).with_name("train_worker.py")


@pytest.fixture(scope="module")
def drawn() -> list:
    return [draw_logos(seed, (360, 640), (20, 90)) for seed in range(60)]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    return float(np.prod(np.clip(high - low, 0, None)) / np.prod(one[2:] - one[:2]))


@pytest.mark.parametrize("size", [(180, 320), (270, 480), (541, 963)])
def test_a_seed_is_a_image_and_another_seed_is_another(size):
    one, two, other = draw_logos(5, size), draw_logos(5, size), draw_logos(6, size)
    for name in ("image", "numbers", "boxes", "iscrowd"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert one.tags == two.tags and one.image.shape == (*size, 3) and not np.array_equal(one.image, other.image)


def test_boxes_are_as_tight_as_the_paint(drawn):
    count = 0
    for photo in drawn:
        numbers = {int(n) for n in np.unique(photo.numbers)} - {0}
        assert len(numbers) == len(photo.boxes)
        for number, box in zip(sorted(numbers), photo.boxes):
            ys, xs = np.nonzero(photo.numbers == number)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            count += 1
    assert count > 50


def test_the_paint_is_where_the_projected_shield_is(drawn):
    off = []
    for photo in drawn:
        for i, (outline, painted) in enumerate(zip(photo.outlines, photo.painted)):
            seen = photo.numbers == i + 1
            if seen.sum() == painted:  # neither covered nor cut
                filled = np.zeros(photo.numbers.shape, np.uint8)
                cv2.fillPoly(filled, [np.round((outline - 0.5) * 256).astype(np.int32)], 1, shift=8)
                off.append(np.logical_xor(filled > 0, seen).sum() / max(painted, 1))
    # fillPoly paints every pixel that the edge touches: a rim of at most a pixel
    assert len(off) > 40 and np.median(off) < 0.25 and max(off) < 0.6, max(off)


def test_the_image_shows_a_mark_where_the_box_is(drawn):
    shown = 0
    for photo in drawn:
        for box, crowd in zip(photo.boxes.astype(int), photo.iscrowd):
            if not crowd and "dark" not in photo.tags and "blurred" not in photo.tags:
                inside = photo.image[box[1] : box[3], box[0] : box[2]].reshape(-1, 3).astype(float)
                shown += inside.std(0).max() > 12  # the sign stands out from the shield
    assert shown > 30


def test_a_look_alike_is_in_no_box_and_kinds_are_all_there(drawn):
    kinds = set()
    for photo in drawn:
        for kind, box in photo.look_alikes:
            kinds.add(kind)
            corner = np.clip(box, 0, [*photo.numbers.shape[::-1]] * 2)
            if np.prod(corner[2:] - corner[:2]) > 0:
                assert all(overlap(corner, logo) < 0.5 for logo in photo.boxes), "or another sheet lies on it"
    assert kinds == set(LOOK_ALIKES)


def test_three_of_ten_images_have_no_logo_and_some_of_these_have_look_alikes(drawn):
    drawn = drawn + [draw_logos(seed, (180, 320), (30, 90)) for seed in range(100, 300)]
    counts = np.array([len(p.boxes) for p in drawn])
    assert 0.2 < (counts == 0).mean() < 0.42 and counts.max() == 4
    assert sum(1 for p in drawn if not len(p.boxes) and p.look_alikes) > 10


def test_heights_are_those_asked_for():
    for low, high in ((10, 14), (60, 80)):
        found = [np.ptp(o[:, 1]) * 2 for s in range(30) for o in draw_logos(s, (540, 960), (low, high)).outlines]
        assert low * 0.78 < min(found) and max(found) < high * 1.25, (min(found), max(found))


def test_sizes_are_drawn_from_those_given_and_tags_say_which(tmp_path):
    table = make_logos(30, [(90, 160), (135, 240)], 0, tmp_path, heights=(60, 200))
    assert {tuple(size) for size in table.sizes.tolist()} == {(90, 160), (135, 240)}
    for size, tags, path in zip(table.sizes.tolist(), table.tags.tolist(), table.file_names.tolist()):
        words = tags.split()
        assert words[-1] == f"{size[0]}p" and words[0] in ("wall", "table", "street")
        assert {"poster", "receipt", "card"} & set(words) and len(set(words)) == len(words)
        assert list(cv2.imread(str(table.root / path)).shape[:2]) == size


def test_an_interrupted_split_is_drawn_anew_and_a_whole_one_is_opened(tmp_path, monkeypatch):
    from neo_nb.synthetic import logos

    real, seen = logos.draw_logos, []

    def broken(seed, *args):
        seen.append(seed)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(seed, *args)

    monkeypatch.setattr(logos, "draw_logos", broken)
    with pytest.raises(KeyboardInterrupt):
        make_logos(4, (90, 160), 0, tmp_path)
    assert not (tmp_path / "logos.json").exists()
    table = make_logos(4, (90, 160), 0, tmp_path)
    assert len(seen) == 7
    again = make_logos(4, (90, 160), 0, tmp_path)
    assert len(seen) == 7 and np.array_equal(again.boxes_xyxy, table.boxes_xyxy)


def test_a_manifest_opens_logos_by_name_and_its_splits_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("NEO_DATA", str(tmp_path))
    path = tmp_path / "small.yaml"
    path.write_text(
        "format: logos\nroot: small\nclasses: [logo]\nsize: [90, 160]\nheights: [60, 200]\n"
        "splits:\n  train: {num_images: 8, seed: 0}\n  golden: {num_images: 8, seed: 2}\n"
    )
    train_table, golden = load_dataset(path, "train"), load_dataset(path, "golden")
    assert train_table.name == "small/train" and len(train_table) == len(golden) == 8
    assert not np.array_equal(cv2.imread(str(train_table[0].path)), cv2.imread(str(golden[0].path)))
    batch = next(iter(make_loader(train_table, size=(90, 160), divisor=32, batch_size=4)))
    assert len(batch) == 4
    assert np.array_equal(load_dataset(path, "train").boxes_xyxy, train_table.boxes_xyxy)


def test_the_manifests_of_the_workspace_say_what_the_recipe_needs():
    small, large = load_manifest("logos"), load_manifest("logos_hd")
    for manifest in (small, large):
        assert (
            manifest.drawn
            and manifest.classes == ["logo"]
            and set(manifest.splits) == {*"train val golden test".split()}
        )
        assert manifest.splits["golden"].num_images == 500
        assert len({split.seed for split in manifest.splits.values()}) == 4
    assert [tuple(size) for size in large.sizes] == list(HD_SIZES) and large.heights == (10, 60)


def test_marks_never_become_the_logo_by_accident():
    rng = np.random.default_rng(0)
    logo = draw_mark(Mark("logo", "shield", "pennant", "black"), 32)[0].astype(int)
    for kind in LOOK_ALIKES:
        for _ in range(30):
            mark = random_mark(rng, kind, ["black"])
            patch = draw_mark(mark, 32)[0].astype(int)
            side = np.minimum(patch.shape[:2], logo.shape[:2])
            cut = (slice(0, side[0]), slice(0, side[1]))
            assert abs(patch[cut] - logo[cut]).mean() > 6, mark
    assert set(OUTLINES) > {"shield"}


# -- training: held backbones and the best epoch


@pytest.fixture
def table(tmp_path):
    return photos(tmp_path / "images")


def small(**more):
    base = dict(
        size=(96, 128), epochs=1, passes_per_epoch=1, batch_size=4, tracker="none", cache=False, no_aug_epochs=0
    )
    return make_config(**(base | more))


def parts(state: dict, name: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in state.items() if k.startswith("backbone.") == (name == "backbone")}


def test_a_held_backbone_is_equal_bit_for_bit_and_moves_afterwards(tmp_path, table):
    trainer = Trainer(small(epochs=3, freeze_epochs=2, keep_last=3, ema=0.5), tmp_path / "run", table, table)
    start, snapshots = parts(trainer.model.state_dict(), "backbone"), []
    heads = parts(trainer.model.state_dict(), "rest")
    evaluate_epoch = trainer.evaluate_epoch

    def watched():
        snapshots.append((trainer.model.state_dict(), trainer.ema.model.state_dict()))
        snapshots[-1] = tuple({k: v.clone() for k, v in state.items()} for state in snapshots[-1])
        return evaluate_epoch()

    trainer.evaluate_epoch = watched
    trainer.fit()
    for model, ema in snapshots[:2]:
        assert all(torch.equal(model[k], v) and torch.equal(ema[k], v) for k, v in start.items())
        assert sum(not torch.equal(model[k], v) for k, v in heads.items()) > 100
    model, ema = snapshots[2]
    moved = [k for k in start if not torch.equal(model[k], start[k])]
    assert {k.rsplit(".", 1)[1] for k in moved} >= {"weight", "running_mean", "running_var"}
    assert len(moved) > 0.9 * len(start) and any(not torch.equal(ema[k], start[k]) for k in moved)


def test_the_optimizer_keeps_its_groups_and_has_no_state_for_what_never_moved(tmp_path, table):
    held, free = (Trainer(small(freeze_epochs=n), tmp_path / str(n), table, table) for n in (1, 0))
    sizes = lambda t: [(g["name"], len(g["params"]), g["base_lr"]) for g in t.optimizer.param_groups]  # noqa: E731
    assert sizes(held) == sizes(free)
    held.fit()
    state = load_state(tmp_path / "1/weights/last.pt")["optimizer"]["state"]
    backbone = {id(p) for p in held.model.backbone.parameters()}
    names = [id(p) in backbone for g in held.optimizer.param_groups for p in g["params"]]
    assert not any(names[i] for i in state) and len(state) == names.count(False)


def work(folder: Path, name: str, launch: tuple[str, ...] = (), **order) -> subprocess.CompletedProcess:
    order = {"images": str(folder / "images"), "run": str(folder / name), "config": {}} | order
    return subprocess.run(
        [sys.executable, *launch, str(WORKER), json.dumps(order)], capture_output=True, text=True, timeout=300
    )


def equal_states(one: dict, two: dict) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal_states(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal_states, one, two))
    return one == two


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stopped_at", [2, 3, 4])  # 3 updates per epoch: before, at and behind the boundary
def test_a_run_stopped_around_the_boundary_resumes_exactly(tmp_path, table, stopped_at):
    config = small(checkpoint_steps=1, freeze_epochs=1, epochs=2, ema=0.5)
    Trainer(config, tmp_path / "straight", table, table).fit()
    stopped = Trainer(config, tmp_path / "stopped", table, table)
    update = stopped.train_step

    def stops(batches, stop=False):
        if stopped.progress["step"] == stopped_at:
            raise Stopped
        return update(batches, stop)

    stopped.train_step = stops
    with pytest.raises(Stopped):
        stopped.fit()
    resumed = Trainer(config, tmp_path / "stopped", table, table)
    resumed.load(tmp_path / "stopped/weights/last.pt")
    assert resumed.progress["step"] == stopped_at
    resumed.fit()
    one, two = (load_state(tmp_path / name / "weights/last.pt") for name in ("straight", "stopped"))
    for state in (one, two):
        state["rng"][0].pop("python")  # the checker of types draws from it in a test
    for key in ("model", "ema", "ema_step", "optimizer", "rng", "position", "best"):
        assert equal_states(one[key], two[key]), key


def test_two_processes_exchange_the_gradients_of_what_moves(tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    config = {"freeze_epochs": 1, "epochs": 2, "batch_size": 2, "policy": "mild", "freeze_norms": True}
    two = work(tmp_path, "two", launch, config=config, no_denoising=True)
    assert two.returncode == 0, two.stderr[-3000:]
    one = work(tmp_path, "one", config=config | {"batch_size": 4}, no_denoising=True)
    assert one.returncode == 0, one.stderr[-3000:]
    losses = [json.loads((tmp_path / name / "done.json").read_text())["losses"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=5e-4) and len(losses[0]) == 6


def test_the_best_epoch_is_the_one_of_the_number_asked_for(tmp_path, table, monkeypatch):
    from neo_nb.models.weights import read_record as read_weights
    from neo_nb.train import trainer as chapter

    scores = [
        {"AP": 0.1, "AP50": 0.5, "F1": 0.3},
        {"AP": 0.2, "AP50": 0.4, "F1": 0.6},
        {"AP": 0.3, "AP50": 0.2, "F1": 0.4},
    ]
    for by, epoch in (("AP", 3), ("AP50", 1), ("F1", 2)):
        told = iter(scores)
        monkeypatch.setattr(chapter, "evaluate", lambda *args, told=told, **kwargs: dict(next(told)))
        result = train(small(epochs=3, monitor=by), tmp_path / by, table, table)
        assert result["best"]["epoch"] == epoch and result["best"][by] == max(s[by] for s in scores)
        record = read_weights(tmp_path / by / "weights" / "best.safetensors")
        assert record["epoch"] == epoch and record["metrics"][by] == result["best"][by]


def test_a_run_is_a_start_and_what_it_knew_is_taken_over(tmp_path, table, capsys):
    train(small(), tmp_path / "first", table, table)
    second = Trainer(small(weights=str(tmp_path / "first"), freeze_epochs=1), tmp_path / "second", table, table)
    assert "0 tensors placed" not in capsys.readouterr().out
    from neo_nb.models.weights import load_model

    best = load_model(tmp_path / "first")[0].state_dict()
    own = second.model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in best.items())
    with pytest.raises(InputError):
        Trainer(small(weights=str(tmp_path / "nowhere")), tmp_path / "third", table, table)


# -- the recipe


MINI = """
format: logos
root: mini
classes: [logo]
size: [135, 240]
heights: [80, 200]
splits:
  train: {num_images: 9, seed: 0}
  val: {num_images: 4, seed: 1}
  golden: {num_images: 5, seed: 2}
"""


def test_a_recipe_trains_measures_and_goes_on(tmp_path, monkeypatch):
    import pandas as pd

    from neo_nb.recipes.small_objects import STEPS, Recipe, paces, run_step, step_latency
    from neo_nb.recipes.step_report import verdicts, write_steps

    monkeypatch.setenv("NEO_DATA", str(tmp_path / "data"))
    (tmp_path / "mini.yaml").write_text(MINI)
    recipe = Recipe(str(tmp_path / "mini.yaml"), (72, 128), minutes=0.001, settings={"batch_size": 8, "device": "cpu"})
    steps = [STEPS[name] for name in ("baseline", "tiles", "mining")]
    seconds = paces(recipe, steps, tmp_path / "steps")
    assert set(seconds) == {"images x1", "tiles x1"} and min(seconds.values()) > 0
    rows = [run_step(recipe, step, 0, tmp_path / "steps") for step in steps]
    assert paces(recipe, steps, tmp_path / "steps") == seconds, "measured once"
    assert rows[1]["updates"] == rows[2]["updates"] == 5, "the same time is the same number of updates"
    assert [row["step"] for row in rows] == ["baseline", "tiles", "mining"] and all(0 <= r["F1"] <= 1 for r in rows)
    mined = json.loads((tmp_path / "steps/mining-0/step.json").read_text())["mined"]
    assert mined["tiles"] >= mined["tiles trained on"] >= rows[1]["images"] > 4
    stamp = (tmp_path / "steps/tiles-0/weights/best.safetensors").stat().st_mtime_ns
    assert [run_step(recipe, step, 0, tmp_path / "steps") for step in steps] == rows
    assert (tmp_path / "steps/tiles-0/weights/best.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="another recipe"):
        run_step(Recipe(recipe.data, (96, 160), settings=recipe.settings), steps[0], 0, tmp_path / "steps")
    frame, latency = pd.DataFrame(rows), step_latency(recipe, steps[:2], 0, tmp_path / "steps", rounds=2)
    assert list(latency.index) == ["baseline", "tiles"] and (latency["p99 ms"] >= latency["p50 ms"]).all()
    assert verdicts(frame) == [], "what they are held against has not run"
    text = write_steps(tmp_path, frame, latency, "Logos", "neo logo").read_text()
    assert all(f"| {step.name} | 1 |" in text for step in steps)
    assert len(pd.read_csv(tmp_path / "logo.csv")) == 3
