"""What a packaged backbone is worth for a few photos of one class, in equal time.

    python tests/one_class.py FOLDER [MINUTES] [SEED ...] [--jobs 2]

trains `rtdetr_lite0` from nothing and from the packaged backbone, and `rtdetr_nano` from nothing, on 180 photos of
bccd with one class, MINUTES of CPU time each (20 are ten minutes of two cores), with each seed. Killed and called
again, it goes on with what is left. It writes one-class.md, .csv and .png into FOLDER.

The class is the platelets: 117 of the 205 photos have some, half as many pixels high as anything else, among cells
that look alike in colour. White cells, one in each photo and the only large dark thing there, are found by anything."""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import yaml

from neo_nb.base.core import atomic_write
from neo_nb.data.manifest import load_manifest
from neo_nb.recipes.equal_time import equal_time, final, plot_equal_time

PHOTOS = 180  # To train on: all that have the class, then others, drawn with seed 0
ENTRANTS = (
    {"name": "lite0 from nothing", "settings": {"model": "rtdetr_lite0", "pretrained": "none"}},
    {"name": "lite0 packaged", "settings": {"model": "rtdetr_lite0", "pretrained": "package"}},
    {
        "name": "lite0 packaged frozen",
        "settings": {"model": "rtdetr_lite0", "pretrained": "package", "freeze_backbone": True},
    },
    {"name": "nano from nothing", "settings": {"model": "rtdetr_nano"}},
)


def one_class(folder: Path, name: str = "Platelets") -> Path:
    "A manifest of bccd with one class, 180 of its training photos and all others."
    source = load_manifest("bccd")
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, entry in source.splits.items():
        known = json.loads((source.folder / entry.annotations).read_text())
        (kept,) = [c for c in known["categories"] if c["name"] == name]
        known["annotations"] = [a for a in known["annotations"] if a["category_id"] == kept["id"]]
        if split == "train":
            has = {a["image_id"] for a in known["annotations"]}
            rest = [image["id"] for image in known["images"] if image["id"] not in has]
            more = np.random.default_rng(0).permutation(rest)[: PHOTOS - len(has)]
            known["images"] = [image for image in known["images"] if image["id"] in has | set(more.tolist())]
        with atomic_write(folder / f"{split}.json") as path:
            path.write_text(json.dumps(known | {"categories": [kept]}))
        splits[split] = {"annotations": str((folder / f"{split}.json").absolute()), "images": entry.images}
    manifest = {"format": "coco", "root": source.root, "licence": source.licence, "classes": [name], "splits": splits}
    with atomic_write(folder / "one-class.yaml") as path:
        path.write_text(yaml.safe_dump(manifest | {"title": f"bccd, {name} alone"}))
    return folder / "one-class.yaml"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("minutes", type=float, nargs="?", default=20.0, help="of CPU time, of each training")
    parser.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one core each")
    parser.add_argument("--entrants", nargs="*", help="names of those that train; all when not given")
    asked = parser.parse_args()
    data = str(one_class(asked.folder / "data").absolute())
    entrants = [entry for entry in ENTRANTS if not asked.entrants or entry["name"] in asked.entrants]
    settings = {"size": [240, 320], "batch_size": 8}
    rows = equal_time(
        entrants, data, asked.seeds, asked.minutes, asked.folder, jobs=asked.jobs, evaluations=5, settings=settings
    )
    plot_equal_time(rows, "AP50", asked.folder / "one-class.png")
    rows.to_csv(asked.folder / "one-class.csv", index=False, float_format="%.5g")
    last = rows.groupby(["competitor", "seed"], sort=False).tail(1)
    ends = last.pivot(index="seed", columns="competitor", values="AP50").reindex(
        columns=[entry["name"] for entry in entrants]
    )
    table = final(rows, "AP50").drop(columns="its sd").round(3)
    text = [f"{asked.minutes:g} CPU minutes each, AP50 on the {len(asked.seeds)} seeds' last evaluation:", ""]
    text += [ends.round(3).to_markdown(), "", table.to_markdown()]
    if {"lite0 from nothing", "lite0 packaged"} <= set(ends):
        ratio = ends["lite0 packaged"] / ends["lite0 from nothing"].clip(lower=1e-9)
        verdict = "at least twice" if (ratio >= 2).all() else "not twice"
        text += ["", f"AP50 with the packaged backbone is {verdict} that from nothing with every seed: "]
        text[-1] += ", ".join(f"{r:.2f} times" for r in ratio) + "."
    text += ["", f"    python {shlex.join(['tests/one_class.py', *sys.argv[1:]])}"]
    with atomic_write(asked.folder / "one-class.md") as path:
        path.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
