"""Every family in every precision, rehearsed on a card that is not there: devices, and what passes to and from it."""

import pytest
import torch

from neo_nb.base.core import InputError
from neo_nb.data.loader import make_loader
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.config import TrainConfig, make_config
from neo_nb.train.loop import build_model
from neo_nb.train.rehearsal import Passage, rehearsal
from neo_nb.train.trainer import Trainer

# What may pass in an update, by the file that sends it, and nothing else
BATCH = ["to device"] * 7  # images, three columns about them, and the objects of all images as three columns
NUMBERS = ["to host"] * 2  # loss terms and the totals of the parts, read during the next update: nobody waits
MATCHER = ["to device", "to host", "to device"]  # each object's image, the costs (the one wait), the pairs

FAMILIES = ["rtdetr_nano", "rtdetrv2_r18", "rtdetrv2_r50", "rtdetr_hgnetv2_l", "rtdetrv2_timm"]
DENSE = ["rtmdet_nano", "rtmdet_m", "yolox_nano"]  # they match nothing, so they wait for nothing
SIZE = (90, 160)


def outside(seen: list[Passage], *files: str) -> list[Passage]:
    return [p for p in seen if not any(name in p.where for name in files)]


def predicted(seen: list[Passage]) -> str:
    return "\n".join(map(str, seen))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(2, SIZE, 0, tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def batch(scenes):
    return next(iter(make_loader(scenes, size=SIZE, divisor=32, batch_size=2, quiet=True)))


def config_of(model: str, precision: str) -> TrainConfig:
    settings = {"size": SIZE, "batch_size": 2, "epochs": 1, "precision": precision, "device": "cuda"}
    return make_config(model=model, tracker="none", cache=False, **settings)


@pytest.mark.parametrize("name", [*FAMILIES, *DENSE])
def test_an_update_an_evaluation_and_a_deployed_copy(name, scenes, batch, tmp_path):
    """In every precision, with one model: to make it takes the most of the time."""
    with rehearsal() as seen:
        model = build_model(config_of(name, "fp32"), scenes)
        for precision in ("fp32", "bf16", "fp16"):
            trainer = Trainer(config_of(name, precision), tmp_path, scenes, scenes, model)
            updated(trainer, batch, seen, [] if name in DENSE else MATCHER)
            if precision == "fp32":
                deployed = trainer.ema.model.fuse()
            for network in (trainer.ema.model, deployed):
                evaluated(trainer, network, batch)


def test_a_training_in_eight_bits_waits_for_nothing_either(scenes, batch, tmp_path):
    """Ranges are read and moved on the card, map by map."""
    with rehearsal() as seen:
        model = build_model(config_of("rtmdet_nano_relu", "fp32"), scenes).quantise()
        model.set_progress(0.1)
        trainer = Trainer(config_of("rtmdet_nano_relu", "bf16"), tmp_path, scenes, scenes, model)
        updated(trainer, batch, seen, [])
        assert {x.device.type for x in model.core.following()} == {"cuda"}
        evaluated(trainer, trainer.ema.model, batch)


def updated(trainer: Trainer, batch, seen: list[Passage], matched: list[str]) -> None:
    trainer.model.train()
    seen.clear()
    values, _ = trainer.train_step([batch])
    update = list(seen)
    assert {value.device.type for value in values.values()} == {"cuda"}
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    moments = [trainer.optimizer.state[p] for p in trained]  # each had a gradient, and was stepped
    assert {x.device.type for state in moments for x in state.values()} == {"cuda"}

    besides = outside(update, "train/micro_batches.py", "losses/matcher.py")
    assert not besides, predicted(besides)
    assert [p.way for p in update if "losses/matcher.py" in p.where] == matched, predicted(update)
    assert [p.way for p in update if "train/micro_batches.py" in p.where] == BATCH + NUMBERS, predicted(update)


def evaluated(trainer: Trainer, model, batch) -> None:
    there = batch.to("cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    with torch.inference_mode(), trainer.accelerator.autocast():
        outputs = model(there.images, there.sizes)
    assert outputs.logits.device.type == "cuda"
    found = model.postprocess(outputs, there, len(batch))
    assert len(found.scores) <= len(batch) * model.max_dets


def test_autocast_is_in_force(scenes, batch, tmp_path):
    """A card that is said to be there, but whose precision is not used, would prove nothing."""
    types = {}
    with rehearsal():
        for precision in ("fp32", "bf16", "fp16"):
            trainer = Trainer(config_of("rtdetr_nano", precision), tmp_path, scenes, scenes)
            last = trainer.model.backbone
            last.register_forward_hook(lambda _, __, maps, name=precision: types.update({name: maps[-1].dtype}))
            trainer.model.train()
            trainer.train_step([batch])
    assert types == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def test_what_is_left_on_the_host_is_an_error(scenes, batch, tmp_path):
    with rehearsal():
        trainer = Trainer(config_of("rtdetr_nano", "fp32"), tmp_path, scenes, scenes)
        layer = trainer.model.decoder.layers[1].linear1
        layer.bias = torch.nn.Parameter(layer.bias.cpu())
        trainer.model.train()
        with pytest.raises(RuntimeError, match="same device"):
            trainer.train_step([batch])


class _Lost(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return torch.zeros(gradient.shape)


def test_a_gradient_on_the_host_is_an_error():
    with rehearsal():
        x = torch.ones(3, device="cuda", requires_grad=True)
        with pytest.raises(InputError, match="a gradient on cpu for a tensor on cuda:0"):
            _Lost.apply(x * 2).sum().backward()


def test_the_walk_of_the_graph_is_the_engine_s():
    """On real tensors of a CPU the walk gives the gradients that torch's engine gives."""
    from neo_nb.models import create_model
    from neo_nb.train import rehearsal as module

    torch.manual_seed(0)
    model = create_model("rtdetr_nano", 3).train()
    loss = model(torch.rand(2, 3, 64, 96)).decoder.boxes.square().sum() + model.decoder.enc_score.weight.sum()
    loss.backward(retain_graph=True)
    wanted = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    module._backward(loss)
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and len(found) > 100
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_nothing_of_a_rehearsal_stays():
    before = torch.cuda.is_available, torch.nn.Module._apply
    from neo_nb.models.layers import position_embedding

    with rehearsal():
        kept = position_embedding(3, 5, 8, device="cpu")
    assert (torch.cuda.is_available, torch.nn.Module._apply) == before
    assert type(kept) is not torch.Tensor and type(position_embedding(3, 5, 8, device="cpu")) is torch.Tensor
