"""The host-callable arithmetic and policy of the CUDA half, compiled and run without a GPU."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "native" / "test_policy.cpp"


def compiler() -> list[str]:
    """The system's C++ compiler, as CXX says or as it is found."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    pytest.skip("no C++ compiler: set CXX")


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_policy(tmp_path: Path, standard: str) -> None:
    program = tmp_path / "test_policy"
    flags = [f"-std={standard}", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler(), *flags, str(SOURCE), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.fullmatch(r"[1-9]\d* passed, 0 failed\n", done.stdout)
