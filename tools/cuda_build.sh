#!/usr/bin/env bash
# Build the whole extension against a CUDA torch, check its kernels, run the CPU tests on it.
#
#   tools/cuda_build.sh                   # installs CUDA_TORCH in a folder that is removed again
#   CUDA_VENV=path tools/cuda_build.sh    # uses an environment that has a CUDA torch
#
# Needs nvcc, and no GPU. Everything is made below $TMPDIR (12 GB).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
torch=${CUDA_TORCH:-torch==2.14.1}
cuda_home=$("$python" "$root/tools/cuda_home.py")

work=$(mktemp -d "${TMPDIR:-/tmp}/embed_ext-cuda.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [[ -n ${CUDA_VENV:-} ]]; then
  venv=$(cd "$CUDA_VENV" && pwd)
else
  venv=$work/venv
  "$python" -m venv "$venv"
  echo "Installing $torch (several GB) in $venv"
  # The unpacked archives must not fill the place where /tmp is small.
  mkdir "$work/tmp"
  for group in build test; do
    "$venv/bin/python" "$root/tools/extras.py" "$group" >> "$work/requirements.txt"
  done
  TMPDIR=$work/tmp "$venv/bin/python" -m pip install --quiet --no-cache-dir \
    "$torch" -r "$work/requirements.txt"
fi
export PATH=$venv/bin:$PATH CUDA_HOME=$cuda_home EMBED_EXT_CUDA=1

"$venv/bin/python" "$root/tools/source_tree.py" "$work/tree"
cd "$work/tree"
python setup.py build_ext --inplace
PYTHONPATH=. python tools/check_registrations.py CPU Meta CUDA
# shellcheck disable=SC2046  # the options are words of their own
python -m pytest $(python tools/pytest_options.py) -m "not cuda" ${TEST_ARGS:-}
