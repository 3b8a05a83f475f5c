#!/usr/bin/env bash
# On a machine with a package registry: packs into .gpu/ (ignored by git) what a bare machine with one NVIDIA GPU lacks.
# Take the repository and .gpu/ there, then: bash .gpu/run.sh FOLDER [SECONDS] [OPTIONS]
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
"$python" -m pip --version >/dev/null 2>&1 || python=python3
rm -rf .gpu
mkdir -p .gpu/wheels

get() {
  "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d .gpu/wheels "$@"
}
pinned() { grep -E "^$1==" constraints.txt || echo "$1"; }

# What such a machine has, with what these bring along; tests/test_gpu_suite.py runs the suite with this and ours alone.
there="accelerate numpy onnx onnxruntime onnxscript opencv-python-headless pandas pillow pytest pyyaml safetensors scipy"
there="$there timm torch torchvision tqdm transformers"
ours="pydantic pydantic-core annotated-types typing-inspection typing-extensions jaxtyping wadler-lindig fastcore pycocotools"
for package in $ours; do get "$(pinned "$package")"; done

cat > .gpu/run.sh <<'RUN'
#!/usr/bin/env bash
# From the repository's root: findings go to FOLDER/gpu.jsonl and FOLDER/gpu.md as they come.
set -u
folder=${1:?a folder for the findings} seconds=${2:-420}
shift $(($# < 2 ? $# : 2))
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --target "$site" .gpu/wheels/*.whl || exit 1
export PYTHONPATH="$PWD:$site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg NO_ALBUMENTATIONS_UPDATE=1
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.draw --format=csv
timeout --kill-after=10 $((seconds + 45)) python3 -m neo_nb.gpu.suite "$folder" --seconds "$seconds" "$@"
RUN
chmod +x .gpu/run.sh

size=$(du -sm .gpu | cut -f1)
[ "$size" -lt 64 ] || { echo ".gpu takes $size MiB; 64 MiB can travel" >&2; exit 1; }
echo ".gpu: $size MiB, $(ls .gpu/wheels | wc -l) wheels beside ${there// /, }"
