"""Weights of images: how often an epoch draws each, on any rank, from any place on, in a training that was stopped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train import tensors
from train_worker import images as photos

from neo_nb.base.core import InputError, derive_seed
from neo_nb.data.sampler import EpochBatchSampler, drawn, epoch_length
from neo_nb.train.checkpoint import load_state
from neo_nb.train.config import make_config
from neo_nb.train.trainer import Trainer, train

SIZE = (96, 128)


@pytest.mark.parametrize("seed", range(6))
def test_every_epoch_has_each_image_its_weight_rounded_down_or_up_and_on_average_exactly(seed):
    rng = np.random.default_rng(seed)
    weights = np.where(rng.uniform(size=57) < 0.7, 1, rng.uniform(0, 4, 57)).astype(np.float32)
    share = weights * (epoch_length(weights) / weights.astype(float).sum())
    counts = np.array([np.bincount(drawn(weights, derive_seed(seed, e)), minlength=57) for e in range(400)])
    assert (counts.sum(1) == epoch_length(weights)).all()
    assert (counts >= np.floor(share - 1e-6)).all() and (counts <= np.ceil(share + 1e-6)).all()
    assert np.abs(counts.mean(0) - share).max() < 0.1


def keys(order: EpochBatchSampler) -> list:
    return [key for batch in order for key in batch]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_weighted_epoch_resumes_anywhere_and_is_shared_by_ranks(world):
    weights = np.float32([1, 3, 1, 2.5, 0, 1, 1, 4])
    given = dict(images=8, sizes=[(8, 8), (16, 16)], shuffle=True, seed=3, weights=weights)
    whole = list(EpochBatchSampler(batch_size=2 * world, epoch=5, **given))
    parts = [list(EpochBatchSampler(batch_size=2, epoch=5, rank=r, world_size=world, **given)) for r in range(world)]
    assert len({len(p) for p in parts}) == 1
    for batch, shares in zip(whole, zip(*parts)):
        assert sorted(batch) == sorted(key for share in shares for key in share)
    for start in range(len(whole) + 1):
        later = EpochBatchSampler(batch_size=2 * world, epoch=5, **given)
        later.start_batch = start
        assert list(later) == whole[start:]
    rows = [key[1] for key in sum(whole, [])]
    assert 4 not in rows and len(rows) == 14  # round(13.5), ties to even
    assert len(set(map(tuple, sum(whole, [])))) == len(rows), "every copy has a key of its own"
    assert [key[1] for key in keys(EpochBatchSampler(batch_size=2, epoch=6, **given))] != rows


@pytest.mark.parametrize("weights", [None, np.ones(11, np.float32)])
def test_without_weights_the_order_is_the_permutation_that_it_always_was(weights):
    for epoch in range(3):
        order = EpochBatchSampler(11, 4, [(8, 8)], seed=9, shuffle=True, epoch=epoch, weights=weights)
        plain = np.random.default_rng(derive_seed(9, "order", epoch)).permutation(11)
        assert [key[1] for key in keys(order)] == plain.tolist()
        assert all(key[4] == 0 for key in keys(order))


def test_a_weighted_training_that_was_stopped_ends_as_the_straight_one_bit_for_bit(tmp_path, monkeypatch):
    table = replace(photos(tmp_path / "images"), weights=[1, 2.5, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1])
    config = make_config(size=SIZE, epochs=1, passes_per_epoch=1, batch_size=4, tracker="none", cache=False, device="cpu",
                         checkpoint_steps=2, mosaic=0.3)  # fmt: skip
    straight = Trainer(config, tmp_path / "straight", table, table)
    assert straight.total == 4, "15.5 draws, 16 of them, in fours"
    straight.fit()

    stopped, update = Trainer(config, tmp_path / "stopped", table, table), Trainer.train_step

    def dies(self, *given):
        if self.progress["step"] == 3:
            raise RuntimeError("the power is gone")
        return update(self, *given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power is gone"):
        patch.setattr(Trainer, "train_step", dies)
        stopped.fit()
    last = tmp_path / "stopped/weights/last.pt"
    assert load_state(last)["position"]["batch"] == 2, "in the middle of an epoch"
    train(config, tmp_path / "stopped", table, table, resume=True)
    one, two = (tensors(load_state(tmp_path / name / "weights/last.pt")) for name in ("straight", "stopped"))
    assert one.keys() == two.keys() and len(one) > 500
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    other = Trainer(config, tmp_path / "other", replace(table, weights=[2.0] + [1.0] * 11), table)
    with pytest.raises(InputError, match="cannot go on with other settings: data was"):
        other.load(last)
