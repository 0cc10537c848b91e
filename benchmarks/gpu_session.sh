#!/usr/bin/env bash
# What a CUDA machine is for: builds scorer and loss there, tests them, measures, and looks for memory errors and races.
#
#     benchmarks/gpu_session.sh FOLDER
#
# leaves in FOLDER: scorer_cuda.json and .md, loss_cuda.json and the logs; where anomalib is installed and time is left,
# pipeline_cuda.json too. Needs Python with torch, pybind11, pytest, numpy, Pillow and rich, and cmake and nvcc; no
# network. Ends within 8 minutes: each step has a limit of its own, and all of them have one together.
set -uo pipefail

folder=$(mkdir -p "${1:?a folder for the results}" && cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
export PYTHONPATH=$stage${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
deadline=465 # seconds of the 480
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

build() {
  local architecture
  architecture=${ARCHITECTURE:-$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')} &&
    cmake -S . -B "$stage/build" -DCMAKE_BUILD_TYPE=Release -DSKBUILD_PROJECT_VERSION=0.0.0 -DSTFPM_EXT_CUDA=ON \
      -DCMAKE_CUDA_ARCHITECTURES="$architecture" -DPython_EXECUTABLE="$(command -v "$python")" \
      -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    cmake --build "$stage/build" --parallel &&
    cmake --install "$stage/build" --prefix "$stage" &&
    cp anomalib_stfpm_ext/*.py "$stage/anomalib_stfpm_ext/"
}

export -f build
export python stage
# The plugin prefers the build to the source tree, which Python looks into first as the current folder.
tests=("$python" -m pytest -p _anomalib_stfpm_ext_autoload -p no:cacheprovider -m gpu tests/ops/test_cuda.py)

step build 180 bash -c build || exit 1
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
