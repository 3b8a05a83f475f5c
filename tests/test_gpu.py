"""What only a card can show; skipped without one, run there by the GPU suite."""

import copy
import warnings

import pytest
import torch

from neo_nb.data.loader import make_loader
from neo_nb.gpu.parts import tf32
from neo_nb.models import create_model
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.config import make_config
from neo_nb.train.rehearsal import rehearsal
from neo_nb.train.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SIZE = (90, 160)


def test_an_update_waits_as_often_as_it_was_rehearsed(tmp_path):
    scenes = make_scenes(2, SIZE, 0, tmp_path)
    batch = next(iter(make_loader(scenes, size=SIZE, divisor=32, batch_size=2, quiet=True)))
    config = make_config(
        size=SIZE, batch_size=2, epochs=1, precision="bf16", device="cuda", tracker="none", cache=False
    )
    with rehearsal() as seen:
        trainer = Trainer(config, tmp_path, scenes, scenes)
        trainer.model.train()
        seen.clear()
        trainer.train_step([batch])
    trainer = Trainer(config, tmp_path, scenes, scenes)
    trainer.model.train()
    trainer.train_step([batch])
    pinned = copy.copy(batch).pin_memory()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as predicted:
            warnings.simplefilter("always")
            trainer.train_step([pinned])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in predicted if "synchroniz" in str(w.message)]
    assert len(waits) <= len(seen), f"{len(waits)} waits of the card, {len(seen)} passages rehearsed"


@pytest.mark.parametrize("name", ["rtdetr_nano", "rtdetrv2_r18", "rtdetr_hgnetv2_l"])
def test_the_card_and_its_deployed_copy_say_what_the_cpu_says(name):
    torch.manual_seed(0)
    model, images = create_model(name, 5).eval(), torch.rand(2, 3, 160, 224)
    with torch.inference_mode(), tf32(False):
        here = model(images)
        model.cuda()
        for there in (model(images.cuda()), model.fuse()(images.cuda())):
            close = {"rtol": 1e-3, "atol": 1e-3}
            torch.testing.assert_close(there.logits.sort(1).values.cpu(), here.logits.sort(1).values, **close)
