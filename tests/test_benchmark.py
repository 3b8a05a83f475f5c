"""The benchmark's structure; never its times."""

import json
from pathlib import Path

from test_cli import neo, refused, workplace  # noqa: F401  fixtures

from neo_nb.models import create_model, save_weights
from neo_nb.runs.run import execute, new_run


def test_compare_measures_every_side_of_every_case(workplace):  # noqa: F811
    run = new_run(data="transformers", model="nano", kind="benchmark")
    settings = {"model": "rtdetr_nano", "sizes": [[64, 96]], "objects": [5], "rounds": 2}
    execute("benchmark_transformers", run, settings)
    found = json.loads((run / "benchmark.json").read_text())
    sides = {(row["what"], row["competitor"]) for row in found["ratios"]}
    assert {side for what, side in sides if what == "inference"} == {
        "transformers",
        "transformers, channels last",
        "ours",
        "ours, deployed",
        "ours, ONNX Runtime",
    }
    assert {what for what, _ in sides} == {
        "inference",
        "training, 5 objects, norms trained",
        "training, 5 objects, norms frozen",
    }
    assert all(row["ratio"] == 1 for row in found["ratios"] if row["competitor"] == "transformers")
    assert all(row["transformers, MiB"] > 0 and row["ours, MiB"] > 0 for row in found["memory"])
    assert (run / "report.html").exists() and (run / "plots" / "ratios.svg").exists()


def test_artifacts_are_timed_alone_and_whole(neo, workplace):  # noqa: F811
    model = create_model("rtdetr_nano", 2)
    model.size = (64, 96)
    save_weights(model, workplace / "a.safetensors")
    few = ("--rounds", "3", "--batches", "1", "2", "--clients", "1", "2", "--photo", "90", "160")
    status, out, err = neo("benchmark", workplace / "a.safetensors", *few, "--json")
    assert status == 0, err
    found = json.loads(out)
    stages = ["decode", "preprocess", "inference", "postprocess", "whole"]
    assert [(row["batch"], row["stage"]) for row in found["stages"]] == [(n, s) for n in (1, 2) for s in stages]
    assert all(0 < row["p50"] <= row["p90"] <= row["p99"] <= row["max"] for row in found["stages"])
    assert [row["clients"] for row in found["throughput"]] == [1, 2]
    assert "several clients" in (Path(found["run"]) / "report.html").read_text().lower()
    refused(neo("benchmark"), "nothing to time", "--against transformers")
