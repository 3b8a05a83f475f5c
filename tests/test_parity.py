"""Our RT-DETR against transformers' on the same weights: every level, every token, every layer."""

import gc
from dataclasses import replace

import pytest
import torch

from neo_nb.models.rtdetr.convert import convert_state_dict, infer_config
from neo_nb.models.transformers_reference import reference_config
from neo_nb.models.zoo import VARIANTS, create_model

SIZES = [(640, 640), (1088, 1920)]  # (height, width)
CASES = [
    ("rtdetr_nano", "rt_detr"),
    ("rtdetr_r18", "rt_detr"),
    ("rtdetrv2_r18", "rt_detr_v2"),
    ("rtdetrv2_r34", "rt_detr_v2"),
    ("rtdetrv2_r50m", "rt_detr_v2"),
    ("rtdetr_r50", "rt_detr"),
    ("rtdetrv2_r101", "rt_detr_v2"),
    ("rtdetr_hgnetv2_l", "rt_detr"),
    ("rtdetrv2_hgnetv2_x", "rt_detr_v2"),
]


def make_peer(name: str, kind: str, sampling: str = "bilinear") -> torch.nn.Module:
    "transformers' network: random weights, statistics of its own activations, disturbed."
    from transformers import RTDetrForObjectDetection, RTDetrV2ForObjectDetection

    torch.manual_seed(0)
    config = reference_config(replace(VARIANTS[name], sampling=sampling), 80, kind)
    config.freeze_backbone_batch_norms = False  # the same arithmetic in evaluation
    peer = {"rt_detr": RTDetrForObjectDetection, "rt_detr_v2": RTDetrV2ForObjectDetection}[kind](config)
    norms = [m for m in peer.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.3, 0.8), norm.bias.normal_(0, 0.1)
            norm.momentum = None
        peer.train()(torch.rand(2, 3, 96, 160))
        for norm in norms:
            norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
        decoder = peer.model.decoder
        for head in (peer.model.enc_score_head, *decoder.class_embed):
            head.weight.normal_(0, 0.05)
        for head in (peer.model.enc_bbox_head, *decoder.bbox_embed):
            head.layers[-1].weight.normal_(0, 0.02)
        for layer in decoder.layers:
            for part in (layer.encoder_attn.sampling_offsets, layer.encoder_attn.attention_weights):
                part.weight.normal_(0, 0.05)
        peer.model.enc_output[0].bias.zero_()  # what is not usable, being 0, then scores lowest: theirs has no mask
    return peer.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    worst = (ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())  # of the largest value
    assert worst <= tolerance, f"{what} differs by {worst:.2e}"


@pytest.mark.parametrize("name, kind", CASES)
def test_the_network_is_that_of_transformers(name, kind):
    peer = make_peer(name, kind)
    tensors = convert_state_dict(peer.state_dict())
    inferred, config = infer_config(tensors, peer.config.to_dict()), VARIANTS[name]
    for key in ("backbone", "channels", "encoder_channels", "expansion", "decoder_layers", "eval_layers", "strides"):
        assert getattr(inferred, key) == getattr(config, key), key
    model = create_model(name, 80, blocks=3).eval()
    result = model.load_state_dict(tensors, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    seen = {}
    peer.model.encoder.register_forward_hook(lambda m, i, o: seen.update(maps=o.last_hidden_state))
    peer.model.enc_score_head.register_forward_hook(lambda m, i, o: seen.update(scores=o))
    for size in SIZES:
        check_size(model, peer, seen, size)
    gc.collect()


def test_discrete_sampling_is_that_of_transformers_where_theirs_is_right():
    """On squares: on wide inputs theirs clamps x to the height."""
    peer = make_peer("rtdetrv2_r18", "rt_detr_v2", "discrete")
    assert peer.config.decoder_method == "discrete"
    model = create_model("rtdetrv2_r18", 80, blocks=3, sampling="discrete").eval()
    result = model.load_state_dict(convert_state_dict(peer.state_dict()), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    seen = {}
    peer.model.encoder.register_forward_hook(lambda m, i, o: seen.update(maps=o.last_hidden_state))
    peer.model.enc_score_head.register_forward_hook(lambda m, i, o: seen.update(scores=o))
    check_size(model, peer, seen, (640, 640))


@torch.no_grad()
def check_size(model, peer, seen, size) -> None:
    torch.manual_seed(1)
    images = torch.rand(1, 3, *size)
    theirs = peer(images)
    maps = model.encoder(model.backbone(images))
    for stride, a, b in zip(model.config.strides, maps, seen["maps"]):
        close(a, b, f"the encoder's map of stride {stride}")
    decoder, rows = model.decoder, {}
    memory, shapes = decoder.flatten_levels(maps)
    anchors, usable, _ = decoder.anchors_and_masks(shapes, None, memory.device)
    chosen = seen["scores"].max(-1).values.topk(model.num_queries, 1).indices  # as theirs takes them

    def choose(logits, usable):
        rows["scores"], rows["ours"] = logits, type(decoder).topk_tokens(decoder, logits, usable)
        return chosen

    decoder.topk_tokens, decoder.training = choose, True  # all layers answer; norms inside stay in evaluation
    out = decoder(maps)
    decoder.training = False
    del decoder.topk_tokens
    close(rows["scores"][:, usable[0]], seen["scores"][:, usable[0]], "the class scores of all tokens")
    assert usable[0, chosen[0]].all(), "theirs took a token that is not usable: the comparison would be void"
    best = seen["scores"].max(-1).values[0]
    edge = best[chosen[0, -1]]
    for token in set(rows["ours"][0].tolist()) ^ set(chosen[0].tolist()):
        assert (best[token] - edge).abs() < 1e-4, "other queries were selected"
    close(out.proposal_logits, theirs.enc_topk_logits, "the selected queries' logits")
    close(
        out.proposal_boxes,
        theirs.enc_topk_bboxes.sigmoid()
        if theirs.enc_topk_bboxes.max() > 1 or theirs.enc_topk_bboxes.min() < 0
        else theirs.enc_topk_bboxes,
        "the selected queries' boxes",
    )
    for layer in range(len(decoder.layers)):
        close(out.logits[layer], theirs.intermediate_logits[:, layer], f"layer {layer}'s logits")
        close(out.boxes[layer], theirs.intermediate_reference_points[:, layer], f"layer {layer}'s boxes")
    assert out.boxes[-1].std() > 0.01 and out.logits[-1].std() > 0.01
