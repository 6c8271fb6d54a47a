"""A clipped step of SGD beside the passes over a dense gradient that no lookup can spare it.

Nobody else looks anything up: there the gradient's memory is cleared, clipped and taken by the
optimizer, by torch's own calls. What nn.Embedding takes, divided by that, bounds what any lookup
with a dense gradient can gain.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.cases import Case, make_indices
from benchmarks.experiments.makers import MAKERS
from benchmarks.timing import garbage_collection_paused

TABLES = ((200_000, 64), (1_000_000, 64), (32_000, 512), (50_257, 768))
TOKENS, DISTRIBUTION = 4096, "zipf-sorted"
ROUNDS, WARMUP = 15, 3
PASSES = {"clearing, norm, scaling, SGD": True, "norm, scaling, SGD": False}


def measure() -> Iterator[dict[str, Any]]:
    """Medians in milliseconds; everyone takes turns."""
    for threads, (rows, width) in itertools.product((1, 2), TABLES):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        for who, seconds in _times(Case(rows, width, TOKENS, DISTRIBUTION)).items():
            plural = "s" * (threads > 1)
            yield {
                "case": f"{rows:,} x {width}, {TOKENS:,} tokens; {threads} thread{plural}",
                "who": who,
                "ms": round(seconds * 1e3, 2),
            }


def _times(case: Case) -> dict[str, float]:
    steps: dict[str, Callable[[Tensor], None]] = {
        who: _lookup_step(make(case.num_embeddings, case.embedding_dim), case)
        for who, make in MAKERS.items()
    }
    steps |= {name: _bare_step(case, clearing) for name, clearing in PASSES.items()}
    batches = make_indices(case, ROUNDS + WARMUP, 0, "cpu", "dense passes")
    times: dict[str, list[float]] = {who: [] for who in steps}
    with garbage_collection_paused():
        for indices in batches:
            for who in random.sample(list(steps), len(steps)):
                start = time.perf_counter()
                steps[who](indices)
                times[who].append(time.perf_counter() - start)
    return {who: median(seconds[WARMUP:]) for who, seconds in times.items()}


def _lookup_step(table: nn.Embedding, case: Case) -> Callable[[Tensor], None]:
    optimizer = torch.optim.SGD(table.parameters(), lr=1e-6)
    grad_output = torch.rand(case.tokens, case.embedding_dim)

    def step(indices: Tensor) -> None:
        # indices: [tokens]
        optimizer.zero_grad()
        table(indices).backward(grad_output)
        clip_grad_norm_(table.weight, 1.0)
        optimizer.step()

    return step


def _bare_step(case: Case, clearing: bool) -> Callable[[Tensor], None]:
    weight = nn.Parameter(torch.randn(case.num_embeddings, case.embedding_dim))
    weight.grad = torch.rand_like(weight)
    optimizer = torch.optim.SGD([weight], lr=1e-6)

    def step(indices: Tensor) -> None:
        if clearing:
            optimizer.zero_grad(set_to_none=False)
        clip_grad_norm_(weight, 1.0)
        optimizer.step()

    return step
