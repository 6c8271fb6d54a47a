"""A training step where the system has huge pages for those who ask, for nobody, and for all.

Each setting is a process of its own: ``never`` asks the kernel to give this process none, and
``malloc`` has the C library ask for them, as a system does that gives them to everybody.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.environment import ROOT
from benchmarks.experiments.makers import MAKERS

PR_SET_THP_DISABLE = 41
SETTINGS = {
    "on request": {},
    "never": {},
    "malloc": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}
TABLES = [(1_000_000, 64, 4096), (50_257, 768, 2048), (200_000, 64, 2048)]
STEPS = {"SGD": (1, False), "clip + SGD": (1, True), "SGD, two uses": (2, False)}
ROUNDS, WARM_UP = 9, 6


def measure() -> Iterator[dict[str, Any]]:
    """Medians in microseconds of each setting, step and table, by who took it."""
    for setting, variables in SETTINGS.items():
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.experiments.huge_pages", setting],
            cwd=ROOT,
            env={**os.environ, **variables},
            check=True,
            capture_output=True,
            text=True,
        )
        yield from json.loads(done.stdout)


def _step(
    module: nn.Embedding, optimizer: torch.optim.Optimizer, lookups: Tensor, clip: bool
) -> float:
    # lookups: [uses, tokens]
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = torch.stack([module(indices).sum() for indices in lookups]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    if clip:
        clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    return time.perf_counter() - start


def _measure_here(setting: str) -> Iterator[dict[str, Any]]:
    for table in TABLES:
        num_embeddings, embedding_dim, tokens = table
        modules = {who: make(num_embeddings, embedding_dim) for who, make in MAKERS.items()}
        optimizers = {n: torch.optim.SGD(m.parameters(), lr=1e-6) for n, m in modules.items()}
        for name, (uses, clip) in STEPS.items():
            times: dict[str, list[float]] = {who: [] for who in modules}
            for _ in range(WARM_UP + ROUNDS):
                lookups = torch.randint(num_embeddings, (uses, tokens))
                for who, module in modules.items():
                    times[who].append(_step(module, optimizers[who], lookups, clip))
            for who, seconds in times.items():
                yield {
                    "huge_pages": setting,
                    "case": "{}x{}/{}, ".format(*table) + name,
                    "who": who,
                    "us": round(median(seconds[WARM_UP:]) * 1e6),
                }


def main() -> None:
    setting = sys.argv[1]
    torch.set_num_threads(2)
    if setting == "never" and ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        raise OSError("this kernel cannot switch huge pages off for a process")
    print(json.dumps(list(_measure_here(setting))))


if __name__ == "__main__":
    main()
