#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes, with its output in one folder.
#
#   OUT=results PYTHON=python3 tools/gpu_check.sh
#
# Uses PYTHON as it is (a CUDA torch, setuptools, ninja, pytest), and no network. Each step has its
# own time limit; a failed one does not keep the others from running.
set -euo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu-check}
mkdir -p "$out"
CUDA_HOME=$("$python" tools/cuda_home.py)
TORCH_CUDA_ARCH_LIST=$("$python" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu-check: this torch sees no CUDA device")
print("{}.{}".format(*torch.cuda.get_device_capability()))')
export CUDA_HOME TORCH_CUDA_ARCH_LIST EMBED_EXT_CUDA=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

summary=$out/summary.txt
: > "$summary"
failed=0

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 status=0 start=$SECONDS
  shift 2
  echo "=== $name (at most $limit s): $*"
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
  tail -n 15 "$out/$name.log"
  printf '%-12s exit %-3d %4d s\n' "$name" "$status" "$((SECONDS - start))" | tee -a "$summary"
  ((status == 0)) || failed=1
  return "$status"
}

step build 180 "$python" setup.py build_ext --inplace || exit 1
step self-check 30 "$python" -m embed_ext || true
# shellcheck disable=SC2046  # the options are words of their own
step tests 150 "$python" -m pytest -m cuda $("$python" tools/pytest_options.py) \
  --junit-xml="$out/tests.xml" || true

sanitizer=$CUDA_HOME/bin/compute-sanitizer
[[ -x $sanitizer ]] || sanitizer=$(command -v compute-sanitizer || true)
if [[ -n $sanitizer ]]; then
  for tool in memcheck racecheck; do
    # torch's caching allocator would hide an access beyond a tensor's end.
    step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
      --error-exitcode 1 "$python" tools/gpu_cases.py || true
  done
else
  step cases 60 "$python" tools/gpu_cases.py || true
  echo "no compute-sanitizer in $CUDA_HOME/bin: memcheck and racecheck not run" | tee -a "$summary"
  failed=1
fi
step benchmarks 60 "$python" -m benchmarks --device cuda --suite quick --quiet \
  --results-dir "$out" || true

echo "=== summary ($out)"
cat "$summary"
exit "$failed"
