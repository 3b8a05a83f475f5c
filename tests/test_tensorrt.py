"""Engines built without a GPU, at full HD, for three cards; and everything that must not be opened."""

import json
import shutil

import pytest
import torch
from command import neo as command
from test_export import opinionated
from test_runs import QUIET, place

from neo_nb.base.core import InputError
from neo_nb.base.devices import find_card
from neo_nb.deploy import tensorrt_build
from neo_nb.deploy.detector import load_detector
from neo_nb.deploy.half import to_half
from neo_nb.deploy.onnx import export_onnx
from neo_nb.deploy.tensorrt_build import build_engine, check_engine, find_builder, import_builder, read_engine, sidecar
from neo_nb.models.zoo import create_model

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is for Linux on x86-64")
CARDS = {"t4": (7, 5), "rtx4000_ada": (8, 9), "sm120": (12, 0)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "An R18 at 1088x1920 in fp32 and in fp16."
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    full = export_onnx(create_model("rtdetrv2_r18", 2).eval(), folder / "full.onnx", size=(1080, 1920), opset=17)
    return full, to_half(full, folder / "half.onnx")


@pytest.mark.parametrize("target", CARDS)
def test_an_engine_of_full_hd_is_built_without_the_card(files, tmp_path, target):
    built = build_engine(files[1], tmp_path / "model.engine", target, progress=False)
    assert built.capability == CARDS[target] and built.flavour == "tensorrt_rtx" and built.size_bytes > 40e6
    log = (tmp_path / "model.engine.log").read_text().lower()
    assert "error" not in log and "fp32 gemm" not in log and "exception" not in log
    known = read_engine(tmp_path / "model.engine")
    assert known == built and known.record["size"] == [1080, 1920] and known.batch == (1, 1, 1)


def test_a_t4_is_not_given_products_in_fp32(files, tmp_path):
    with pytest.raises(InputError, match="SM75 cannot multiply matrices in fp32.*--precision fp16"):
        build_engine(files[0], tmp_path / "model.engine", "t4")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="not for SM110; copy the ONNX file"):
        build_engine(files[1], tmp_path / "model.engine", "jetson_thor")
    with pytest.raises(InputError, match="ends in .engine"):
        build_engine(files[1], tmp_path / "model.plan", "t4")
    (tmp_path / "torn.onnx").write_bytes(files[1].read_bytes()[:100_000])
    with pytest.raises(InputError, match="not a whole ONNX file"):
        build_engine(tmp_path / "torn.onnx", tmp_path / "model.engine", "t4")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A folder with a small engine for a T4, beside the file it was built from."
    folder = tmp_path_factory.mktemp("small")
    full = export_onnx(opinionated("rtdetr_nano"), folder / "full.onnx", size=(64, 96), data="cells")
    build_engine(to_half(full, folder / "half.onnx"), folder / "half.engine", "t4", progress=False)
    return folder


@pytest.fixture
def engine(small, tmp_path):
    shutil.copytree(small, tmp_path / "files")
    return tmp_path / "files/half.engine"


class Card:
    name, memory_gb, count = "a card of the test", 16, 1

    def __init__(self, *capability):
        self.capability = capability


def test_an_engine_for_another_card_version_or_file_is_refused_before_it_is_loaded(engine, monkeypatch):
    if find_card() is None:
        with pytest.raises(InputError, match=r"for SM75 \(t4\), and no GPU is here"):
            load_detector(engine)
    monkeypatch.setattr(tensorrt_build, "find_card", lambda: Card(8, 9))
    with pytest.raises(InputError, match=r"for SM75 \(t4\); this is a card of the test, SM89"):
        load_detector(engine)
    monkeypatch.setattr(tensorrt_build, "find_card", lambda: Card(7, 5))
    assert check_engine(engine).capability == (7, 5)
    monkeypatch.setattr(tensorrt_build, "import_builder", lambda name: None)
    with pytest.raises(InputError, match="made by tensorrt_rtx .*; here is none"):
        load_detector(engine)
    monkeypatch.undo()
    source = engine.with_name("half.onnx")
    source.write_bytes(source.read_bytes() + b"\0")
    with pytest.raises(InputError, match="built from another file than half.onnx"):
        check_engine(engine)


def test_a_torn_changed_or_bare_engine_is_refused(engine, tmp_path):
    whole = engine.read_bytes()
    for damage, told in (
        (whole[:-5], "not whole"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "not those that were built"),
    ):
        engine.write_bytes(damage)
        with pytest.raises(InputError, match=told):
            load_detector(engine)
    for text in ("{", "[]", '{"target": 1}', json.dumps(json.loads(sidecar(engine).read_text()) | {"more": 1})):
        sidecar(engine).write_text(text)
        with pytest.raises(InputError, match="not what build_engine wrote"):
            load_detector(engine)
    sidecar(engine).unlink()
    with pytest.raises(InputError, match="half.engine.json is missing"):
        load_detector(engine)


def test_the_builder_is_the_one_for_the_card():
    assert find_builder((8, 9)).flavour == "tensorrt_rtx"
    assert import_builder("no_such_builder") is None


def test_from_the_shell_an_engine_is_built_of_a_file(small, tmp_path):
    folder = place(tmp_path / "workspace")
    shutil.copy(small / "half.onnx", folder / "model.onnx")

    def neo(*words):
        ended = command(*map(str, words), cwd=folder, **QUIET)
        return ended.returncode, ended.stdout + ended.stderr

    code, told = neo("export", "model.onnx", "--to", "tensorrt", "--target", "t4")
    assert code == 0, told
    run = next(folder.glob("reports/0001-*"))
    known = json.loads((run / "engine.json").read_text())
    assert known["for"] == "t4, SM75" and (run / known["file"]).is_file() and "trtexec --onnx=" in known["trtexec"]
    assert known["verdict"] == "not run here" and "neo evaluate" in known["told"]
    assert "SM75" in (run / "report.html").read_text()
    for words, message in (
        (("--to", "tensorrt", "--target", "jetson_thor"), "not for SM110"),
        (("--to", "tensorrt", "--target", "t5"), "no such target"),
        (("--to", "tensorrt", "--precision", "int8"), "fp32 and fp16, not in int8"),
    ):
        code, told = neo("export", "model.onnx", *words)
        assert code == 2 and message in told, told
    assert len(list(folder.glob("reports/0*"))) == 1
