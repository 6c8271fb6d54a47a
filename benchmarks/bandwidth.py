"""What the machine can do, so that a time can be read as a share of a limit.

All figures are GB/s (1e9 bytes), the best of several runs, at the current number of threads:

- ``copy``: one large tensor copied to another; bytes read plus bytes written
- ``fresh-4k``, ``fresh-2m``: memory fresh from the operating system filled once, with 4 KiB
  pages and with 2 MiB (transparent huge) pages; bytes written
- ``random-row-N``: rows of N bytes gathered in random order from a table larger than the
  caches, by torch's index_select; bytes read plus bytes written
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import cpu_seconds, gpu_seconds

ROW_BYTES = (64, 256, 1024, 4096)
GPU_ROW_BYTES = (32, *ROW_BYTES)  # a sector, the least that a GPU's memory moves
REPEATS = 7


def measure_bandwidth(device: str, size: int) -> dict[str, float]:
    """Bandwidths in GB/s by name, with buffers of ``size`` bytes."""
    results = {"copy": _copy(device, size)}
    if device == "cpu":
        for name, advice in (("fresh-4k", "MADV_NOHUGEPAGE"), ("fresh-2m", "MADV_HUGEPAGE")):
            if hasattr(mmap, advice):
                results[name] = _fresh(size, getattr(mmap, advice))
    for row_bytes in GPU_ROW_BYTES if device.startswith("cuda") else ROW_BYTES:
        results[f"random-row-{row_bytes}"] = _random_rows(device, size, row_bytes)
    return results


def _best_seconds(function: Callable[[], object], device: str) -> float:
    seconds = gpu_seconds if device.startswith("cuda") else cpu_seconds
    return min(seconds(lambda _: function(), [None]) for _ in range(REPEATS))


def _copy(device: str, size: int) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.ones_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device) / 1e9


def _fresh(size: int, advice: int) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(advice)
        memory: Tensor | None = torch.frombuffer(pages, dtype=torch.uint8)
        assert memory is not None
        start = time.perf_counter()
        memory.fill_(1)
        best = min(best, time.perf_counter() - start)
        # The mapping cannot be closed while a tensor still looks into it.
        memory = None
        pages.close()
    return size / best / 1e9


def _random_rows(device: str, size: int, row_bytes: int) -> float:
    table = torch.ones(size // row_bytes, row_bytes // 4, device=device)
    count = max(1, table.shape[0] // 4)
    rows = torch.randperm(table.shape[0], device=device)[:count]
    gathered = torch.ones(count, table.shape[1], device=device)
    seconds = _best_seconds(lambda: torch.index_select(table, 0, rows, out=gathered), device)
    return 2 * count * row_bytes / seconds / 1e9
