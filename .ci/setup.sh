#!/usr/bin/env bash
# Makes .venv, or refreshes it when what it is made from has changed. Needs python3 (3.11 or later) and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "setup: $1" >&2; exit 1; }
command -v python3 >/dev/null || fail "python3 is missing; on Debian: apt-get install python3 python3-venv"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "python3 is older than 3.11: $(python3 --version)"

exec 9>.venv.lock # stays: whoever waits for a removed one would not keep out whoever comes next
flock 9 2>/dev/null || true # two at once wait for each other

wanted=$(cat pyproject.toml constraints.txt .ci/setup.sh | sha256sum | cut -c1-16)
if [ -x .venv/bin/python ] && [ ! -e .venv/unfinished ] && [ "$(cat .venv/made-from 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

if [ -e .venv/unfinished ]; then # packages half copied look whole to an installer
  echo "setup: an earlier one was cut off; beginning anew"
  rm -rf .venv
fi

if [ ! -x .venv/bin/python ]; then
  echo "setup: making .venv with $(python3 --version)"
  if ! python3 -m venv .venv 2>/dev/null; then # Debian keeps ensurepip in a package of its own
    rm -rf .venv
    if python3 -m pip --version >/dev/null 2>&1; then
      python3 -m pip install -q --user --break-system-packages virtualenv
      python3 -m virtualenv -q .venv
    else
      fail "python3 can make no virtual environment; on Debian: apt-get install python3-venv"
    fi
  fi
fi

touch .venv/unfinished
echo "setup: installing (a few minutes the first time: torch is large)"
uv=$(command -v uv || true)
if [ -z "$uv" ] && .venv/bin/python -m pip install -q uv 2>/dev/null; then uv=.venv/bin/uv; fi
if [ -n "$uv" ]; then
  # compiled once: else every command compiles torch and the rest where Python may not write, as in many containers
  UV_LINK_MODE=${UV_LINK_MODE:-copy} "$uv" pip install -q --compile-bytecode --python .venv/bin/python -c constraints.txt -e '.[all,dev]'
  "$uv" pip install -q --compile-bytecode --no-deps --python .venv/bin/python -c constraints.txt trackers motmetrics
else
  .venv/bin/python -m pip install -q -c constraints.txt -e '.[all,dev]'
  .venv/bin/python -m pip install -q --no-deps -c constraints.txt trackers motmetrics
fi # without what they ask for: opencv-python would overwrite opencv-python-headless, and nothing they use is missing
.venv/bin/python - <<'END'
from neo_nb.review.fiftyone_db import prepare_database

if problem := prepare_database():  # everything but `neo errors` works without
    print(f"setup: FiftyOne's database cannot start here: {problem}")
END
echo "$wanted" > .venv/made-from
rm -f .venv/unfinished
echo "setup: done; try  make demo  or  .venv/bin/neo --help"
