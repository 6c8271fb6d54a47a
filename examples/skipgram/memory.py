"""Peak memory of a few training steps, measured in processes of their own.

Where malloc happens to place a buffer decides whether it can be used again, so that one and the
same program takes one large temporary more in some processes than in others.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from skipgram.batches import Batch
from skipgram.train import Contender

MIB = 2**20
PROCESSES = 3


@dataclass(frozen=True)
class Memory:
    """Resident memory of one process, in MiB."""

    before_mib: float  # Python, torch and the batches, after one step of a one-row model
    peak_mib: float  # the most at any moment of training

    @property
    def training_mib(self) -> float:
        """What the model, its gradients, its optimizer and its temporaries added."""
        return self.peak_mib - self.before_mib


def peak_bytes() -> int:
    """The most resident memory this process has held so far."""
    # Linux's ru_maxrss survives exec, so a child would report its parent's peak; VmHWM does not.
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_memory(
    build: Callable[[int], Contender],
    vocab_size: int,
    batches: Iterator[Batch],
    steps: int,
    threads: int,
) -> Memory:
    """Run ``steps`` steps of ``build(vocab_size)``, alone in fresh processes; return the least.

    Args:
        build: makes a contender with tables of so many rows; picklable, for the process starts
            from nothing.
        vocab_size: rows of each table.
        batches: where the steps' input comes from.
        steps: how many steps to run; two are enough to hold gradients and optimizer state.
        threads: torch's number of threads in that process.
    """
    tensors = [(batch.centres, batch.candidates) for batch in islice(batches, steps)]
    spawn = multiprocessing.get_context("spawn")
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batches.pt"
        torch.save(tensors, file)
        for _ in range(PROCESSES):
            with ProcessPoolExecutor(1, spawn) as pool:
                one = pool.submit(_train_alone, build, vocab_size, file, threads)
                measured.append(one.result())
    return min(measured, key=lambda memory: memory.training_mib)


def _train_alone(
    build: Callable[[int], Contender], vocab_size: int, file: Path, threads: int
) -> Memory:
    torch.set_num_threads(threads)
    batches = [Batch(*tensors) for tensors in torch.load(file)]
    # What torch loads on its first step is not the model's: a one-row model loads it beforehand.
    rows = torch.zeros(8, 2, dtype=torch.int64)
    build(1).step(Batch(rows[:, 0], rows), data_seconds=0.0)
    before = peak_bytes()
    contender = build(vocab_size)
    for batch in batches:
        contender.step(batch, data_seconds=0.0)
    return Memory(before / MIB, peak_bytes() / MIB)
