#!/usr/bin/env bash
# What `make test` does, in order; stops at the first complaint.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND=Agg HF_HUB_OFFLINE=1 NO_ALBUMENTATIONS_UPDATE=1 OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the package; one compiles it
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TRACKIO_DIR="$scratch/trackio" NEO_REPORTS="$scratch/reports"
if [ -z "${NEO_DATA:-}" ] && [ -d ../shared/data/bccd ]; then export NEO_DATA="$PWD/../shared/data"; fi

step() { echo; echo "== $1 ($((SECONDS / 60)):$(printf %02d $((SECONDS % 60))))"; }
tree() { git ls-files -z nbs neo_nb README.md | xargs -0 sha256sum 2>/dev/null | sort -k2; }

step "style"
ruff format --check -q nbs tests .ci || { echo "unformatted: run  make format"; exit 1; }
ruff check -q nbs tests .ci neo_nb

step "notebooks and package agree"
tree > "$scratch/before"
nbdev-export
nbdev-clean
tree > "$scratch/after"
diff "$scratch/before" "$scratch/after" > "$scratch/diff" || {
  echo "nbdev-export or nbdev-clean changed these files; commit them:"; cut -d' ' -f4 "$scratch/diff" | sort -u; exit 1; }

step "imports run downwards"
lint-imports --no-cache -q 2>/dev/null || lint-imports

step "README and parameter cells are fresh"
python .ci/readme.py --check
python .ci/parameters.py --check

step "chapters"
python .ci/chapters.py

step "tests"
python -m pytest -ra -n 2 --dist loadfile --no-loadscope-reorder --durations 30 --durations-min 15 # else the long files, of few tests, come last
