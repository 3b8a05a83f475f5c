"""Whether `neo tune` beats the default in equal total time, on drawn scenes.

    python tests/worth_tuning.py FOLDER [SEED ...] [--trials 8] [--epochs 5]

tunes `rtdetr_nano` on scenes at 180 x 320, then trains the default, and the best settings, for as many updates as all
trials together, and measures on `test`, which chose nothing. Updates stand for time: they cost the same whatever the
settings, and other work on the machine does not change them. Killed and called again, it goes on with what is left.
It writes tuning.md, .csv and .png into FOLDER; three seeds take some two hours of two quiet cores."""

import argparse
import shlex
import sys
from pathlib import Path

import pandas as pd

from neo_nb.base.core import atomic_write
from neo_nb.data.manifest import load_dataset
from neo_nb.recipes.study_page import plot_study, write_study
from neo_nb.recipes.tune import hold_against, tune, verdict
from neo_nb.runs.curves import save_figure
from neo_nb.train.config import make_config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5, help="length of a trial: evaluations, each after one pass")
    parser.add_argument("--size", type=int, nargs=2, default=[180, 320])
    asked = parser.parse_args()
    tables = tuple(load_dataset("scenes", split) for split in ("train", "val", "test"))
    rows, said = [], []
    for seed in asked.seeds:
        config = make_config(
            model="rtdetr_nano", size=asked.size, batch_size=8, epochs=asked.epochs, passes_per_epoch=1, no_aug_epochs=1,
            device="cpu", seed=seed,
        )  # fmt: skip
        run = asked.folder / f"seed-{seed}"
        study = tune(config, run, *tables[:2], trials=asked.trials)
        scores = hold_against(study, config, run, tables) if study else None
        if scores is None:
            sys.exit("stopped; called again, it goes on")
        found = write_study(study, config, run, "neo train --data scenes --model rtdetr_nano", scores, "test")
        rows += [{"seed": seed, "who": name, **row} for name, row in scores.items()]
        said.append(f"- seed {seed}: {verdict(scores)} Found: `{found['command']}`")
        save_figure(plot_study(study, run, "AP"), asked.folder / "tuning.png")
    frame = pd.DataFrame(rows)
    frame.to_csv(asked.folder / "tuning.csv", index=False, float_format="%.5g")
    table = frame.pivot(index="who", columns="seed", values="AP").reindex(frame.who.unique())
    table["mean"] = table.mean(axis=1)
    command = f"    python {shlex.join(['tests/worth_tuning.py', *sys.argv[1:]])}"
    text = ["# Tuning beside the default in equal total time", "", f"AP on scenes' test split, {asked.trials} trials:"]
    text += ["", table.round(3).to_markdown(), "", *said, "", command]
    with atomic_write(asked.folder / "tuning.md") as path:
        path.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
