"""Recipes, stages and schedules: what changes when in a run, and that it can be trained."""

import numpy as np
import pytest
import torch

from neo_nb.base.core import InputError
from neo_nb.data.loader import make_loader
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.config import RECIPES, TrainConfig, make_config
from neo_nb.train.loop import Loop
from neo_nb.train.optim import lr_factor
from neo_nb.train.trainer import Trainer, train


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(8, (72, 128), 0, tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def loop(scenes, tmp_path):
    def build(**settings) -> Loop:
        common = dict(size=(72, 128), batch_size=4, passes_per_epoch=1, tracker="none", device="cpu", cache=False)
        return Loop(make_config(**(common | settings)), tmp_path / "run", scenes, scenes)

    return build


@pytest.mark.parametrize("model", ["rtdetr_nano", "rtdetr_r50"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_makes_a_configuration_that_flags_override(name, model):
    config = make_config(recipe=name, model=model)
    assert config.recipe == name and config.warmup <= 0.1
    for setting in RECIPES[name]["*"] | RECIPES[name].get(model, {}):
        assert setting in TrainConfig.model_fields
    assert make_config(recipe=name, model=model, lr=0.5, loss="vfl").lr == 0.5


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="no such recipe: 'plane'.*plain"):
        make_config(recipe="plane")


def test_the_stages_of_deim_over_its_own_120_epochs(loop):
    run = loop(recipe="deim", epochs=120, no_aug_epochs=3)
    stages = [run._stage_of(epoch) for epoch in range(120)]
    expected = ["plain"] * 4 + ["mosaic"] * 60 + ["single"] * 53 + ["plain"] * 3
    assert stages == expected
    loaders = {stage: run._train_loader(stages.index(stage)) for stage in ("plain", "mosaic", "single")}
    assert [(x.items.mosaic, x.items.mixup) for x in loaders.values()] == [(0, 0), (0.5, 0.5), (0, 0)]
    assert loaders["plain"].items.policy != loaders["single"].items.policy == loaders["mosaic"].items.policy


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 16, 72])
def test_stages_of_short_runs_keep_their_order(loop, epochs):
    run = loop(recipe="deim", epochs=epochs)
    stages = [run._stage_of(epoch) for epoch in range(epochs)]
    order = {"plain": 0, "mosaic": 1, "single": 2}
    ranks = [order[s] for s in stages]
    middle = np.flatnonzero(ranks)
    assert len(middle) == 0 or (np.diff(ranks[middle[0] : middle[-1] + 1]) >= 0).all()
    assert stages[-1] == "plain"


def test_the_default_recipe_changes_nothing_but_at_its_end(loop):
    run = loop(epochs=10, no_aug_epochs=3)
    assert [run._stage_of(epoch) for epoch in range(10)] == ["mosaic"] * 7 + ["plain"] * 3  # dense with shares of 0
    assert (run.loader.items.mosaic, run.loader.items.mixup) == (0, 0)


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_rate_of_every_recipe_warms_up_and_never_rises_again(name):
    config = make_config(recipe=name, epochs=120, milestones=(80, 100))
    factors = np.array([lr_factor(step, 1200, config) for step in range(1200)])
    top = int(factors.argmax())
    assert factors[0] < 0.1 and factors.max() == 1 and top <= 0.1 * 1200
    assert (np.diff(factors[top:]) <= 1e-12).all() and factors.min() > 0


def test_the_flat_cosine_is_flat_then_falls_then_rests():
    config = make_config(recipe="deim", model="rtdetr_r18", epochs=120, no_aug_epochs=3, warmup=0.02)
    at = [lr_factor(epoch * 10, 1200, config) for epoch in (4, 30, 63, 64, 117, 119)]
    assert at == pytest.approx([1, 1, 1, 1, 0.5, 0.5]) and 0.74 < lr_factor(905, 1200, config) < 0.76


def test_a_view_never_holds_more_objects_than_the_limit_and_some_are_dense(scenes):
    common = dict(
        size=(72, 128), divisor=32, batch_size=4, policy="flip", shuffle=True, quiet=True, mosaic=1.0, mixup=0.5
    )
    free, most = make_loader(scenes, **common), make_loader(scenes, **(common | dict(mosaic=0, mixup=0))).max_objects
    tight = make_loader(scenes, **common, max_objects=most)
    counts: dict[str, list[int]] = {"free": [], "tight": []}
    for name, loader in (("free", free), ("tight", tight)):
        for epoch in range(4):
            loader.set_epoch(epoch)
            counts[name] += [len(t) for batch in loader for t in batch.targets]
    assert max(counts["tight"]) <= most < max(counts["free"]) and tight.max_objects == most
    same = [a == b for a, b in zip(*counts.values())]
    assert 0 < sum(same) < len(same)  # what fits is left as it was


def test_a_crowd_with_mosaic_needs_no_queries_for_five_images(loop):
    assert (
        loop(recipe="deim", epochs=1, mosaic_range=(0.0, 1.0), no_aug_epochs=0, num_queries=40).loader.max_objects
        == 40
    )


@pytest.mark.parametrize("loss", ["vfl", "mal"])
def test_the_loss_of_the_settings_is_the_one_that_is_trained(loop, loss):
    run = loop(loss=loss, policy="none", epochs=1, warmup=0.0)
    assert run.model.criterion.kind == loss
    batch = next(iter(run.loader))
    torch.manual_seed(0)
    losses = [float(run.train_step([batch])[0]["loss"]) for _ in range(5)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_a_run_of_deim_goes_through_all_its_stages(scenes, tmp_path, monkeypatch):
    seen, build = [], Loop._train_loader
    monkeypatch.setattr(
        Trainer, "_train_loader", lambda self, epoch: seen.append(self._stage_of(epoch)) or build(self, epoch)
    )
    config = make_config(
        recipe="deim", size=(72, 128), batch_size=4, passes_per_epoch=1, tracker="none", device="cpu", epochs=6,
        mosaic_range=(0.17, 0.5), no_aug_epochs=2, num_queries=40,
    )  # fmt: skip
    train(config, tmp_path / "run", scenes, scenes)
    rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert seen == ["plain", "mosaic", "single", "plain"] and len(rows) == 7
