"""Several lookups of a table in one step, beside one lookup of all their indices at once."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experiments.makers import MAKERS

TABLES = ((200_000, 64, 8192), (1_000_000, 64, 65_536), (50_257, 768, 8192))
USES = (1, 2, 4)
ROUNDS, WARMUP = 20, 4
STEPS = ("forward, backward", "forward, backward, SGD")


def measure() -> Iterator[dict[str, Any]]:
    """Medians in microseconds; everyone takes turns."""
    for threads, table, step in itertools.product((1, 2), TABLES, STEPS):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        case = "{:,} x {}, {:,} tokens".format(*table)
        for (who, uses), seconds in _times(*table, with_optimizer=step == STEPS[1]).items():
            yield {
                "case": f"{case}; {step}; {threads} thread{'s' * (threads > 1)}",
                "who": who,
                "uses": f"{uses} lookup{'s' * (uses > 1)}",
                "us": round(seconds * 1e6),
            }


def _times(
    rows: int, width: int, tokens: int, *, with_optimizer: bool
) -> dict[tuple[str, int], float]:
    variants = {(who, uses): make(rows, width) for who, make in MAKERS.items() for uses in USES}
    times: dict[tuple[str, int], list[float]] = {variant: [] for variant in variants}
    grad_output = torch.randn(tokens, width)
    for _ in range(ROUNDS + WARMUP):
        indices = torch.randint(rows, (tokens,))
        for who, uses in random.sample(list(variants), len(variants)):
            module = variants[who, uses]
            seconds = _step(module, indices, grad_output, uses, with_optimizer)
            times[who, uses].append(seconds)
    return {variant: median(seconds[WARMUP:]) for variant, seconds in times.items()}


def _step(
    module: nn.Embedding, indices: Tensor, grad_output: Tensor, uses: int, with_optimizer: bool
) -> float:
    # indices [tokens], grad_output [tokens, width]: the parts are in memory of their own, as
    # different inputs of a model are.
    parts = [part.clone() for part in indices.chunk(uses)]
    grads = [part.clone() for part in grad_output.chunk(uses)]
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    start = time.perf_counter()
    optimizer.zero_grad()
    torch.autograd.backward([module(part) for part in parts], grads)
    if with_optimizer:
        optimizer.step()
    return time.perf_counter() - start
