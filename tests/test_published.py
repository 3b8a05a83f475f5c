"""Checkpoints of others, end to end: what transformers saves and what the reference implementation saves."""

import json
import re

import pytest
import torch
from test_cli import coco, neo, refused, workplace  # noqa: F401  fixtures

from neo_nb.base.core import InputError
from neo_nb.deploy import load_detector
from neo_nb.models import create_model, load_weights
from neo_nb.models.transformers_reference import reference_config
from neo_nb.models.weights import load_model
from neo_nb.models.zoo import VARIANTS

LEVELS = {"8": 0, "16": 1, "32": 2}
REFERENCE = [  # our names -> the reference's, as its source has them
    (r"^backbone\.stem\.(\d)\.([01])\.", lambda m: f"backbone.conv1.conv1_{int(m[1]) + 1}.{part(m[2])}."),
    (
        r"^backbone\.stages\.(\d)\.(\d+)\.branch\.(\d)\.([01])\.",
        lambda m: f"backbone.res_layers.{m[1]}.blocks.{m[2]}.branch2{'abc'[int(m[3])]}.{part(m[4])}.",
    ),
    (
        r"^backbone\.stages\.(\d)\.(\d+)\.shortcut\.1\.([01])\.",
        lambda m: f"backbone.res_layers.{m[1]}.blocks.{m[2]}.short.conv.{part(m[3])}.",
    ),
    (
        r"^backbone\.stages\.(\d)\.(\d+)\.shortcut\.([01])\.",
        lambda m: f"backbone.res_layers.{m[1]}.blocks.{m[2]}.short.{part(m[3])}.",
    ),
    (r"^(encoder|decoder)\.project\.(\d+)\.([01])\.", lambda m: f"{m[1]}.input_proj.{LEVELS[m[2]]}.{part(m[3])}."),
    (r"^encoder\.lateral\.(\d+)\.([01])\.", lambda m: f"encoder.lateral_convs.{2 - LEVELS[m[1]]}.{part(m[2])}."),
    (r"^encoder\.down\.(\d+)\.([01])\.", lambda m: f"encoder.downsample_convs.{LEVELS[m[1]] - 1}.{part(m[2])}."),
    (r"^encoder\.fuse_top_down\.(\d+)\.", lambda m: f"encoder.fpn_blocks.{1 - LEVELS[m[1]]}."),
    (r"^encoder\.fuse_bottom_up\.(\d+)\.", lambda m: f"encoder.pan_blocks.{LEVELS[m[1]] - 1}."),
    (r"(blocks\.\d)\.deep\.0\.([01])\.", lambda m: f"{m[1]}.conv1.{part(m[2])}."),
    (r"(blocks\.\d)\.short\.([01])\.(?=weight|bias|run|num)", lambda m: f"{m[1]}.conv2.{part(m[2])}."),
    (r"(blocks\.\d)\.out\.([01])\.", lambda m: f"{m[1]}.conv3.{part(m[2])}."),
    (
        r"(blocks\.\d)\.deep\.(\d)\.conv([13])\.([01])\.",
        lambda m: f"{m[1]}.bottlenecks.{int(m[2]) - 1}.conv{1 if m[3] == '3' else 2}.{part(m[4])}.",
    ),
    (r"^encoder\.aifi\.", "encoder.encoder.0.layers.0."),
    (r"^decoder\.layers\.", "decoder.decoder.layers."),
    (r"\.attention\.out\.", ".self_attn.out_proj."),
    (r"\.cross\.offsets\.", ".cross_attn.sampling_offsets."),
    (r"\.cross\.weights\.", ".cross_attn.attention_weights."),
    (r"\.cross\.value\.", ".cross_attn.value_proj."),
    (r"\.cross\.out\.", ".cross_attn.output_proj."),
    (r"\.enc_output\.([01])\.", lambda m: f".enc_output.{'proj' if m[1] == '0' else 'norm'}."),
    (r"\.enc_score\.", ".enc_score_head."),
    (r"\.enc_box\.(\d)\.", lambda m: f".enc_bbox_head.layers.{int(m[1]) // 2}."),
    (r"\.score\.", ".dec_score_head."),
    (r"decoder\.box\.(\d)\.(\d)\.", lambda m: f"decoder.dec_bbox_head.{m[1]}.layers.{int(m[2]) // 2}."),
    (r"\.query_position\.(\d)\.", lambda m: f".query_pos_head.layers.{int(m[1]) // 2}."),
    (r"\.denoising_class\.", ".denoising_class_embed."),
]


def part(digit: str) -> str:
    return "conv" if digit == "0" else "norm"


def in_reference_names(model) -> dict[str, torch.Tensor]:
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    for key in [k for k in state if ".attention.query_key." in k]:
        kind = key.rsplit(".", 1)[1]
        joined = torch.cat([state.pop(key), state.pop(key.replace("query_key", "value"))])
        state[key.replace(f"attention.query_key.{kind}", f"self_attn.in_proj_{kind}")] = joined
    out = {}
    for key, value in state.items():
        for pattern, to in REFERENCE:
            key = re.sub(pattern, to, key)
        out[key] = value
    more = {"decoder.anchors": torch.zeros(1, 8, 4), "decoder.valid_mask": torch.ones(1, 8, 1)}
    more["decoder.decoder.layers.0.cross_attn.num_points_scale"] = torch.ones(12)
    return out | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "What transformers saves: a small RT-DETRv2 that knows `cell` among five classes."
    from transformers import RTDetrV2ForObjectDetection

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hub")
    config = reference_config(VARIANTS["rtdetr_nano"], 5)
    config.id2label = {i: name for i, name in enumerate(["a", "b", "cell", "d", "e"])}
    config.label2id = {name: i for i, name in config.id2label.items()}
    RTDetrV2ForObjectDetection(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pth(tmp_path_factory):
    "What the reference implementation saves, with one class."
    torch.manual_seed(0)
    model = create_model("rtdetr_nano", class_names=("cell",)).eval()
    path = tmp_path_factory.mktemp("reference") / "checkpoint0071.pth"
    torch.save({"last_epoch": 71, "model": {"x": torch.ones(1)}, "ema": {"module": in_reference_names(model)}}, path)
    return path, model


def test_a_folder_of_transformers_gives_what_it_knows_by_name(folder):
    model = create_model("rtdetr_nano", class_names=("person", "cell"), blocks=3)
    fresh = model.decoder.enc_score.weight.clone()
    with pytest.raises(InputError, match=r"1 fit by name \(cell\), 1 do not \(person\); choose --classes by-name"):
        load_weights(model, folder)
    report = load_weights(model, folder, classes="by-name")
    theirs, _ = load_model(folder)
    assert torch.equal(model.decoder.enc_score.weight[1], theirs.decoder.enc_score.weight[2])
    assert torch.equal(model.decoder.enc_score.weight[0], fresh[0])
    assert not report.fresh and not report.unused and report.by_class, str(report)
    assert report.fresh_classes == ("0 person",) and "1 classes begin fresh (0 person)" in str(report)


def test_placeholder_names_of_transformers_go_by_position_and_predict_what_theirs_predict(tmp_path):
    from transformers import RTDetrV2ForObjectDetection

    torch.manual_seed(0)
    theirs = RTDetrV2ForObjectDetection(reference_config(VARIANTS["rtdetr_nano"], 80)).eval()
    torch.nn.init.normal_(theirs.model.enc_score_head.weight, std=0.3)
    for head in theirs.model.decoder.class_embed:
        torch.nn.init.normal_(head.weight, std=0.3)
    theirs.save_pretrained(tmp_path)
    labels = json.loads((tmp_path / "config.json").read_text())["id2label"]
    assert labels["0"] == "LABEL_0" and len(labels) == 80
    for names in ({"num_classes": 80}, {"class_names": [f"thing {i}" for i in range(80)]}):
        model = create_model("rtdetr_nano", **names, blocks=3).eval()
        report = load_weights(model, tmp_path)
        assert (report.classes, report.fresh, report.fresh_classes, report.unused) == ("by position", (), (), ())
        images = torch.rand(2, 3, 96, 160)
        with torch.no_grad():
            ours, predicted = model(images), theirs(pixel_values=images)
        torch.testing.assert_close(ours.logits, predicted.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.boxes, predicted.pred_boxes, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match=r"its classes are LABEL_0, LABEL_1, .*\(80\), the model's class_0.*\(3\)"):
        load_weights(create_model("rtdetr_nano", 3), tmp_path)


@pytest.mark.parametrize("wrap", ["plain", "model", "ema"])
def test_the_references_layout_comes_back_whole(tmp_path, pth, wrap):
    model, names = pth[1], in_reference_names(pth[1])
    kinds = {"plain": names, "model": {"model": names}, "ema": {"ema": {"module": names}, "model": {}}}
    torch.save(kinds[wrap], tmp_path / "x.pth")
    back, record = load_model(tmp_path / "x.pth")
    assert record["unnamed"] and back.config.backbone == "resnet_nano"
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def test_heads_without_names_stay_fresh_only_when_asked_and_are_named(pth):
    model = create_model("rtdetr_nano", class_names=("person", "head"))
    with pytest.raises(InputError, match=r"without names \(1 of them\).* choose --classes fresh \(all begin fresh\)"):
        load_weights(model, pth[0])
    report = load_weights(model, pth[0], classes="fresh")
    assert report.fresh_classes == ("0 person", "1 head")
    heads = [name for name in model.state_dict() if re.search(r"enc_score|decoder\.score|denoising_class", name)]
    assert set(report.fresh) == set(heads) and set(report.unused) == set(heads)
    assert "decoder.enc_score.weight" in str(report)


def test_every_key_without_a_place_is_named(tmp_path, pth):
    names = in_reference_names(pth[1]) | {"decoder.something.new": torch.ones(3)}
    names.pop("encoder.lateral_convs.0.conv.weight")
    torch.save(names, tmp_path / "x.pth")
    report = load_weights(create_model("rtdetr_nano", class_names=("cell",)), tmp_path / "x.pth")
    assert report.unused == ("decoder.something.new",) and report.fresh == ("encoder.lateral.32.0.weight",)
    with pytest.raises(InputError, match="encoder.lateral.32.0.weight is missing"):
        load_detector(tmp_path / "x.pth")


def test_both_are_evaluated_and_fine_tuned_from_the_shell(neo, workplace, folder, pth):  # noqa: F811
    data = coco(workplace / "one")
    for path in (folder, pth[0]):
        status, out, err = neo("evaluate", path, "--data", data, "--json")
        assert status == 0, err
        assert "AP" in json.loads(out), out
    words = ["--epochs", "1", "--size", "96", "160", "--tracker", "none", "--batch-size", "1"]
    status, out, err = neo("train", "--data", data, "--model", "rtdetr_nano", "--weights", pth[0], *words)
    assert status == 0, err
    status, out, err = neo("train", "--data", data, "--model", "rtdetr_nano", "--weights", folder, *words)
    assert status == 0, err  # `cell` is one of theirs
    choice = ["--classes", "fresh"]
    status, out, err = neo("train", "--data", data, "--model", "rtdetr_nano", "--weights", folder, *choice, *words)
    assert "1 classes begin fresh (0 cell)" in out + err
    assert status == 0, err  # three blocks there, one here: what fits is taken, the rest is named


@pytest.mark.parametrize("kind", ["cut", "code", "other", "hub"])
def test_what_cannot_be_read_is_one_line(neo, workplace, pth, kind, monkeypatch):  # noqa: F811
    data, path = coco(workplace / "one"), workplace / "x.pth"
    if kind == "cut":
        path.write_bytes(pth[0].read_bytes()[:5000])
    elif kind == "code":
        torch.save({"model": print}, path)
    elif kind == "other":
        (workplace / "bert").mkdir()
        (workplace / "bert" / "config.json").write_text("{}")
        path = workplace / "bert"
    if kind == "hub":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(InputError, match="cannot be fetched from the hub"):
            load_weights(create_model("rtdetr_nano", 1), "nobody/nothing")
        return
    status, out, err = neo("evaluate", path, "--data", data)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
