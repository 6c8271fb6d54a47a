"""The backward of models with many small tables, whose cost should be linear in their number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import nn

import embed_ext

TABLES = (100, 400, 1600)
ROWS, WIDTH, TOKENS, ROUNDS = 50, 16, 16, 7
MAKERS: dict[str, Callable[[], nn.Embedding]] = {
    "nn.Embedding": lambda: nn.Embedding(ROWS, WIDTH),
    "embed_ext": lambda: embed_ext.Embedding(ROWS, WIDTH),
    "kept": lambda: embed_ext.Embedding(ROWS, WIDTH, keep_grad_buffer=True),
    "nn.Embedding, sparse": lambda: nn.Embedding(ROWS, WIDTH, sparse=True),
    "coalesced": lambda: embed_ext.Embedding(ROWS, WIDTH, sparse=True, coalesced=True),
}


def measure() -> Iterator[dict[str, Any]]:
    """Medians in microseconds; everyone takes turns."""
    for number in TABLES:
        models = {who: [make() for _ in range(number)] for who, make in MAKERS.items()}
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
