"""Parameter cells of run notebooks, from the flags of the commands that run them; `--check` only says whether they are fresh.

A name that the command has too takes its default and its comment from there; `train.ipynb` has a line for every field
of `TrainConfig`. What only the notebook knows, such as `run`, stays as it is.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neo_nb.cli import commands, deploy_commands, edge_command, recipe_commands, review_commands, tune_command
from neo_nb.train.config import TrainConfig

RUNS = Path(__file__).resolve().parent.parent / "nbs" / "runs"
COMMANDS: dict[str, Callable] = {
    "evaluate": commands.evaluate,
    "export": deploy_commands.export,
    "export_edge": deploy_commands.export,
    "export_engine": deploy_commands.export,
    "export_int8": deploy_commands.export,
    "export_maps": deploy_commands.export,
    "benchmark": deploy_commands.benchmark,
    "benchmark_transformers": deploy_commands.benchmark,
    "benchmark_runtimes": deploy_commands.benchmark,
    "errors": review_commands.errors,
    "compare_runs": review_commands.compare,
    "mine": recipe_commands.mine,
    "logo": recipe_commands.logo,
    "tune": tune_command.tune,
    "edge": edge_command.edge,
}
LINE = re.compile(r"(\w+) = (.+?)  # (.+)")


def literal(value: Any) -> str:
    "A default as a line of a cell has it."
    return (
        json.dumps(value, ensure_ascii=False)
        if isinstance(value, str)
        else repr(list(value) if isinstance(value, tuple) else value)
    )


def as_variable(comment: str) -> str:
    "The comment of a flag as that of a variable: no dashes, and None where nothing was given."
    comment = re.sub(r"^With --against( \w+)?: ", "", comment).replace("--", "")
    comment = re.sub(r"; (.*) when not given$", r"; None: \1", comment)
    capital = comment[1:2].isupper() or comment.startswith(("COCO", "ONNX"))
    return comment if capital else comment[0].lower() + comment[1:]


def flags_of(command: Callable) -> dict[str, str]:
    "The line of each optional parameter of a command."
    comments = dict(re.findall(r"^    (\w+):.*?  # (.+)$", inspect.getsource(command), re.MULTILINE))
    lines = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if parameter.default is not parameter.empty:
            lines[name] = f"{name} = {literal(parameter.default)}  # {as_variable(comments[name])}"
    return lines


def fresh(name: str, cell: str) -> str:
    "The cell as it should be."
    lines = [(LINE.fullmatch(line)[1], line) for line in cell.splitlines() if line.strip()]
    if name == "train":
        own = [line for key, line in lines if key not in TrainConfig.model_fields]
        fields = TrainConfig.model_fields.items()
        usual = {"model": "auto"}  # None for all others: recipe and target decide
        return "\n".join(own + [
            f"{key} = {literal(usual.get(key))}  # {field.description}" for key, field in fields
        ])  # fmt: skip
    flags = flags_of(COMMANDS[name])
    return "\n".join(flags.get(key, line) for key, line in lines)


def main(check: bool) -> int:
    stale = []
    for name in ("train", *COMMANDS):
        path = RUNS / f"{name}.ipynb"
        notebook = json.loads(path.read_text())
        (cell,) = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
        new = fresh(name, "".join(cell["source"]))
        if new == "".join(cell["source"]):
            continue
        stale.append(path.name)
        cell["source"] = new.splitlines(keepends=True)
        if not check:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    if check and stale:
        print(f"parameter cells are stale: {', '.join(stale)}; run  make format", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
