"""What eight bits cost and what training in them wins back, with several seeds: the figures of `neo edge`.

    python tests/edge_seeds.py FOLDER [SEED ...] [--sizes 192 320] [--epochs 16] [--jobs 2]

runs `neo edge --data bccd --model rtmdet_nano_relu` for each size (a square) and seed, in a workspace under FOLDER, one
core each. Killed and called again, it goes on with what is left. It writes edge-seeds.md, .csv and .png into FOLDER."""

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from neo_nb.base.core import atomic_write

ROOT = Path(__file__).parents[1]
ORDER = ["float", "int8, calibrated", "int8, trained"]


def neo(folder: Path, log: Path, *words: object) -> None:
    "A command in the workspace, on one core."
    known = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NEO_REPORTS": str(folder / "reports")}
    command = [
        sys.executable,
        "-c",
        "import sys; from neo_nb.cli.main import main; sys.exit(main())",
        *map(str, words),
    ]
    with log.open("a") as out:
        ended = subprocess.run(command, cwd=folder, env=known, stdout=out, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise SystemExit(f"neo {words[0]} ended with {ended.returncode}; see {log}")


def run_one(folder: Path, size: int, seed: int, model: str, epochs: int | None) -> pd.DataFrame:
    "One run, or what is there of it."
    place, log = folder / f"{size}-{seed}", folder / f"{size}-{seed}.log"
    if not (place / "settings.ini").is_file():
        place.mkdir(parents=True, exist_ok=True)
        neo(folder, log, "init", place)
    done = next(iter(sorted(place.glob("reports/*/edge.csv"))), None)
    if done is None:
        begun = next(iter(sorted(place.glob("reports/*-edge-*"))), None)
        words = ["--data", "bccd", "--model", model, "--size", size, size, "--seed", seed, "--target", "cpu"]
        words += ["--epochs", epochs] if epochs else []
        neo(place, log, "edge", *(["--resume", begun.name] if begun else words))
        done = next(iter(sorted(place.glob("reports/*/edge.csv"))))
    rows = pd.read_csv(done)
    rows[["kind", "runtime"]] = rows["detector"].str.split(": ", expand=True)
    return rows.assign(size=size, seed=seed)


def table_of(rows: pd.DataFrame) -> pd.DataFrame:
    "Means over the seeds, with what each step lost against float in the same runtime and seed."
    base = rows[rows.kind == "float"].set_index(["size", "seed", "runtime"])[["AP", "AP50"]]
    both = rows.join(base.add_suffix(" float"), on=["size", "seed", "runtime"])
    for name in ("AP", "AP50"):
        both[f"{name} lost"] = both[f"{name} float"] - both[name]
    groups = both.groupby(["size", "kind", "runtime"])
    means = groups[["AP", "AP50", "F1", "AP lost", "AP50 lost", "MB", "to boxes, ms", "network, ms"]].mean()
    worst = groups[["AP lost", "AP50 lost"]].max().add_suffix(", most")
    return means.join(worst).reindex(ORDER, level="kind")


def plot(rows: pd.DataFrame, path: Path) -> None:
    "AP of the TFLite files, a line per seed."
    sizes = sorted(rows["size"].unique())
    figure, panels = plt.subplots(1, len(sizes), figsize=(3.6 * len(sizes), 2.8), layout="constrained", squeeze=False)
    for panel, size in zip(panels[0], sizes):
        some = rows[(rows["size"] == size) & (rows.runtime == "LiteRT")]
        for _, own in some.groupby("seed"):
            panel.plot(ORDER, own.set_index("kind").loc[ORDER, "AP"], "o-", color="#0b6e99", lw=1.2, ms=4)
        panel.set(title=f"{size} x {size}", ylabel="AP of the TFLite file")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[192, 320], help="sides of squares, pixels")
    parser.add_argument("--model", default="rtmdet_nano_relu")
    parser.add_argument("--epochs", type=int, help="of the training in float; the recipe's when not given")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    jobs = [(size, seed) for size in asked.sizes for seed in asked.seeds]
    with ThreadPoolExecutor(asked.jobs) as pool:
        parts = pool.map(lambda job: run_one(asked.folder.absolute(), *job, asked.model, asked.epochs), jobs)
        rows = pd.concat(list(parts), ignore_index=True)
    rows.to_csv(asked.folder / "edge-seeds.csv", index=False, float_format="%.5g")
    plot(rows, asked.folder / "edge-seeds.png")
    text = [f"{asked.model} on bccd (test), {len(asked.seeds)} seeds; means, and the most that any seed lost:", ""]
    text += [table_of(rows).round(4).reset_index().to_markdown(index=False), ""]
    whole = rows[rows.kind != "float"].groupby(["size", "seed", "kind"])["AP"]
    text += [
        f"The three runtimes of a file in eight bits are {(whole.max() - whole.min()).max():.4f} AP apart at most.",
        "",
    ]
    text += [f"    python {shlex.join(['tests/edge_seeds.py', *sys.argv[1:]])}"]
    with atomic_write(asked.folder / "edge-seeds.md") as path:
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
