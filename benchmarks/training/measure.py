"""Checks that trainers of a method do the same, then times their steps in turns."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, make_data
from benchmarks.record import significant
from benchmarks.stats import summarise
from benchmarks.timing import garbage_collection_paused, turns
from benchmarks.training.trainers import SUBJECT, Trained, Trainer
from benchmarks.verify import WrongResult

BATCHES = 4
# While steps are timed the table stays what it was, whatever the number of rounds.
TIMED_RATE = 1e-6
CHECKED_RATE = 0.1


@dataclass(frozen=True)
class Options:
    """How long is measured."""

    rounds: int = 15
    budget: float = 20.0  # seconds for the steps of one method on one case
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """What one trainer took; seconds a step."""

    case: str
    num_embeddings: int
    method: str
    trainer: str
    median: float
    p10: float
    p90: float
    rounds: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_alike(
    trained: dict[str, Trained], batches: Sequence[Sequence[Tensor]], grad_output: Tensor
) -> None:
    """Take a step with each on all batches; tables that differ by more than rounding raise."""
    for one in trained.values():
        for uses in batches:
            one.step(uses, grad_output)
    expected = trained[SUBJECT].weight()
    # A row of many tokens moves far, and those who add to it token by token round each time.
    allowed = 1e-3 * CHECKED_RATE + 1e-4 * expected.abs()
    for name, other in trained.items():
        difference = (other.weight() - expected).abs()
        if not bool((difference <= allowed).all()):
            raise WrongResult(
                f"{name} moves an element by {float(difference.max()):.3g} more than {SUBJECT}"
            )


def measure(case: Case, trainers: Sequence[Trainer], options: Options) -> Iterator[Timing]:
    """The trainers of one method on one case; those that are missing here are left out."""
    uses = trainers[0].step.uses
    data = make_data(case, batches=BATCHES * uses, device="cpu", seed=options.seed)
    batches = [data.batches[i : i + uses] for i in range(0, len(data.batches), uses)]
    present = [trainer for trainer in trainers if trainer.unavailable() is None]

    def build_all(learning_rate: float) -> dict[str, Trained]:
        return {t.name: t.build(data.weight.clone(), learning_rate) for t in present}

    # One batch: dense Adam goes on to move rows that no later batch has.
    check_alike(build_all(CHECKED_RATE), batches[:1], data.grad_output)
    trained = build_all(TIMED_RATE)
    for one in trained.values():  # the memory of a row's state comes to be with its first step
        for batch in batches:
            one.step(batch, data.grad_output)
    seconds: dict[str, list[float]] = {name: [] for name in trained}
    shuffler = random.Random(options.seed)
    order = turns(trained, rounds=options.rounds, budget=options.budget, shuffler=shuffler)
    with garbage_collection_paused():
        for done, name in order:
            start = time.perf_counter()
            trained[name].step(batches[done % BATCHES], data.grad_output)
            seconds[name].append(time.perf_counter() - start)
    for name, own in seconds.items():
        summary = summarise(own)
        yield Timing(
            case.name,
            case.num_embeddings,
            trainers[0].method,
            name,
            significant(summary.median),
            significant(summary.p10),
            significant(summary.p90),
            len(own),
        )


def set_threads(count: int | None) -> int:
    """Use that many threads, if it is given; returns how many are used."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()
