"""Catching up beside other features, what cannot catch up, and the products of steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import embed_ext
from embed_ext import optim
from embed_ext.optim._missed_steps import MissedSteps
from tests.common import assert_close, assert_same_bits, generator
from tests.optim.catching_up import (
    ROWS,
    WIDTH,
    make_tables,
    momentum_sgd,
    torchs_momentum_sgd,
    train,
)


def refused_steps() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    return {
        "Adagrad": lambda parameters: optim.Adagrad(parameters, weight_decay=0.1),
        "RowwiseAdagrad": lambda parameters: optim.RowwiseAdagrad(parameters, weight_decay=0.1),
        "Adam": lambda parameters: optim.Adam(parameters, weight_decay=0.1),
    }


@pytest.mark.parametrize("name", refused_steps())
def test_decay_that_is_no_product_is_refused(name: str) -> None:
    table, _ = make_tables()
    optimizer = refused_steps()[name](table.parameters())
    optim.catch_up(optimizer, table)
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match=rf"optim.{name}: rows cannot catch up .* got 0.1"):
        train(table, optimizer, [[2]])
    assert_same_bits(table.weight.detach(), before)


def test_what_is_no_model_of_the_optimizers() -> None:
    table, _ = make_tables()
    optimizer = momentum_sgd(table.parameters())
    with pytest.raises(TypeError, match=r"catch_up: expected an optimizer of embed_ext.optim"):
        optim.catch_up(torch.optim.SGD(table.parameters()), table)
    with pytest.raises(ValueError, match=r"catch_up: expected a model with .* Linear has none"):
        optim.catch_up(optimizer, nn.Linear(2, 2))
    optim.catch_up(optimizer, table)
    with pytest.raises(ValueError, match=r"catch_up: .* without a handle"):
        optim.catch_up(optimizer, table)


@pytest.mark.parametrize("steps", [511, 512, 513, 2100])
def test_products_of_many_steps(steps: int) -> None:
    matrices = torch.eye(2, dtype=torch.float64) + 0.01 * torch.randn(
        steps, 2, 2, dtype=torch.float64, generator=generator(steps)
    )
    missed = MissedSteps(torch.device("cpu"))
    for first, second in matrices.tolist():
        missed.record((tuple(first), tuple(second)))
    assert missed.count == steps
    since = torch.tensor([0, 1, steps // 2, 510, steps - 1, steps])
    for start, actual in zip(since.tolist(), missed.since(since), strict=True):
        expected = torch.eye(2, dtype=torch.float64)
        for matrix in matrices[start:]:
            expected = matrix @ expected
        assert_close(actual, expected)


def check_together(
    prepare: Callable[[Any, Any], object], options: dict[str, Any], compiled: bool = False
) -> None:
    """Train with sparse gradients and catching up, and with dense ones; compare."""
    torch.manual_seed(0)
    sparse = embed_ext.Embedding(ROWS, WIDTH, sparse=True, dtype=torch.float64, **options)
    dense = nn.Embedding(ROWS, WIDTH, _weight=sparse.weight.detach().clone(), **options)
    ours, theirs = momentum_sgd(sparse.parameters()), torchs_momentum_sgd(dense.parameters())
    handle = optim.catch_up(ours, sparse)
    prepare(ours, sparse)
    batches = [[1, 2], [2, 2, 3], [5], [1, 3]]
    train(torch.compile(sparse, backend="eager") if compiled else sparse, ours, batches)
    train(dense, theirs, batches)
    handle.flush()
    assert_close(sparse.weight.detach(), dense.weight.detach())


def test_with_max_norm() -> None:
    check_together(lambda *_: None, {"max_norm": 1.0})


def test_with_the_update_in_the_backward() -> None:
    check_together(lambda optimizer, _: optim.step_in_backward(optimizer), {})


def test_under_the_compiler() -> None:
    torch._dynamo.reset()
    check_together(lambda *_: None, {}, compiled=True)


def test_a_skipped_step_is_not_missed() -> None:
    table, dense = make_tables(torch.float32)
    optimizer, theirs = momentum_sgd(table.parameters()), torchs_momentum_sgd(dense.parameters())
    handle = optim.catch_up(optimizer, table)
    for number, scale in enumerate((1.0, float("inf"), 1.0)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        optimizer.zero_grad()
        scaler.scale(table(torch.tensor([number, 5])).sum() * scale).backward()
        scaler.step(optimizer)
        if scale == 1:
            theirs.zero_grad()
            dense(torch.tensor([number, 5])).sum().backward()
            theirs.step()
    handle.flush()
    assert_close(table.weight.detach(), dense.weight.detach())


@pytest.mark.parametrize("decay", [0.0, 0.25])
@pytest.mark.parametrize("event", ["dense gradient", "momentum loaded", "sparse steps loaded"])
def test_momentum_that_did_not_come_from_lookups(event: str, decay: float) -> None:
    """The same with dense gradients, where an event gives momentum to rows that were never used."""
    weights = []
    for table, kind in zip(make_tables(), (optim.SGD, torch.optim.SGD), strict=True):
        optimizer = kind(table.parameters(), lr=0.1, momentum=0.75, weight_decay=decay)
        handle = optim.catch_up(optimizer, table) if kind is optim.SGD else None
        train(table, optimizer, [[2], [3]])
        if event == "dense gradient":
            table.weight.grad = torch.ones_like(table.weight)
            optimizer.step()
        else:
            state = copy.deepcopy(optimizer.state_dict())
            if event == "momentum loaded":
                state["state"][0]["momentum_buffer"].fill_(1.0)
            train(table, optimizer, [[4], [5]])
            optimizer.load_state_dict(state)
        train(table, optimizer, [[6], [7]])
        if handle is not None:
            handle.flush()
        weights.append(table.weight.detach())
    assert_close(*weights)
