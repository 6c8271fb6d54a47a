#!/usr/bin/env bash
# Run tests under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   PYTHON=.venv/bin/python tools/sanitize.sh tests/ops [more pytest arguments]
#
# Works in build/sanitize, so the ordinary build stays as it is. Fails on any report, also on one
# of a process that a test has started.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
[[ $python == */* ]] && python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
tree=$root/build/sanitize
reports=$tree/build/reports

(($# > 0)) || { echo "usage: tools/sanitize.sh TESTS..."; exit 2; }
"$python" "$root/tools/source_tree.py" "$tree"
cd "$tree"
rm -rf "$reports"
mkdir -p "$reports"
EMBED_EXT_CUDA=0 EMBED_EXT_SANITIZE=address,undefined "$python" setup.py build_ext --inplace

# Python itself is not sanitized, so the run-time library must come first; libstdc++ with it, or
# exceptions thrown across libraries are not intercepted.
compiler=${CXX:-c++}
preload=
for library in asan ubsan stdc++; do
  preload+=$("$compiler" -print-file-name="lib$library.so"):
done
# Leaks: Python and torch keep memory to the end by design.
export ASAN_OPTIONS="detect_leaks=0:halt_on_error=1:log_path=$reports/asan"
export UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1:log_path=$reports/ubsan"

status=0
export LD_PRELOAD=${preload%:}
"$python" -c 'import embed_ext; print("testing", embed_ext.__file__)'
"$python" -m pytest -m "not slow and not cuda" -p no:cacheprovider "$@" || status=$?

shopt -s nullglob
for report in "$reports"/*; do
  echo "=== ${report##*/}"
  cat "$report"
  status=1
done
((status == 0)) && echo "sanitizers: no report"
exit "$status"
