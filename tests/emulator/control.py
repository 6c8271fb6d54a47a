"""The emulated device, as tests see it."""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path

from torch import Tensor

import embed_ext

FOLDER = Path(embed_ext.__file__).resolve().parents[2]
ARCH = Path(embed_ext.__file__).resolve().parents[1].name  # sm_80 or sm_90
MOST_BYTES = 1 << 16


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(FOLDER / "libemulator.so"))
    loaded.emulator_set_seed.argtypes = [ctypes.c_uint64]
    loaded.emulator_take_reports.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    loaded.emulator_schedule_digest.restype = ctypes.c_uint64
    loaded.emulator_launches.restype = ctypes.c_uint32
    loaded.emulator_count.argtypes = [ctypes.c_bool]
    loaded.emulator_counts.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    loaded.emulator_counts.restype = ctypes.c_size_t
    return loaded


def set_seed(seed: int) -> None:
    """From now on who runs when follows from this number; 0: all in order."""
    library().emulator_set_seed(seed)


def schedule_digest() -> int:
    """A number that differs between two schedules since set_seed()."""
    return int(library().emulator_schedule_digest())


def launches() -> int:
    """How many kernels have been launched in this process."""
    return int(library().emulator_launches())


def _with_source_line(report: str) -> str:
    """The report with file and line in place of "[library+0x123]"."""
    place = re.search(r" \[(.+)\+(0x[0-9a-f]+)\]$", report)
    if place is None:
        return report
    command = ["addr2line", "-e", place.group(1), place.group(2)]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return report
    return f"{report[: place.start()]} at {line}"


def take_reports() -> list[str]:
    """What the device found wrong since it was last asked: what, kernel, block, thread, place."""
    buffer = ctypes.create_string_buffer(MOST_BYTES)
    library().emulator_take_reports(buffer, MOST_BYTES)
    return [_with_source_line(line) for line in buffer.value.decode().splitlines()]


def call(name: str, *arguments: Tensor | int | bool) -> list[str]:
    """Launch a kernel of kernels/; what the device reports."""
    take_reports()
    function = getattr(ctypes.CDLL(str(FOLDER / "kernels.so")), f"launch_{name}")
    function.argtypes = [
        ctypes.c_void_p
        if isinstance(argument, Tensor)
        else ctypes.c_bool
        if isinstance(argument, bool)
        else ctypes.c_int
        for argument in arguments
    ]
    function.restype = None
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))
    return take_reports()
