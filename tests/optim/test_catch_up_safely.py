"""Catching up in evaluation, in copies, on other devices, beside infinities, after interrupts."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import embed_ext
from embed_ext import optim
from embed_ext.optim import catching_up
from tests.common import assert_close, assert_same_bits
from tests.optim.catching_up import (
    ROWS,
    WIDTH,
    make_tables,
    momentum_sgd,
    torchs_momentum_sgd,
    train,
)


def begin(batches: list[list[int]]) -> tuple[embed_ext.Embedding, optim.SGD, Any]:
    table, _ = make_tables()
    optimizer = momentum_sgd(table.parameters())
    handle = optim.catch_up(optimizer, table)
    train(table, optimizer, batches)
    return table, optimizer, handle


def dense_steps(batches: list[list[int]]) -> Tensor:
    _, table = make_tables()
    train(table, torchs_momentum_sgd(table.parameters()), batches)
    return table.weight.detach()


@pytest.mark.parametrize("event", ["flush", "state_dict", "lookup"])
def test_training_goes_on_after_inference_mode(event: str) -> None:
    first, then = [[2], [3]], [[4], [2, 5]]
    table, optimizer, handle = begin(first)
    with torch.inference_mode():
        if event == "lookup":
            table(torch.tensor([2, 7]))
        else:
            handle.flush() if event == "flush" else table.state_dict()
    train(table, optimizer, then)
    handle.flush()
    _, dense = make_tables()
    theirs = torchs_momentum_sgd(dense.parameters())
    train(dense, theirs, first)
    train(dense, theirs, then)
    assert_close(table.weight.detach(), dense.weight.detach())


def saved_and_loaded(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_is_a_model_of_its_own(copied: Callable[[nn.Module], Any]) -> None:
    table, _, handle = begin([[2], [3]])
    other = copied(table)
    before = table.weight.detach().clone()
    other.load_state_dict(other.state_dict())
    assert_same_bits(other(torch.tensor([2])), before[[2]])
    assert_same_bits(table.weight.detach(), before)
    handle.flush()
    assert_close(table.weight.detach(), dense_steps([[2], [3]]))


def test_an_infinite_weight_stays_one() -> None:
    weights = []
    for table, kind in zip(make_tables(), (optim.SGD, torch.optim.SGD), strict=True):
        with torch.no_grad():
            table.weight[5, 0] = -torch.inf
        optimizer = kind(table.parameters(), lr=0.1, momentum=0.75)
        handle = optim.catch_up(optimizer, table) if kind is optim.SGD else None
        for batch in ([5], [2], [5], [3]):
            optimizer.zero_grad()
            table(torch.tensor(batch)).exp().sum().backward()
            optimizer.step()
        if handle is not None:
            handle.flush()
        weights.append(table.weight.detach())
    assert weights[1][5, 0] == -torch.inf
    assert_close(*weights)


def test_nothing_is_moved_where_nothing_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = make_tables()
    optimizer = optim.SGD(table.parameters(), lr=0.1, momentum=0.75)
    handle = optim.catch_up(optimizer, table)
    train(table, optimizer, [[2], [3]])
    handle.flush()
    monkeypatch.setattr(handle, "_move", lambda *_: pytest.fail("moved again"))
    table(torch.tensor([2, 7]))
    handle.flush()


def test_a_table_that_is_saved_for_the_backward() -> None:
    """By a bag whose weights of samples are learned, before other rows of it catch up."""
    weights = []
    for sparse in (True, False):
        weight = make_tables()[1].weight.detach().clone()
        bag = nn.EmbeddingBag(ROWS, WIDTH, mode="sum", sparse=sparse, _weight=weight)
        factors = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
        kind = optim.SGD if sparse else torch.optim.SGD
        optimizer = kind([bag.weight, factors], lr=0.1, momentum=0.75, weight_decay=0.25)
        handle = optim.catch_up(optimizer, bag) if kind is optim.SGD else None
        for step in range(4):
            optimizer.zero_grad()
            outputs = [bag(torch.tensor([[row, 9]]), None, factors) for row in (step, step + 4)]
            torch.cat(outputs).sin().sum().backward()
            optimizer.step()
        if handle is not None:
            handle.flush()
        weights.append((bag.weight.detach(), factors.detach()))
    for actual, expected in zip(*weights, strict=True):
        assert_close(actual, expected)


def test_removing_twice_leaves_the_next_handle_alone() -> None:
    table, optimizer, handle = begin([[2], [3]])
    handle.remove()
    following = optim.catch_up(optimizer, table)
    handle.remove()
    train(table, optimizer, [[4], [2, 5]])
    following.flush()
    _, dense = make_tables()
    theirs = torchs_momentum_sgd(dense.parameters())
    train(dense, theirs, [[2], [3]])
    train(dense, theirs, [[4], [2, 5]])
    assert_close(table.weight.detach(), dense.weight.detach())


@pytest.mark.parametrize("fails_at", [1, 2, 4])
@pytest.mark.parametrize("event", ["flush", "lookup"])
def test_whoever_is_interrupted_may_try_again(
    event: str, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catching_up, "_MOST_ELEMENTS", 2 * WIDTH)
    batches = [[2, 3], [4], [5], [5]]
    table, _, handle = begin(batches)
    momentum, calls = handle._momentum(table.weight), 0
    index_select = Tensor.index_select

    def interrupted(self: Tensor, *args: Any) -> Tensor:
        nonlocal calls
        calls += self is momentum
        if calls == fails_at:
            raise KeyboardInterrupt
        return index_select(self, *args)

    def catch_up() -> None:
        if event == "flush":
            handle.flush()
        else:
            table(torch.tensor([7, 2, 7, 3, 2, 9, 10, 11, 12, 4]))

    monkeypatch.setattr(Tensor, "index_select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        catch_up()
    monkeypatch.setattr(Tensor, "index_select", index_select)
    catch_up()
    handle.flush()
    assert_close(table.weight.detach(), dense_steps(batches))


def test_a_choice_among_entries_that_fails_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [[2, 3], [4], [5]]
    table, _, handle = begin(batches)
    nonzero, calls = Tensor.nonzero, 0

    def out_of_memory(self: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError
        return nonzero(self)

    monkeypatch.setattr(Tensor, "nonzero", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        table(torch.tensor([ROWS - 1, 7, 2, 7, 3]))
    monkeypatch.setattr(Tensor, "nonzero", nonzero)
    handle.flush()
    assert_close(table.weight.detach(), dense_steps(batches))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_that_is_moved(steps: int, device: str) -> None:
    tables, batches = make_tables(), [[1, 2], [3, 3, 5], [1, 8, 3, 1], [9]]
    for table, kind in zip(tables, (optim.SGD, torch.optim.SGD), strict=True):
        optimizer = kind(table.parameters(), lr=0.1, weight_decay=0.25)
        handle = optim.catch_up(optimizer, table) if kind is optim.SGD else None
        train(table, optimizer, batches[:steps])
        table.to(device)
        train(table, optimizer, batches[steps:])
        if handle is not None:
            handle.flush()
    assert_close(tables[0].weight.detach(), tables[1].weight.detach())


def test_what_is_known_of_a_table_goes_where_it_goes() -> None:
    with FakeTensorMode():
        table, _ = make_tables()
        handle = optim.catch_up(momentum_sgd(table.parameters()), table)
        moved = torch.empty(ROWS, WIDTH, device="cuda")
        handle._tables[moved] = handle._tables[table.weight]
        known = handle._known(moved)
    assert known is not None
    assert known.last.device == moved.device
    missed = known.missed
    assert {missed._within.device, missed._after.device} == {moved.device}
