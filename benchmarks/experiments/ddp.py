"""A training step of two processes with DistributedDataParallel, one thread each.

The table is used twice. Its gradient is summed over the processes by gloo, on this machine.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from benchmarks.experiments.makers import MAKERS
from benchmarks.providers import BASELINE
from benchmarks.timing import garbage_collection_paused
from benchmarks.verify import WrongResult

PROCESSES, BATCHES, WARM_UP = 2, 4, 3
STEPS = {"SGD": False, "clip + SGD": True}
ALL_REDUCE = "the all-reduce alone"
LARGEST_DIFFERENCE = 1e-5  # of the largest element: sums of different order


@dataclass(frozen=True)
class Sizes:
    num_embeddings: int = 200_000
    embedding_dim: int = 64
    tokens: int = 2048  # of each use, in each process
    rounds: int = 15


class Pairs(nn.Module):
    """A score for each pair of rows."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self.score = nn.Linear(table.embedding_dim, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        # pairs: [2, tokens]; the scores: [tokens, 1]
        scores: Tensor = self.score(self.table(pairs[0]) * self.table(pairs[1]))
        return scores


@dataclass
class Trained:
    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    clip: bool
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def make(cls, table: Callable[[int, int], nn.Embedding], sizes: Sizes, clip: bool) -> Trained:
        torch.manual_seed(0)
        model = DistributedDataParallel(Pairs(table(sizes.num_embeddings, sizes.embedding_dim)))
        return cls(model, torch.optim.SGD(model.parameters(), lr=0.1), clip)

    def train(self, pairs: Tensor) -> Tensor:
        # pairs: [2, tokens]
        dist.barrier()  # or the step has the other process's delay in it
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss: Tensor = self.model(pairs).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.clip:
            clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        return loss.detach()


def measure(sizes: Sizes | None = None) -> list[dict[str, Any]]:
    """Medians in milliseconds of the first process; everyone takes turns."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, sizes or Sizes())
        start_processes(_work, arguments, PROCESSES, start_method="spawn")  # type: ignore[no-untyped-call]
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows").read_text())
    return rows


def _work(rank: int, folder: str, sizes: Sizes) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    try:
        rows = list(_measure_here(sizes, rank))
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "rows").write_text(json.dumps(rows))


def _measure_here(sizes: Sizes, rank: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(rank)
    batches = torch.randint(
        sizes.num_embeddings, (BATCHES, 2, sizes.tokens), generator=generator
    ).unbind()
    # Collectives must come in one order in all processes.
    shuffler = random.Random(0)
    for step, clip in STEPS.items():
        variants = {who: Trained.make(make, sizes, clip) for who, make in MAKERS.items()}
        for pairs in batches:
            check_step(variants, pairs)
        gradient = torch.zeros(sizes.num_embeddings, sizes.embedding_dim)
        all_reduces: list[float] = []
        with garbage_collection_paused():
            for done in range(WARM_UP + sizes.rounds):
                all_reduces.append(_all_reduce(gradient))
                for who in shuffler.sample(list(variants), len(variants)):
                    variants[who].train(batches[done % BATCHES])
        times = {who: trained.seconds for who, trained in variants.items()}
        for who, seconds in {**times, ALL_REDUCE: all_reduces}.items():
            milliseconds = median(seconds[-sizes.rounds :]) * 1e3
            yield {"step": step, "who": who, "ms": round(milliseconds, 2)}


def _all_reduce(gradient: Tensor) -> float:
    # gradient: [num_embeddings, embedding_dim]
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(gradient)
    return time.perf_counter() - start


def check_step(variants: dict[str, Trained], pairs: Tensor) -> None:
    """Take a step with each; raises WrongResult if losses, gradients or weights differ."""
    # pairs: [2, tokens]
    results = {}
    for who, trained in variants.items():
        results[who] = {"loss": trained.train(pairs)}
        for name, parameter in trained.model.named_parameters():
            assert parameter.grad is not None
            results[who] |= {f"gradient of {name}": parameter.grad, name: parameter.detach()}
    for who, own in results.items():
        for name, expected in results[BASELINE].items():
            difference = float((own[name] - expected).abs().max())
            if not difference <= LARGEST_DIFFERENCE * float(expected.abs().max()):
                raise WrongResult(f"{who}: {name} differs from {BASELINE}'s by {difference:.3g}")
