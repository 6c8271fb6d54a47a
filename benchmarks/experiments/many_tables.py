"""The backward of models with many small tables, whose cost should be linear in their number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

import embed_ext
from benchmarks.experiments.makers import MAKERS

TABLES = (100, 400, 1600)
ROWS, WIDTH, TOKENS, ROUNDS = 50, 16, 16, 7
SPARSE_MAKERS: Mapping[str, Callable[[int, int], nn.Embedding]] = {
    "nn.Embedding, sparse": partial(nn.Embedding, sparse=True),
    "coalesced": partial(embed_ext.Embedding, sparse=True, coalesced=True),
}


def measure() -> Iterator[dict[str, Any]]:
    """Medians in microseconds; everyone takes turns."""
    makers = {**MAKERS, **SPARSE_MAKERS}
    for number in TABLES:
        models = {who: [make(ROWS, WIDTH) for _ in range(number)] for who, make in makers.items()}
        times: dict[str, list[float]] = {who: [] for who in models}
        for _ in range(ROUNDS + 1):  # the first warms up
            indices = torch.randint(ROWS, (TOKENS,))
            for who, tables in models.items():
                times[who].append(_backward(tables, indices))
        for who, seconds in times.items():
            yield {"tables": number, "who": who, "us": round(median(seconds[1:]) * 1e6)}


def _backward(tables: list[nn.Embedding], indices: torch.Tensor) -> float:
    loss = torch.stack([table(indices).sum() for table in tables]).sum()
    start = time.perf_counter()
    loss.backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - start
    for table in tables:
        table.zero_grad()
    return seconds
