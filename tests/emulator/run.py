"""Build for the emulated device, and run tests on it.

    python tests/emulator/run.py                          # all that take a device, and tests/cuda
    python tests/emulator/run.py tests/cuda -k segment    # these, on each architecture

EMULATOR_SEED=n tries other schedules and other random cases, EMULATOR_CASES=n as many of each op.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from pytest_options import options  # noqa: E402

# Beside what asks for the architecture, the code of both is the same.
TESTS = {
    "sm_90": ["tests/ops", "tests/cuda", "tests/emulator"],
    "sm_80": [
        "tests/emulator/test_fuzz.py",
        "tests/ops/test_dense_backward.py",
        "tests/ops/test_grad_add.py",
    ],
}
NONE_COLLECTED = 5  # pytest's exit status


def main() -> int:
    built = subprocess.call([sys.executable, str(ROOT / "tests" / "emulator" / "build.py")])
    if built != 0:
        return built
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    for arch, tests in TESTS.items():
        print(f"=== emulated device, {arch}", flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options()]
        command += ["-m", "emulated and not large", *(sys.argv[1:] or ["-q", *tests])]
        folder = ROOT / "build" / "emulated" / arch
        status = subprocess.call(command, cwd=folder, env=environment)
        if status not in (0, NONE_COLLECTED):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
