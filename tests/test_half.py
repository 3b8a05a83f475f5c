"""Half precision: what is in fp16, what is not, and that a rounding lands where a GPU would have it."""

import json

import numpy as np
import onnx
import pytest
import torch
from test_export import SIZE, opinionated, photos

from neo_nb.base.boxes import box_iou
from neo_nb.base.core import InputError
from neo_nb.deploy.detector import TorchDetector, load_detector
from neo_nb.deploy.half import PRODUCTS, check_half, emulate_half, emulated_detector, half_graph, to_half
from neo_nb.deploy.onnx import compare, export_onnx
from neo_nb.deploy.tensorrt_build import build_engine, import_builder
from neo_nb.models.zoo import create_model

LYING, UPRIGHT = (96, 160), (160, 96)


def types(proto: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return found | {c.name: c.data_type for c in graph.initializer}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("rtdetr_nano", UPRIGHT),
        ("detr_nano", UPRIGHT),
        ("dinov3_rtdetr_nano", LYING),
        ("rtmdet_nano", LYING),
        ("yolox_nano", UPRIGHT),
    ],
)
def test_products_are_in_fp16_and_coordinates_in_fp32(tmp_path, name, size):
    torch.manual_seed(0)
    model = create_model(name, 2).eval()
    batch = 1 if size == LYING else "dynamic"
    full = export_onnx(model, tmp_path / "full.onnx", size=size, batch=batch, opset=17 if batch == 1 else 18)
    half = to_half(full, tmp_path / "half.onnx")
    proto, known = onnx.load(half), types(onnx.load(half))
    operations = [node.op_type for node in proto.graph.node]
    assert operations.count("LayerNormalization") == [n.op_type for n in onnx.load(full).graph.node].count(
        "LayerNormalization"
    )
    for node in proto.graph.node:
        kinds = {known[name] for name in node.input if known.get(name) in (1, 10)}
        if node.op_type in PRODUCTS:
            assert kinds == {10}, node.name
        if node.op_type in ("GridSample", "Sin", "Cos", "CumSum"):
            assert kinds <= {1}, node.name
    assert [known[o.name] for o in proto.graph.output] == [1, 1, 7]
    constants = [onnx.numpy_helper.to_array(c) for c in proto.graph.initializer]
    assert all(np.isfinite(c).all() for c in constants if c.dtype.kind == "f")
    named = json.loads({p.key: p.value for p in proto.metadata_props}["kept_fp32"])
    assert set(named) < {node.name for node in proto.graph.node}
    assert half.stat().st_size < 0.56 * full.stat().st_size or name in ("rtmdet_nano", "yolox_nano")
    images = [np.random.default_rng(0).integers(0, 255, (*s, 3), np.uint8) for s in (size, (50, 70), (200, 60))]
    found = emulated_detector(half).detect_images(images)
    assert np.isfinite(found.boxes_xyxy).all() and np.isfinite(found.scores).all()
    if import_builder("tensorrt_rtx"):  # the oldest card has the fewest kernels
        built = build_engine(half, tmp_path / "half.engine", "t4", batch=(1, 2, 8), progress=False)
        assert built.batch == ((1, 1, 1) if batch == 1 else (1, 2, 8))


def test_a_coordinate_is_not_rounded(tmp_path):
    model = opinionated("rtdetr_nano")
    half = to_half(export_onnx(model, tmp_path / "full.onnx", size=SIZE), tmp_path / "half.onnx")
    found = compare(
        TorchDetector(model, SIZE).detect_images(photos(8)),
        emulated_detector(half).detect_images(photos(8)),
        min_score=0.02,
    )
    # heads drawn at random spread a rounding over the scores; boxes of pairs stay where they are
    assert found["agreement"] > 0.95 and found["iou"] > 0.9999, found


def test_a_rounding_that_would_be_lost_on_a_cpu_is_in_the_emulated_graph(tmp_path):
    full = export_onnx(opinionated("rtdetr_nano"), tmp_path / "full.onnx", size=SIZE)
    half = to_half(full, tmp_path / "half.onnx")
    scores = [d.detect_images(photos(2)).scores for d in (load_detector(full), load_detector(half))]
    emulated = emulated_detector(half).detect_images(photos(2)).scores
    near, far = (np.abs(np.sort(scores[0]) - np.sort(x)).max() for x in (scores[1], emulated))
    assert far > near, "ONNX Runtime forgets roundings in between on a CPU"


def test_what_is_wrong_is_said(tmp_path):
    full = export_onnx(create_model("rtdetr_nano", 2).eval(), tmp_path / "full.onnx", size=(64, 64))
    with pytest.raises(InputError, match="is in fp32, which a T4 has no kernel for"):
        check_half(onnx.load(full))
    half = to_half(full, tmp_path / "half.onnx")
    with pytest.raises(InputError, match="in fp16 already"):
        to_half(half, tmp_path / "x.onnx")
    with pytest.raises(InputError, match="the file is in fp32"):
        emulated_detector(full)
    proto = onnx.load(full)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(InputError, match="without our record"):
        to_half(tmp_path / "bare.onnx", tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_infinities_and_what_is_too_large_are_clamped_and_counted():
    make = onnx.helper
    values = np.array([np.inf, -np.inf, 1e6, 1.0], np.float32)
    nodes = [
        make.make_node("Add", ["a", "c"], ["m"], name="mask"),
        make.make_node("MatMul", ["m", "w"], ["b"], name="p"),
    ]
    constants = [
        onnx.numpy_helper.from_array(values, "c"),
        onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"),
    ]
    value = [make.make_tensor_value_info(n, 1, [1, 4]) for n in "ab"]
    graph = make.make_graph(nodes, "g", value[:1], value[1:], constants)
    half, report = half_graph(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=8))
    assert report["clamped"] == 3
    check_half(half)
    onnx.checker.check_model(emulate_half(half), full_check=True)


def test_overlaps_of_large_boxes_are_compared_in_fp32(tmp_path):
    """Areas of 182 x 182 pixels add up to more than fp16 holds; suppression must not notice."""
    torch.manual_seed(0)
    model = create_model("rtmdet_nano", 2).eval()
    for layer in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias, std=0.5)
    half = to_half(export_onnx(model, tmp_path / "full.onnx", size=(96, 160)), tmp_path / "half.onnx")
    proto, known = onnx.load(half), types(onnx.load(half))
    compared = [n for n in proto.graph.node if n.op_type in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")]
    assert compared and not any(known.get(name) == 10 for node in compared for name in node.input)
    rng = np.random.default_rng(0)
    found = emulated_detector(half).detect_images([rng.integers(0, 255, (1080, 1800, 3), np.uint8)])
    for label in range(2):
        boxes = found.boxes_xyxy[found.labels == label].astype(np.float64)
        overlap = np.triu(box_iou(boxes, boxes), 1)
        assert not len(boxes) or overlap.max() < 0.7, overlap.max()
