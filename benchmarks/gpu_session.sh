#!/usr/bin/env bash
# What a CUDA machine is for: builds the scorer there, tests it, looks for memory errors and races, and measures.
#
#     benchmarks/gpu_session.sh FOLDER
#
# leaves in FOLDER: scorer_cuda.json, scorer_cuda.md and the logs. Needs Python with torch, pybind11, pytest, numpy and
# Pillow, and cmake and nvcc; no network, and no anomalib. Ends within 8 minutes: each step has a limit of its own.
set -uo pipefail

folder=$(mkdir -p "${1:?a folder for the results}" && cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
export PYTHONPATH=$stage PYTHONDONTWRITEBYTECODE=1
failed=0

# step NAME SECONDS COMMAND...: runs it under a limit, keeps what it prints, and goes on if it fails.
step() {
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$folder/$name.log" 2>&1
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
step build 100 bash -c build || exit 1
step tests 80 "$python" -m pytest -p no:cacheprovider -m gpu tests/test_cuda.py
for tool in memcheck racecheck; do
  step "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -p no:cacheprovider \
    -m gpu tests/test_cuda.py -k "any_memory_layout or nan or (loss_and_gradients and float32)"
done
step benchmark 210 "$python" benchmarks/scorer_cuda.py --json "$folder/scorer_cuda.json" --table "$folder/scorer_cuda.md"
exit $failed
