"""A step of SGD, clipped or not, beside the passes over a dense gradient that no lookup spares it.

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

from benchmarks.cases import Case, make_data
from benchmarks.providers import BASELINE, KEPT, SUBJECT, get_provider
from benchmarks.steps import LEARNING_RATE, Step, StepBatch, make_step_data, training_step
from benchmarks.timing import garbage_collection_paused

TABLES = ((200_000, 64), (1_000_000, 64), (32_000, 512), (50_257, 768))
TOKENS, DISTRIBUTION = 4096, "zipf-sorted"
ROUNDS, WARMUP = 15, 3
LOOKUPS = (BASELINE, SUBJECT, KEPT)
STEPS = {"SGD": Step(), "clipping + SGD": Step(clip=True)}
PASSES = {"clearing and torch's passes": True, "torch's passes": False}


def measure() -> Iterator[dict[str, Any]]:
    """Medians in milliseconds; everyone takes turns."""
    for threads, name, (rows, width) in itertools.product((1, 2), STEPS, TABLES):
        torch.set_num_threads(threads)
        for who, seconds in _times(Case(rows, width, TOKENS, DISTRIBUTION), STEPS[name]).items():
            plural = "s" * (threads > 1)
            yield {
                "case": f"{name}, {rows:,} x {width}, {TOKENS:,} tokens; {threads} thread{plural}",
                "who": who,
                "ms": round(seconds * 1e3, 2),
            }


def _times(case: Case, kind: Step) -> dict[str, float]:
    data = make_data(case, batches=1, device="cpu", seed=0)
    step = make_step_data(data, kind, batches=ROUNDS + WARMUP, seed=0, device="cpu")
    steps: dict[str, Callable[[StepBatch], None]] = {
        who: training_step(get_provider(who).build(data.weight, None), step, LEARNING_RATE)
        for who in LOOKUPS
    }
    steps |= {
        name: _bare_step(data.weight, clearing, kind.clip) for name, clearing in PASSES.items()
    }
    times: dict[str, list[float]] = {who: [] for who in steps}
    with garbage_collection_paused():
        for batch in step.batches:
            for who in random.sample(list(steps), len(steps)):
                start = time.perf_counter()
                steps[who](batch)
                times[who].append(time.perf_counter() - start)
    return {who: median(seconds[WARMUP:]) for who, seconds in times.items()}


def _bare_step(table: Tensor, clearing: bool, clip: bool) -> Callable[[StepBatch], None]:
    # table: [num_embeddings, embedding_dim]
    weight = nn.Parameter(table)
    weight.grad = torch.rand_like(weight)
    optimizer = torch.optim.SGD([weight], lr=LEARNING_RATE)

    def step(_: StepBatch) -> None:
        if clearing:
            optimizer.zero_grad(set_to_none=False)
        if clip:
            clip_grad_norm_(weight, 1.0)
        optimizer.step()

    return step
