"""A few optimiser steps leave the table where nn.Embedding's steps leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.common import assert_close, make_indices
from tests.composability.lookups import make_pair

NUM_ROWS, WIDTH, STEPS = 20, 4, 6
Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

DENSE: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
SPARSE: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sparse_adam": lambda p: torch.optim.SparseAdam(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
TABLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "scaled": {"scale_grad_by_freq": True},
    "max_norm": {"max_norm": 1.0},
}
DENSE_ONLY = "scaled"  # torch turns it down where the gradient is sparse


def trained(table: nn.Embedding, make_optimizer: Optimizer) -> Tensor:
    """The table [V, D] after a few steps towards small, smooth rows."""
    optimizer = make_optimizer([table.weight])
    for step in range(STEPS):
        optimizer.zero_grad()
        out = table(make_indices((5, 3), NUM_ROWS, seed=step))
        (out.square().mean() + out.roll(1, dims=0).mul(out).mean()).backward()
        optimizer.step()
    return table.weight.detach()


@pytest.mark.parametrize("options", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("make_optimizer", DENSE.values(), ids=DENSE)
def test_dense_steps(make_optimizer: Optimizer, options: dict[str, Any]) -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, **options)
    start = ours.weight.detach().clone()
    expected, actual = trained(theirs, make_optimizer), trained(ours, make_optimizer)
    assert_close(actual, expected)
    assert not torch.equal(actual, start)


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("options", [name for name in TABLES if name != DENSE_ONLY])
@pytest.mark.parametrize("make_optimizer", SPARSE.values(), ids=SPARSE)
def test_sparse_steps(make_optimizer: Optimizer, options: str, coalesced: bool) -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, sparse=True, **TABLES[options])
    ours.coalesced = coalesced
    start = ours.weight.detach().clone()
    expected, actual = trained(theirs, make_optimizer), trained(ours, make_optimizer)
    assert_close(actual, expected)
    assert not torch.equal(actual, start)


def test_sparse_scaled_steps_agree_with_dense_ones() -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, scale_grad_by_freq=True)
    ours.sparse = True
    assert_close(trained(ours, SPARSE["sgd"]), trained(theirs, SPARSE["sgd"]))


def test_padding_row_stays_as_it_was() -> None:
    _, ours = make_pair(NUM_ROWS, WIDTH, padding_idx=3)
    with torch.no_grad():
        ours.weight[3] = 2.0
    assert trained(ours, DENSE["adam"])[3].tolist() == [2.0] * WIDTH


def test_tied_output_layer() -> None:
    results = []
    for table in make_pair(NUM_ROWS, WIDTH):
        head = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        head.weight = table.weight
        optimizer = torch.optim.SGD(nn.ModuleList([table, head]).parameters(), lr=0.5)
        losses = []
        for step in range(STEPS):
            tokens = make_indices((4, 9), NUM_ROWS, seed=step)
            logits = head(table(tokens[:, :-1]))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append(torch.cat([torch.stack(losses), table.weight.detach().flatten()]))
    assert_close(results[1], results[0])


def test_gradients_accumulated_over_micro_batches() -> None:
    results = []
    for table in make_pair(NUM_ROWS, WIDTH):
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
        for step in range(STEPS):
            for part in range(3):
                table(make_indices((4,), NUM_ROWS, seed=10 * step + part)).square().sum().backward()
            nn.utils.clip_grad_norm_(table.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        results.append(table.weight.detach())
    assert_close(results[1], results[0])
