"""Streamed stores of the CPU kernels, and the fences without which other threads may read what was
there before.

    python tools/fences.py embed_ext/_C*.so
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Streaming:
    """How many instructions of each kind a function has."""

    stores: int = 0
    fences: int = 0


def disassemble(library: Path) -> str:
    """What objdump prints of a library that was built for this machine."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(library)]
    return subprocess.check_output(command, text=True)


def count_in(text: str) -> dict[str, Streaming]:
    """The functions that have streamed stores, by mangled name."""
    functions: dict[str, Streaming] = {}
    current = Streaming()
    for line in text.splitlines():
        if function := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            current = functions.setdefault(function.group(1), Streaming())
        elif re.search(r"\tv?movnt(?!dqa)", line):
            current.stores += 1
        elif "\tsfence" in line:
            current.fences += 1
    return {name: found for name, found in functions.items() if found.stores}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    missing = [
        name
        for name, found in count_in(disassemble(Path(sys.argv[1]))).items()
        if found.fences == 0
    ]
    print("\n".join(missing or ["every function that streams has a fence"]))
    sys.exit(1 if missing else 0)
