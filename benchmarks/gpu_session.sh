#!/usr/bin/env bash
# What a CUDA machine is for: builds scorer and loss there, tests them, measures, and looks for memory errors and races.
#
#     benchmarks/gpu_session.sh [--build-only] FOLDER [WHEELS]
#
# leaves in FOLDER: scorer_cuda.json and .md, loss_cuda.json and the logs; where anomalib is installed and time is left,
# pipeline_cuda.json too. Needs Python with pip, torch, pytest, numpy, Pillow and rich, and cmake, ninja and nvcc; no
# network. Ends within 8 minutes: each step has a limit of its own, and all of them have one together.
#
# WHEELS is a folder with what pip builds the package by, made where there is a network, by the same version of Python:
#
#     pip download --dest WHEELS scikit-build-core pybind11
#
# Without it, both have to be installed. --build-only needs no GPU: it builds for ARCHITECTURE, such as 90, and sees that
# the steps start. Otherwise the code is for the GPU that is there, unless ARCHITECTURE is set.
set -uo pipefail

build_only=
if [ "${1-}" = --build-only ]; then
  build_only=yes
  shift
fi
folder=$(mkdir -p "${1:?a folder for the results}" && cd "$1" && pwd) || exit 2
wheels=${2:+$(cd "$2" && pwd)} || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
stage=$(mktemp -d) tools=$(mktemp -d)
trap 'rm -rf "$stage" "$tools"' EXIT
export PYTHONPATH=$stage${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
deadline=465 # seconds of the 480
build_limit=180
[ -z "$build_only" ] || deadline=1800 build_limit=1800 # nobody waits for a GPU
failed=0

# step NAME SECONDS COMMAND...: runs it under a limit, keeps what it prints, and goes on if it fails.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS))
  shift 2
  [ $left -gt 5 ] || { echo "== $name: no time left"; return 1; }
  echo "== $name, $SECONDS s after the start"
  timeout --kill-after=5 $((limit < left ? limit : left)) "$@" >"$folder/$name.log" 2>&1
  local status=$?
  tail -n 25 "$folder/$name.log"
  [ $status -eq 0 ] || { echo "== $name failed: status $status"; failed=1; }
  return $status
}

# As a user installs it, but for the place; and not isolated, since pip would then want cmake and ninja as wheels, too.
build() {
  local architecture pip=("$python" -m pip --disable-pip-version-check install --no-index)
  architecture=${ARCHITECTURE:-$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')} &&
    if [ -n "$wheels" ]; then
      "${pip[@]}" --find-links "$wheels" --target "$tools" scikit-build-core pybind11
    fi &&
    PYTHONPATH=$tools:$PYTHONPATH "${pip[@]}" --no-deps --no-build-isolation --target "$stage" \
      --config-settings=cmake.define.STFPM_EXT_CUDA=ON \
      --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$architecture" .
}

# What the later steps import is what was built.
look='
import _anomalib_stfpm_ext_autoload, os
from anomalib_stfpm_ext import StfpmExtLoss, anomaly_map
from anomalib_stfpm_ext.ops import native
assert native.__file__.startswith(os.environ["stage"]), native.__file__
print(f"scorer and loss {native.__version__}, built by {native.compiler} for CUDA {native.cuda_architectures}")
assert native.cuda_architectures
'

export -f build
export python stage tools wheels
# The plugin prefers the build to the source tree, which Python looks into first as the current folder.
tests=("$python" -m pytest -p _anomalib_stfpm_ext_autoload -p no:cacheprovider -m gpu tests/ops/test_cuda.py)

step build "$build_limit" bash -c build && step look 60 "$python" -c "$look" || exit 1
if [ -n "$build_only" ]; then
  step tests 60 "${tests[@]}" --collect-only --quiet
  for script in scorer_cuda loss; do step "$script" 60 "$python" "benchmarks/$script.py" --help; done
  exit $failed
fi
step tests 90 "${tests[@]}"
step scorer 150 "$python" benchmarks/scorer_cuda.py --deadline 140 \
  --json "$folder/scorer_cuda.json" --table "$folder/scorer_cuda.md"
step loss 40 "$python" benchmarks/loss.py --device cuda --seconds 1 --json "$folder/loss_cuda.json"
# Without torch's cache of memory, so that each tensor has an end that memcheck knows. racecheck looks at shared memory:
# it says nothing about the barriers of grid and cluster.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-name kns=stfpm_ext \
      --report-api-errors no --error-exitcode 1 "${tests[@]}" \
      -k "any_memory_layout or nan or many_images or (loss_and_gradients and float32)"
  done
else
  echo "== no compute-sanitizer on the PATH: neither memory errors nor races were looked for"
fi
if "$python" -c 'import anomalib' 2>/dev/null; then
  step pipeline 90 "$python" benchmarks/pipeline.py --device cuda --seconds 5 --rounds 1 \
    --json "$folder/pipeline_cuda.json"
fi
echo "== $SECONDS s"
exit $failed
