"""Hogwild: processes that train one table in shared memory, each when it likes.

Niu, Recht, Re and Wright, "Hogwild!: A Lock-Free Approach to Parallelizing Stochastic Gradient
Descent", 2011. What is asserted holds whatever the order in which they come to read and write.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import embed_ext
from embed_ext import optim
from tests import forkserver
from tests.common import assert_same_bits, make_indices

# So many rows that a state lies in memory of its own kind until it is shared.
NUM_ROWS, WIDTH, STEPS = 300_000, 4, 200
PER_PROCESS = 50  # rows
LR = 0.5
JOIN_S = 300
Trained = tuple[nn.Sequential, Optimizer]


def train_apart(model: nn.Sequential, optimizer: Optimizer, rank: int) -> None:
    """Train rows that no other process uses; some come several times in a batch."""
    for step in range(STEPS):
        indices = PER_PROCESS * rank + make_indices((40,), PER_PROCESS, seed=10 * rank + step)
        optimizer.zero_grad()
        model(indices).square().mean().backward()
        optimizer.step()


def train_together(model: nn.Sequential, optimizer: Optimizer, rank: int) -> None:
    """Lower the same rows; the gradient of each element is 1, whatever it is at the time."""
    for _ in range(STEPS):
        optimizer.zero_grad()
        model[0](torch.arange(PER_PROCESS)).sum().backward()
        optimizer.step()


def work(rank: int, train: Callable[..., None], trained: list[Trained]) -> None:
    torch.set_num_threads(1)
    for model, optimizer in trained:
        train(model, optimizer, rank)


def run(train: Callable[..., None], processes: int, trained: list[Trained]) -> None:
    """Call train(model, optimizer, rank) of all of these in each process, at the same time."""
    context = forkserver.start(work, (train, trained), processes)
    try:
        # A call returns when one of them is through.
        assert any(context.join(timeout=JOIN_S) for _ in range(processes)), "they are not through"
    finally:
        for process in context.processes:
            process.kill()


def make_trained() -> list[Trained]:
    """Models in shared memory, and optimizers whose states are there too, if they have any."""
    trained: list[Trained] = []
    for kind in (optim.SGD, optim.RowwiseAdagrad):
        torch.manual_seed(0)
        table = embed_ext.Embedding(NUM_ROWS, WIDTH, sparse=True, coalesced=True)
        model = nn.Sequential(table, nn.Linear(WIDTH, 3).requires_grad_(False))
        optimizer: Any = kind(table.parameters(), lr=LR)
        with torch.no_grad():
            table.weight.mul_(8).round_()  # so that sums of a few are exact
        train_together(model, optimizer, 0)
        optimizer.zero_grad()  # torch cannot share a sparse gradient
        model.share_memory()
        if kind is optim.RowwiseAdagrad:
            optimizer.share_memory()
        trained.append((model, optimizer))
    return trained


def weight_of(model: nn.Sequential) -> Tensor:
    """The table [V, D]."""
    table: Any = model[0]
    return table.weight.detach()


def sums(optimizer: Optimizer) -> Tensor:
    """The sums of the one table, [V]."""
    ((_, state),) = optimizer.state.items()
    return state["sum"]


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_their_own(processes: int) -> None:
    trained = make_trained()
    alone = copy.deepcopy(trained)
    run(train_apart, processes, trained)
    for model, optimizer in alone:
        before = weight_of(model).clone()
        for rank in range(processes):
            train_apart(model, optimizer, rank)
        changed = (weight_of(model) != before).any(dim=1)
        assert 0 < changed.sum() <= processes * PER_PROCESS
    for (model, _), (expected, _) in zip(trained, alone, strict=True):
        assert_same_bits(weight_of(model), weight_of(expected))
    assert_same_bits(sums(trained[1][1]), sums(alone[1][1]))


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_all(processes: int) -> None:
    """A step may overwrite another, so that there is less than of all, and more than nothing."""
    trained = make_trained()
    before = copy.deepcopy(trained)
    run(train_together, processes, trained)
    for (model, _), (old, _) in zip(trained, before, strict=True):
        lowered = weight_of(old) - weight_of(model)
        assert_same_bits(lowered[PER_PROCESS:], torch.zeros(NUM_ROWS - PER_PROCESS, WIDTH))
        assert (lowered[:PER_PROCESS] > 0).all()
        assert (lowered[:PER_PROCESS] <= LR * STEPS * processes).all()
    added = (sums(trained[1][1]) - sums(before[1][1]))[:PER_PROCESS]
    assert ((added >= 1) & (added <= STEPS * processes)).all()
    steps = (weight_of(before[0][0]) - weight_of(trained[0][0]))[:PER_PROCESS] / LR
    assert_same_bits(steps, steps.round())  # no element is torn
