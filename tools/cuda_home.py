"""Find the CUDA toolkit: the folder above the bin that holds the real nvcc.

python tools/cuda_home.py    # prints the folder, or says what is missing and exits with 1
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def find_cuda_home() -> Path | None:
    """Return CUDA_HOME if it is set, else the toolkit of the nvcc on PATH.

    An nvcc on PATH may be a script that calls the real one elsewhere, so nvcc itself is asked.
    """
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    here = re.search(r"^#\$ _HERE_=(.+)$", plan.stderr, re.MULTILINE)
    return Path(here.group(1)).parent if here else Path(nvcc).resolve().parents[1]


def require_cuda_home() -> Path:
    """Return the toolkit's folder, or end the program with a sentence that says what to do."""
    home = find_cuda_home()
    if home is None:
        sys.exit("No nvcc found: install the CUDA toolkit, or set CUDA_HOME to where it is.")
    if not (home / "bin" / "nvcc").exists():
        sys.exit(f"No nvcc in {home}/bin: set CUDA_HOME to the folder above nvcc's bin.")
    return home


if __name__ == "__main__":
    print(require_cuda_home())
