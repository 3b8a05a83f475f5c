"""The form of the house: what every chapter has, and what no file may hold."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import neo_nb

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith(("_", ".")) for part in p.parts)
)
RUNS = [p for p in NOTEBOOKS if p.parent.name == "runs"]


def cells(path: Path) -> list[dict]:
    found = json.loads(path.read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found]


def is_code(cell: dict, exported: bool | None = None) -> bool:
    marked = bool(re.search(r"^#\|\s*exports?\b", cell["source"], re.M))
    return cell["cell_type"] == "code" and (exported is None or exported == marked)


CHAPTERS = [p for p in NOTEBOOKS if any("#| default_exp" in cell["source"] for cell in cells(p))]
by_name = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


@by_name
def test_a_chapter_has_title_subtitle_and_summary(path):
    first, summary = cells(path)[0]["source"], [c for c in cells(path) if c["cell_type"] == "markdown"]
    assert re.match(r"# \S.*\n\n> \S", first), "an H1 title and a > subtitle"
    assert any(c["source"].startswith("#| export\n") for c in summary), "a markdown cell with #| export"


@by_name
def test_cells_and_modules_stay_small(path):
    sources = [c["source"] for c in cells(path) if is_code(c, exported=True)]
    long = [s.splitlines()[1] for s in sources if len([ln for ln in s.splitlines() if not ln.startswith("#|")]) > 45]
    assert not long, f"exported cells over 45 lines: {long}"
    assert sum(len(s.splitlines()) for s in sources) <= 400


ORDER = re.compile(r"\d\d_([a-z][a-z0-9_]*)")  # two digits, then the name of the module or package


def module_of(path: Path) -> str:
    "nbs/20_data/08_manifest.ipynb is neo_nb.data.manifest; 99_init is the package itself."
    parts = path.relative_to(ROOT / "nbs").with_suffix("").parts
    assert all(ORDER.fullmatch(part) for part in parts), f"{path}: two digits, an underscore, the module's name"
    names = [ORDER.fullmatch(part)[1] for part in parts]
    return ".".join(names[:-1] + ["__init__"] if names[-1] == "init" else names)


@by_name
def test_a_chapter_is_named_as_its_module(path):
    (declared,) = re.findall(r"#\| default_exp ([\w.]+)", "\n".join(c["source"] for c in cells(path)))
    assert declared == module_of(path)


def imported(source: str, package: list[str]) -> set[str]:
    "Modules that a generated file imports when it is imported, without `neo_nb.`"
    found = set()
    for node in ast.parse(source).body:
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "neo_nb"
        if ours and not node.level:  # an import over several lines stays absolute
            node.level, node.module, package = 1, node.module.partition(".")[2], []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            base = ".".join(part for part in base if part)
            found |= {base} | {f"{base}.{name.name}" for name in node.names}
    return found


def test_numbers_are_the_order_of_imports():
    place = {module_of(p): p.relative_to(ROOT / "nbs").parts for p in CHAPTERS}
    for module, at in place.items():
        path = ROOT / "neo_nb" / (module.replace(".", "/") + ".py")
        package = module.split(".")[:-1]
        later = [m for m in imported(path.read_text(), package) if m in place and place[m] > at]
        assert not later, f"{module} imports {later}, whose numbers are larger"


def test_the_readme_leads_to_every_chapter():
    linked = set(re.findall(r"\]\(nbs/([^)]+)\)", (ROOT / "README.md").read_text()))
    known = {str(p.relative_to(ROOT / "nbs")) for p in CHAPTERS if p.stem != "99_init"}
    assert known <= linked, sorted(known - linked)


def test_every_module_has_its_chapter():
    known = {module_of(p) for p in CHAPTERS}
    files = [p.relative_to(ROOT / "neo_nb").with_suffix("") for p in (ROOT / "neo_nb").rglob("*.py")]
    modules = {".".join(f.parts) for f in files if f.name != "_modidx" and (ROOT / f"neo_nb/{f}.py").stat().st_size}
    assert modules - known == {"__init__"}, "a module without a chapter"


LESSONS = "\n".join(c["source"] for p in NOTEBOOKS for c in cells(p) if is_code(c, exported=False))
TESTS = "\n".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))
EXPORTED = "\n".join(c["source"] for p in NOTEBOOKS for c in cells(p) if is_code(c, exported=True))


@by_name
def test_every_public_name_is_shown_tested_or_used(path):
    names = []
    for cell in cells(path):
        if is_code(cell, exported=True):
            kinds = (ast.FunctionDef, ast.ClassDef)
            names += [n.name for n in ast.parse(cell["source"]).body if isinstance(n, kinds) and n.name[0] != "_"]
    shown = {n for n in names if re.search(rf"\b{n}\b", LESSONS + TESTS)}
    dead = [n for n in names if n not in shown and len(re.findall(rf"\b{n}\b", EXPORTED)) < 2]
    assert not dead, f"neither in a lesson nor in a test nor used: {dead}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_light_and_its_links_lead_somewhere(path):
    assert path.stat().st_size <= 150_000
    for cell in cells(path):
        if cell["cell_type"] == "markdown":
            for link in re.findall(r"\]\((?!https?:|#|attachment:)([^)#\s]+)", cell["source"]):
                assert (path.parent / link).exists(), f"{link} leads nowhere"


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_a_run_notebook_has_one_cell_of_parameters_and_exports_nothing(path):
    found = cells(path)
    assert sum("parameters" in c["metadata"].get("tags", []) for c in found) == 1
    assert not any(is_code(c, exported=True) or "#| default_exp" in c["source"] for c in found)


def tracked() -> list[Path]:
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [
        ROOT / name for name in out.splitlines() if not name.endswith((".jpg", ".png")) and (ROOT / name).is_file()
    ]


def test_no_file_knows_the_machine_it_was_written_on():
    here = Path(__file__).resolve()
    words = re.compile(r"(?<![\w.])/(work|root)/|/tmp/w/|\bfacts §")
    hits = [p for p in tracked() if p != here and p.name != "LICENSE" and words.search(p.read_text(errors="ignore"))]
    assert not hits, hits


def test_constraints_hold_names_and_versions_only():
    lines = [ln for ln in (ROOT / "constraints.txt").read_text().splitlines() if ln and not ln.startswith("#")]
    assert [ln for ln in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+( *;.*)?", ln)] == []


def test_the_changelog_knows_the_version_and_the_readme_is_fresh():
    assert f"[{neo_nb.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert subprocess.run([sys.executable, ".ci/readme.py", "--check"], cwd=ROOT).returncode == 0


# Names that were replaced by the field's; `current_names` reads the settings among them in old runs
REPLACED = """
    load_artifact TorchArtifact OnnxArtifact SlicedArtifact Artifact artifact find_artifact take_print to_network to_pixels
    to_whole whole_of min_kept small_repeat in_view InputContract read_contract our_name read_foreign is_foreign
    as_they_are take_turns find_pairs error_costs find_doubts Doubts refuse_golden Competitor Racer plain_epochs best_by
    open_table save_table start_from alternate mend mended pictures picture
"""


def test_no_old_name_is_left():
    words = re.compile(rf"\b({'|'.join(REPLACED.split())})\b")
    kept = re.compile(r"_RENAMED = \{|# of version 0\.1\.0")  # where old files are read
    hits = []
    for path in NOTEBOOKS:
        for cell in cells(path):
            if not kept.search(cell["source"]) and (found := words.search(cell["source"])):
                hits.append(f"{path.relative_to(ROOT)}: {found[0]}")
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        hits += [f"{path.name}: {found}" for found in words.findall(path.read_text())]
    assert not hits, hits
