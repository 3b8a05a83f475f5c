"""RTMDet against its definition, written out slowly; published files; updates in parts; what a change of classes does."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from test_train import work
from test_update import by_two, difference
from train_worker import images
from update_worker import all_targets, crowds, gradients, make_loop, starve

from neo_nb.base.boxes import cxcywh_to_xyxy
from neo_nb.base.core import InputError
from neo_nb.cli.deploy_commands import export
from neo_nb.data.batch import Batch, Targets
from neo_nb.data.loader import make_loader
from neo_nb.deploy.detector import TorchDetector
from neo_nb.deploy.onnx import export_onnx
from neo_nb.deploy.onnx_detector import OnnxDetector
from neo_nb.deploy.tflite import export_tflite
from neo_nb.deploy.tflite_detector import TFLiteDetector
from neo_nb.losses.dynamic_assigner import assign
from neo_nb.models import create_model, load_model, load_weights, save_weights
from neo_nb.models.int8 import calibrate_detector, to_int8
from neo_nb.models.qdq import QdqNetwork
from neo_nb.models.rtmdet.head import Head, distances, make_cells
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.checkpoint import load_state
from neo_nb.train.config import make_config
from neo_nb.train.loop import chunks
from neo_nb.train.trainer import Trainer


def normed(x: torch.Tensor, layer) -> torch.Tensor:
    """Convolution, norm and SiLU of a `ConvNorm`, from their definitions."""
    conv, norm = layer[0], layer[1]
    y = torch.nn.functional.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    mean, var = (v[None, :, None, None] for v in (norm.running_mean, norm.running_var))
    y = (y - mean) / (var + 1e-5).sqrt() * norm.weight[None, :, None, None] + norm.bias[None, :, None, None]
    return y / (1 + (-y).exp())


@pytest.mark.parametrize("exponential", [False, True])
def test_the_head_is_its_definition(exponential):
    torch.manual_seed(0)
    head = Head(3, 8, 12, (8, 16, 32), exponential=exponential).eval()
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            (
                module.running_mean.normal_(0, 0.2),
                module.running_var.uniform_(0.5, 2),
                module.weight.data.uniform_(0.5, 2),
            )
    maps = [torch.randn(2, 8, h, w) for h, w in ((6, 10), (3, 5), (2, 3))]
    with torch.no_grad():
        scores, boxes = head(maps)
        for level, x in enumerate(maps):
            for tower, last, found in (
                (head.score_tower, head.score, scores),
                (head.box_tower, head.box, boxes),
            ):
                y = x
                for layer in tower.levels[level]:
                    y = normed(y, layer)
                weight, bias = last[level].weight[:, :, 0, 0], last[level].bias
                expected = torch.einsum("oc,bchw->bohw", weight, y) + bias[None, :, None, None]
                assert (expected - found[level]).abs().max() < 1e-5
    raw = torch.randn(1, 4, 4)
    assert torch.allclose(distances(raw, exponential), raw.exp() if exponential else raw)


def plain_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    area = lambda x: max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1])  # noqa: E731
    union = area(a) + area(b) - inter
    return inter / union if union else 0.0


def plain_assign(logits, boxes, cells, objects, labels) -> tuple[list[int], list[float]]:
    """RTMDet's assigner as its paper and its authors' code have it, one pair at a time."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    inside = [any(o[0] < x < o[2] and o[1] < y < o[3] for o in objects) for x, y, _ in cells]
    cost, iou = {}, {}
    for p, (x, y, stride) in enumerate(cells):
        for g, o in enumerate(objects):
            iou[p, g] = plain_iou(boxes[p], o)
            total = 0.0
            for c, logit in enumerate(logits[p]):
                label, score = (iou[p, g] if c == labels[g] else 0.0), sigmoid(logit)
                entropy = -(label * math.log(score) + (1 - label) * math.log(1 - score))
                total += entropy * (label - score) ** 2
            total += 3 * -math.log(iou[p, g] + 1e-7)
            total += 10 ** (math.hypot(x - (o[0] + o[2]) / 2, y - (o[1] + o[3]) / 2) / stride - 3)
            cost[p, g] = total
    candidates = [p for p in range(len(cells)) if inside[p]]
    wanted: dict[int, list[int]] = {}
    for g in range(len(objects)):
        best = sorted((iou[p, g] for p in candidates), reverse=True)[:13]
        count = max(1, int(sum(best)))
        for p in sorted(candidates, key=lambda p: cost[p, g])[:count]:
            wanted.setdefault(p, []).append(g)
    found, quality = [-1] * len(cells), [0.0] * len(cells)
    for p, those in wanted.items():
        found[p] = those[0] if len(those) == 1 else min(range(len(objects)), key=lambda g: cost[p, g])
        quality[p] = iou[p, found[p]]
    return found, quality


@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_assigner_is_its_definition(count):
    torch.manual_seed(count)
    cells = make_cells(96, 128, (8, 16, 32))
    corner = torch.rand(count, 2) * torch.tensor([90.0, 60])
    objects = torch.cat([corner, corner + 10 + 30 * torch.rand(count, 2)], 1)
    labels = torch.randint(3, (count,))
    reach = cells[:, 2:] * (1 + 2 * torch.rand(len(cells), 4))
    boxes = torch.cat([cells[:, :2] - reach[:, :2], cells[:, :2] + reach[:, 2:]], 1)
    logits = torch.randn(len(cells), 3) - 2
    found = assign(logits, boxes, cells, objects, labels)
    expected, quality = plain_assign(*(x.double().tolist() for x in (logits, boxes, cells, objects)), labels.tolist())
    assert found.objects.tolist() == expected
    assert np.abs(found.quality.numpy() - np.array(quality)).max() < 1e-5


DENSE = {"model": "rtmdet_nano", "mosaic": 0.0, "mixup": 0.0, "weight_decay": 1e-4}


def test_a_batch_of_four_is_two_twos_and_four_ones(tmp_path):
    whole = all_targets(tmp_path)
    four, two, one = (gradients(dense_loop(tmp_path, batch_size=n, grad_accum_steps=4 // n), whole) for n in (4, 2, 1))
    assert difference(four, two) < 1e-5 and difference(four, one) < 1e-5


def dense_loop(folder: Path, counts: tuple[int, ...] = (1, 60, 1, 1), **more):
    return make_loop(folder, counts, num_denoising=None, **DENSE, **more)


def test_the_terms_of_an_update_in_parts_are_those_of_the_whole(tmp_path):
    told = []
    for size in (4, 1):
        loop = dense_loop(tmp_path, batch_size=size, grad_accum_steps=4 // size)
        values, _ = loop.train_step(next(chunks(loop.loader, loop.grad_accum_steps)))
        told.append([float(values[name]) for name in ("loss", "qfl", "giou")])
    assert np.allclose(*told, rtol=1e-5) and abs(told[0][0] - sum(told[0][1:])) < 1e-4


def test_too_little_memory_cuts_an_odd_batch_and_changes_nothing_else(tmp_path):
    counts = (1, 60, 1, 0, 3)
    whole = all_targets(tmp_path, counts)
    plain, starved = dense_loop(tmp_path, counts), dense_loop(tmp_path, counts)
    starve(starved, 3)
    assert difference(gradients(plain, whole), gradients(starved, whole)) < 1e-5


def test_two_processes_with_two_images_are_one_with_four(tmp_path):
    first, second = by_two(tmp_path, config=DENSE)
    alone = gradients(dense_loop(tmp_path), all_targets(tmp_path))
    for name in ("gradients", "starved"):
        assert difference(alone, first[name]) < 1e-5 and difference(first[name], second[name]) == 0
    assert (first["tried"], second["tried"]) == ([2, 1, 1], [2, 1, 1])
    for name in ("state", "average"):
        assert all(torch.equal(value, second[name][key]) for key, value in first[name].items())


@pytest.mark.parametrize("classes", [1, 80])
def test_a_batch_of_0_and_391_objects_in_half_precision(classes):
    model = create_model("rtmdet_nano", classes).train()
    boxes = torch.cat([torch.rand(391, 2) * 0.9, 0.02 + torch.rand(391, 2) * 0.08], 1)
    targets = (Targets(boxes, torch.arange(391) % classes, torch.zeros(0, 4)), Targets.empty())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.rand(2, 3, 192, 320))
    sum(model.loss(outputs, targets).values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_held_backbone_stays_what_it_was_in_float_and_in_eight_bits(tmp_path):
    loop = dense_loop(tmp_path, freeze_backbone=True, freeze_norms=False)
    before = {key: x.clone() for key, x in loop.model.backbone.state_dict().items()}
    loop.train_step(next(chunks(loop.loader, 1)))
    assert all(torch.equal(x, before[key]) for key, x in loop.model.backbone.state_dict().items())
    small = loop.model.quantise()
    trained = {name for name, p in small.named_parameters() if p.requires_grad}
    assert trained and not any("backbone" in name for name in trained)


def test_classes_that_are_known_go_on_and_others_begin_fresh(tmp_path):
    model = create_model("rtmdet_tiny", class_names=("cat", "dog")).eval()
    model.size = (64, 96)
    save_weights(model, tmp_path / "x.safetensors")
    again, record = load_model(tmp_path / "x.safetensors")
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(image).logits, again(image).logits)
    other = create_model("rtmdet_tiny", class_names=("dog", "bird", "fish"))
    fresh = other.head.score[0].weight[1].clone()
    load_weights(other, tmp_path / "x.safetensors", "known")
    assert torch.equal(other.head.score[0].weight[0], model.head.score[0].weight[1]), "dog goes on"
    assert torch.equal(other.head.score[0].weight[1], fresh), "bird begins fresh"


def test_after_a_change_of_classes_the_first_updates_are_no_shock(tmp_path):
    """The gradient's norm at the start stays within 100 times of its later median (a trap of RF100 fine-tunings)."""
    counts = (3, 6, 2, 4)
    first = dense_loop(tmp_path, counts)
    save_weights(first.model, tmp_path / "first.safetensors")
    loop = dense_loop(tmp_path, counts, weights=str(tmp_path / "first.safetensors"), classes="fresh", lr=1e-3)
    norms = []
    for _ in range(12):
        values, _stop = loop.train_step(next(chunks(loop.loader, 1)))
        norms.append(float(values["grad_norm"]))
    assert all(map(math.isfinite, norms)) and norms[0] < 100 * np.median(norms[4:])


def test_areas_of_a_large_image_do_not_overflow_in_half_precision():
    model = create_model("rtmdet_nano", 2).train()
    images = torch.zeros(1, 3, 640, 960)
    target = Targets(torch.tensor([[0.5, 0.5, 0.9, 0.9]]), torch.tensor([1]), torch.zeros(0, 4))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images)
    half = replace(outputs, logits=outputs.logits.half())
    terms = model.loss(half, (target,))
    assert all(x.isfinite() and x.dtype == torch.float32 for x in terms.values())


@pytest.mark.parametrize("size", [(160, 320), (320, 160), (96, 416)])
def test_a_rectangle_is_no_square(size):
    model = create_model("rtmdet_nano_relu", 2).eval()
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        outputs = model(images)
        boxes, scores, _ = model.detect(outputs, torch.tensor([size, size]), torch.tensor([size, size]))
    assert (
        cxcywh_to_xyxy(outputs.boxes) * torch.tensor([size[1], size[0]] * 2) - outputs.boxes_xyxy
    ).abs().max() < 1e-2
    assert boxes[..., 0::2].max() <= size[1] and boxes[..., 1::2].max() <= size[0]
    assert boxes[..., 2].max() > 0.8 * size[1] and boxes[..., 3].max() > 0.8 * size[0]


def test_a_run_of_images_without_and_with_391_objects(tmp_path):
    table = crowds(tmp_path / "images", (0, 391, 1, 0))
    config = make_config(
        **DENSE,
        size=(96, 128),
        epochs=1,
        passes_per_epoch=1,
        batch_size=2,
        tracker="none",
        device="cpu",
        no_aug_epochs=0,
    )
    trainer = Trainer(config, tmp_path / "run", table, table)
    found = trainer.fit()
    assert found["epochs"] == 1 and math.isfinite(trainer.history[-1]["loss"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of a few updates on drawn scenes, by an edge variant."""
    folder = tmp_path_factory.mktemp("edge")
    table = make_scenes(12, (96, 160), 0, folder / "scenes")
    config = make_config(
        model="rtmdet_nano_relu", size=(96, 160), epochs=2, passes_per_epoch=6, batch_size=4, tracker="none",
        device="cpu", no_aug_epochs=0, policy="none",
    )  # fmt: skip
    trainer = Trainer(config, folder / "run", table, table)
    trainer.fit()
    return folder


def scenes(folder: Path):
    return make_scenes(12, (96, 160), 0, folder / "scenes")


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse"])
def test_a_file_in_eight_bits_says_what_torch_says_bit_for_bit(trained, tmp_path, rule):
    table = scenes(trained)
    model, told = to_int8(load_model(trained / "run/weights/best.safetensors")[0], table, rule)
    assert "ranges from 12 images" in told
    detector = TFLiteDetector(export_tflite(model.eval(), tmp_path / "x.tflite"))
    for batch in make_loader(table, size=(96, 160), divisor=32, batch_size=3, quiet=True):
        x = model.network_input(batch.images, batch.sizes)
        with torch.no_grad():
            expected = model.core(x)
        for row in range(len(x)):
            found = detector.run(x[row].permute(1, 2, 0).numpy())
            for one, other in zip(found, expected):
                assert np.abs(one[0] - other[row].permute(1, 2, 0).numpy()).max() < 1e-4


@pytest.mark.parametrize("name", ["rtmdet_lite0", "rtmdet_mnv4"])
def test_a_backbone_of_timm_in_eight_bits_says_the_same_in_litert(name, tmp_path):
    """lite0 pads as TensorFlow does, mnv4 has norms with and without an activation inside."""
    torch.manual_seed(0)
    model = create_model(name, 2).eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    model.size = (96, 160)
    images = torch.randint(0, 255, (1, 3, 96, 160), dtype=torch.uint8)
    small = model.quantise()
    calibrate_detector(small, [Batch(images, *(torch.tensor([[96, 160]]),) * 2, torch.arange(1))])
    detector = TFLiteDetector(export_tflite(small, tmp_path / "x.tflite"))
    x = small.network_input(images)
    with torch.no_grad():
        expected = small.core(x)
    for found, other in zip(detector.run(x[0].permute(1, 2, 0).numpy()), expected):
        assert np.abs(found[0] - other[0].permute(1, 2, 0).numpy()).max() < 1e-5


def test_an_onnx_file_in_eight_bits_says_what_torch_says_but_for_single_steps(trained, tmp_path):
    """Its maps (sums are rounded another way); which of many boxes alike is suppressed hangs on less than a step."""
    table = scenes(trained)
    model, _ = to_int8(load_model(trained / "run/weights/best.safetensors")[0], table)
    batch = next(iter(make_loader(table, size=(96, 160), divisor=32, batch_size=3, quiet=True)))
    x = model.eval().network_input(batch.images, batch.sizes)
    program = torch.onnx.export(QdqNetwork(model.core).eval(), (x,), dynamo=True, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    with torch.no_grad():
        expected = model.core(x)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    steps = [model.core.scale(name).item() for name in model.core.outputs]
    apart = np.concatenate([np.abs(a - b.numpy()).ravel() / step for a, b, step in zip(found, expected, steps)])
    assert apart.max() < 2.5 and (apart < 0.5).mean() > 0.98
    detector = OnnxDetector(export_onnx(model, tmp_path / "x.onnx"))
    assert detector.precision == "int8" and (tmp_path / "x.onnx").stat().st_size < 1_500_000
    assert np.abs(detector.infer(batch)[1][:, :1] - TorchDetector(model).infer(batch)[1][:, :1]).max() < 1e-5
    with pytest.raises(InputError, match="computes in int8, bf16 was requested"):
        OnnxDetector(tmp_path / "x.onnx", precision="bf16")


def test_a_training_in_eight_bits_goes_on_after_a_kill_bit_for_bit(tmp_path):
    """With ranges that still follow the maps when it is killed, in the middle of an epoch."""
    start = create_model("rtmdet_nano_relu", class_names=("tall", "wide"))
    start.size = (96, 128)
    save_weights(start, tmp_path / "float.safetensors")
    config = {"model": "rtmdet_nano_relu", "int8": True, "weights": str(tmp_path / "float.safetensors")}
    config |= {"checkpoint_steps": 2, "num_workers": 1, "schedule": "constant", "warmup": 0.0, "lr": 1e-3, "epochs": 3}
    straight, _ = work(tmp_path, "straight", config=config)
    assert straight.returncode == 0, straight.stderr[-2000:]
    killed, done = work(tmp_path, "killed", config=config, kill_after=5)
    assert killed.returncode == -9 and not done
    state = load_state(tmp_path / "killed/weights/last.pt")
    assert state["position"]["step"] == 4
    resumed, _ = work(tmp_path, "killed", config=config, resume=True)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    one, two = (load_state(tmp_path / name / "weights/last.pt")["model"] for name in ("straight", "killed"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    ends = load_model(tmp_path / "straight/weights/last.safetensors")[0].core
    assert not torch.equal(ends.high, to_int8(start, images(tmp_path / "images"))[0].core.high), "ranges have moved"


def test_an_update_that_is_left_out_leaves_the_ranges_as_they_were(trained, tmp_path):
    more = {"model": "rtmdet_nano_relu", "size": (96, 160), "passes_per_epoch": 2, "batch_size": 4, "tracker": "none"}
    more |= {"weights": str(trained / "run/weights/best.safetensors"), "int8": True, "epochs": 1, "device": "cpu"}
    trainer = Trainer(make_config(**more), tmp_path / "run", scenes(trained), scenes(trained))
    model = trainer.model.train()
    model.set_progress(0.1)
    before = [x.clone() for x in model.core.following()]
    assert len(before) == 2
    plain = model.loss_sums

    def broken(*args, **kwargs):
        terms, quality = plain(*args, **kwargs)
        terms["giou"].register_hook(lambda gradient: gradient * torch.inf)
        return terms, quality

    batches = next(chunks(trainer.loader, 1))
    model.loss_sums = broken
    trainer.train_step(batches)
    assert all(torch.equal(x, y) for x, y in zip(before, model.core.following()))
    model.loss_sums = plain
    trainer.train_step(batches)
    assert not all(torch.equal(x, y) for x, y in zip(before, model.core.following()))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"to": "tflite", "calibration_split": "val"}, "would see what the file is judged by"),
        ({"precision": "int8", "calibration_split": "test"}, "would see what the file is judged by"),
        ({"to": "tflite", "precision": "bf16"}, "not in bf16"),
        ({"to": "tflite", "batch": "4"}, "--batch is for ONNX; this is tflite in int8"),
        ({"to": "tflite", "device": "cuda"}, "--device is for ONNX"),
        ({"calibration": "percentile"}, "--calibration is for int8; this is onnx in fp32"),
        ({"to": "tflite", "min_score": 2.0}, "a score is between 0 and 1"),
    ],
)
def test_an_export_refuses_what_does_not_fit_its_kind(given, message):
    with pytest.raises(InputError, match=message):
        export("no-run", **given)


def test_a_training_in_eight_bits_needs_one_in_float(trained, tmp_path):
    config = make_config(model="rtmdet_nano_relu", int8=True, size=(96, 160), epochs=1, tracker="none", device="cpu")
    with pytest.raises(InputError, match="goes on from one in float"):
        Trainer(config, tmp_path / "run", scenes(trained), scenes(trained))


def test_a_file_of_mmengine_on_another_backbone_is_refused(tmp_path):
    state = {"bbox_head.rtm_cls.0.bias": torch.zeros(2)}
    torch.save({"meta": {"dataset_meta": {"CLASSES": ("a", "b")}}, "state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="another backbone than CSPNeXt"):
        load_model(tmp_path / "x.pth")
