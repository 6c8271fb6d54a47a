#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes, with its output in one folder.
#
#   OUT=results PYTHON=python3 tools/gpu_check.sh
#
# Uses PYTHON as it is (a CUDA torch, setuptools, ninja, pytest; all else is optional), and no
# network. Each step has its own time limit; a failed one does not keep the others from running.
# The limits add up to 500 s, and what lies between the steps takes some seconds more.
set -euo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu-check}
mkdir -p "$out"
out=$(cd "$out" && pwd)
CUDA_HOME=$("$python" tools/cuda_home.py)
TORCH_CUDA_ARCH_LIST=$("$python" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu-check: this torch sees no CUDA device")
print("{}.{}".format(*torch.cuda.get_device_capability()))')
# A compiler of the largest file takes some 3 GB.
memory_jobs=$(awk '/^MemAvailable:/ {print int($2 / 3e6) + 1}' /proc/meminfo)
cores=$(nproc)
MAX_JOBS=${MAX_JOBS:-$((cores < memory_jobs ? cores : memory_jobs))}
export CUDA_HOME TORCH_CUDA_ARCH_LIST MAX_JOBS EMBED_EXT_CUDA=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

summary=$out/summary.txt
: > "$summary"
failed=0

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 status=0 start=$SECONDS
  shift 2
  echo "=== $name (at most $limit s): $*"
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
  tail -n 15 "$out/$name.log"
  printf '%-12s exit %-3d %4d s\n' "$name" "$status" "$((SECONDS - start))" | tee -a "$summary"
  ((status == 0)) || failed=1
  return "$status"
}

# What a reader of the results must know; no line of it may stop the check.
# shellcheck disable=SC2317  # it is called by name, in a shell that a time limit can end
environment() {
  echo "date     $(date -u +%FT%TZ)"
  if git rev-parse HEAD > /dev/null 2>&1; then
    echo "commit   $(git rev-parse HEAD), $(git status --porcelain | wc -l) files changed"
  else
    echo "commit   ${EMBED_EXT_COMMIT:-unknown}"
  fi
  echo "system   $(uname -srm), $(nproc) cores, MAX_JOBS=$MAX_JOBS"
  nvidia-smi || true
  "$CUDA_HOME/bin/nvcc" --version || true
  "${CXX:-c++}" --version || true
  "$python" -c '
import importlib.metadata as metadata, sys, torch
print("python", sys.version)
for name in sys.argv[1:]:
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
device = torch.cuda.get_device_properties(0)
print("CUDA of torch", torch.version.cuda)
print(device)' torch triton numpy pytest pytest-xdist hypothesis tqdm matplotlib || true
}

export -f environment
export python
timeout 20 bash -c environment > "$out/environment.txt" 2>&1 || failed=1
cat "$out/environment.txt"
step build 150 "$python" setup.py build_ext --inplace || exit 1
step self-check 20 "$python" -m embed_ext || true
# The folders left out have no test that needs a GPU, and import large libraries.
# shellcheck disable=SC2046  # the options are words of their own
step tests 110 "$python" -m pytest -m cuda $("$python" tools/pytest_options.py) \
  --ignore=tests/models --ignore=tests/distributed \
  --continue-on-collection-errors --junit-xml="$out/tests.xml" || true

sanitizer=$CUDA_HOME/bin/compute-sanitizer
[[ -x $sanitizer ]] || sanitizer=$(command -v compute-sanitizer || true)
sanitized=0
if [[ -n $sanitizer ]]; then
  for tool in memcheck racecheck; do
    # torch's caching allocator would hide an access beyond a tensor's end. Only kernels of this
    # project are watched: the names of others lack its namespace.
    step "$tool" 55 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
      --kernel-name kns=embed_ext --error-exitcode 1 "$python" tools/gpu_cases.py --reduced || true
    # The last line of the program: without it the tool did not work here, or not fast enough.
    grep -q " cases on " "$out/$tool.log" || break
    sanitized=$((sanitized + 1))
  done
fi
if ((sanitized < 2)); then
  echo "compute-sanitizer is missing, or did not run to its end" | tee -a "$summary"
  failed=1
  ((sanitized > 0)) || step cases 55 "$python" tools/gpu_cases.py || true
fi
step benchmarks 90 "$python" -m benchmarks --device cuda --suite gpu-quick --threads 1 --rounds 5 \
  --min-time 0.002 --bandwidth-mib 2048 --time-limit 60 --quiet --results-dir "$out" || true

echo "=== summary ($out)"
cat "$summary"
exit "$failed"
