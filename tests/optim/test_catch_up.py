"""Rows that catch up: lazy steps that end where torch's dense optimizer ends."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

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

SGD_OPTIONS: dict[str, dict[str, Any]] = {
    "decay": {"weight_decay": 0.25},
    "momentum": {"momentum": 0.75},
    "decay_and_momentum": {"weight_decay": 0.25, "momentum": 0.75},
    "dampening": {"weight_decay": 0.25, "momentum": 0.75, "dampening": 0.5, "maximize": True},
    "nesterov": {"weight_decay": 0.25, "momentum": 0.75, "nesterov": True},
}


BATCHES = st.lists(
    st.lists(st.integers(0, ROWS - 1), min_size=0, max_size=12), min_size=1, max_size=8
)


@pytest.mark.parametrize("name", SGD_OPTIONS)
@settings(max_examples=60, deadline=None)
@given(batches=BATCHES)
def test_sgd_is_torchs_dense_sgd(name: str, batches: list[list[int]]) -> None:
    sparse, dense = make_tables()
    ours = optim.SGD(sparse.parameters(), lr=0.1, **SGD_OPTIONS[name])
    theirs = torch.optim.SGD(dense.parameters(), lr=0.1, **SGD_OPTIONS[name])
    handle = optim.catch_up(ours, sparse)
    outputs = train(sparse, ours, batches), train(dense, theirs, batches)
    for actual, expected in zip(*outputs, strict=True):
        assert_close(actual, expected)
    handle.flush()
    assert_close(sparse.weight.detach(), dense.weight.detach())
    if "momentum" in SGD_OPTIONS[name]:
        buffers = [o.state_dict()["state"][0]["momentum_buffer"] for o in (ours, theirs)]
        assert_close(*buffers)


def decayed_by_hand(weight: Tensor, kind: Any, batches: list[list[int]], **options: Any) -> Tensor:
    """Adam's lazy steps of rows in use, and a decay of all others."""
    table = embed_ext.Embedding(ROWS, WIDTH, sparse=True, padding_idx=1, _weight=weight.clone())
    optimizer = kind(table.parameters(), **options)
    for number, batch in enumerate(batches):
        train(table, optimizer, [batch], seed=number)
        unused = torch.ones(ROWS, dtype=torch.bool)
        unused[[row for row in batch if row != 1]] = False
        table.weight.data[unused] *= 1 - options["lr"] * options["weight_decay"]
    return table.weight.detach()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.AdamW, {}),
        (optim.Adam, {"decoupled_weight_decay": True}),
        (optim.RowwiseAdam, {"decoupled_weight_decay": True}),
    ],
)
@settings(max_examples=60, deadline=None)
@given(batches=BATCHES)
def test_adamws_decay_reaches_every_row(
    kind: Any, options: dict[str, Any], batches: list[list[int]]
) -> None:
    table, _ = make_tables()
    options = {"lr": 0.1, "weight_decay": 0.5, **options}
    expected = decayed_by_hand(table.weight.detach(), kind, batches, **options)
    optimizer = kind(table.parameters(), **options)
    handle = optim.catch_up(optimizer, table)
    train(table, optimizer, batches)
    handle.flush()
    assert_close(table.weight.detach(), expected)


@pytest.mark.parametrize("name", SGD_OPTIONS)
def test_every_device(name: str, device: str) -> None:
    sparse, dense = make_tables(torch.float32, device)
    ours = optim.SGD(sparse.parameters(), lr=0.1, **SGD_OPTIONS[name])
    theirs = torch.optim.SGD(dense.parameters(), lr=0.1, **SGD_OPTIONS[name])
    handle = optim.catch_up(ours, sparse)
    batches = [[1, 2], [3, 3, 5], [1, 8, 3, 1], [9]]
    outputs = train(sparse, ours, batches), train(dense, theirs, batches)
    for actual, expected in zip(*outputs, strict=True):
        assert_close(actual, expected)
    handle.flush()
    assert_close(sparse.weight.detach(), dense.weight.detach())


def test_options_that_change_from_step_to_step() -> None:
    sparse, dense = make_tables()
    options = {"lr": 0.5, "weight_decay": 0.25, "momentum": 0.5}
    ours, theirs = (
        optim.SGD(sparse.parameters(), **options),
        torch.optim.SGD(dense.parameters(), **options),
    )
    handle = optim.catch_up(ours, sparse)
    for table, optimizer in ((sparse, ours), (dense, theirs)):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.75)
        for number in range(9):
            optimizer.param_groups[0]["momentum"] = (0.5, 0.0, 0.75)[number % 3]
            train(table, optimizer, [[number, 5, 20 - number]], seed=number)
            schedule.step()
    handle.flush()
    assert_close(sparse.weight.detach(), dense.weight.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_to_rounding(dtype: torch.dtype) -> None:
    sparse, _ = make_tables(dtype)
    wide = nn.Embedding(ROWS, WIDTH, padding_idx=1, _weight=sparse.weight.detach().double())
    options = {"lr": 0.01, "weight_decay": 0.25, "momentum": 0.5}
    ours = optim.SGD(sparse.parameters(), **options)
    handle = optim.catch_up(ours, sparse)
    batches = [[step, 3, 30 - step] for step in range(12)]
    train(sparse, ours, batches)
    train(wide, torch.optim.SGD(wide.parameters(), **options), batches)
    handle.flush()
    tolerance = 20 * torch.finfo(dtype).eps  # a rounding a use
    torch.testing.assert_close(
        sparse.weight.detach().double(), wide.weight.detach(), rtol=tolerance, atol=tolerance
    )


def test_dense_gradients_in_between() -> None:
    tables = make_tables()
    ours = momentum_sgd(tables[0].parameters())
    theirs = torchs_momentum_sgd(tables[1].parameters())
    handle = optim.catch_up(ours, tables[0])
    for table, optimizer in zip(tables, (ours, theirs), strict=True):
        train(table, optimizer, [[1, 2], [2, 3]])
        table.weight.grad = torch.ones_like(table.weight)
        optimizer.step()
        train(table, optimizer, [[4, 2], [3, 3]])
    handle.flush()
    assert_close(tables[0].weight.detach(), tables[1].weight.detach())


@pytest.mark.parametrize("save", ["model", "optimizer"])
def test_saving_brings_all_rows_up_to_date(save: str) -> None:
    tables = make_tables()
    model = nn.ModuleDict({"table": tables[0]})
    ours = momentum_sgd(model.parameters())
    theirs = torchs_momentum_sgd(tables[1].parameters())
    optim.catch_up(ours, model)
    for table, optimizer in zip(tables, (ours, theirs), strict=True):
        train(table, optimizer, [[1, 2], [2, 3], [5, 5]])
    assert not torch.allclose(tables[0].weight, tables[1].weight)
    state = model.state_dict() if save == "model" else ours.state_dict()["state"][0]
    assert_close(tables[0].weight.detach(), tables[1].weight.detach())
    if save == "optimizer":
        assert_close(state["momentum_buffer"], theirs.state[tables[1].weight]["momentum_buffer"])
    else:
        assert_close(state["table.weight"], tables[1].weight.detach())


def test_a_resumed_run_ends_with_the_same_bits() -> None:
    batches = [[step, 3, 30 - step] for step in range(8)]

    def begin() -> tuple[embed_ext.Embedding, optim.SGD, Any]:
        table, _ = make_tables(torch.float32)
        optimizer = momentum_sgd(table.parameters())
        return table, optimizer, optim.catch_up(optimizer, table)

    table, optimizer, handle = begin()
    train(table, optimizer, batches[:4])
    saved = copy.deepcopy((table.state_dict(), optimizer.state_dict()))
    train(table, optimizer, batches[4:])
    handle.flush()
    resumed, other, resumed_handle = begin()
    train(resumed, other, [[7, 8, 9]])  # what is loaded has missed none of this
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(resumed, other, batches[4:])
    resumed_handle.flush()
    assert_same_bits(resumed.weight.detach(), table.weight.detach())


def test_rows_that_were_never_used_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 1 << 20
    table = embed_ext.Embedding(rows, 2, sparse=True, _weight=torch.ones(rows, 2))
    optimizer = optim.SGD(table.parameters(), lr=0.1, momentum=0.5)
    handle = optim.catch_up(optimizer, table)
    moved: list[int] = []
    move = handle._move

    def note(table: Tensor, own: Any, rows: Tensor, last: Tensor) -> None:
        moved.extend(rows.tolist())
        move(table, own, rows, last)

    monkeypatch.setattr(handle, "_move", note)
    for batch in ([5, 900_000], [7], [7]):
        optimizer.zero_grad()
        table(torch.tensor(batch)).sum().backward()
        optimizer.step()
    moved.clear()
    handle.flush()
    assert sorted(moved) == [5, 900_000]
    optimizer.zero_grad()
    table(torch.tensor([11])).sum().backward()
    optimizer.step()
    moved.clear()
    handle.flush()  # the first flush has not forgotten who has momentum
    assert sorted(moved) == [5, 7, 900_000]


def test_rows_that_are_moved_in_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catching_up, "_MOST_ELEMENTS", WIDTH)
    monkeypatch.setattr(catching_up, "_MOST_ROWS", 7)
    sparse, dense = make_tables()
    ours, theirs = momentum_sgd(sparse.parameters()), torchs_momentum_sgd(dense.parameters())
    handle = optim.catch_up(ours, sparse)
    batches = [[2, 3], [4], [2, 2, 5, 2, 5, 6, 2, 7, 2, 5], [6]]
    for table, optimizer in ((sparse, ours), (dense, theirs)):
        train(table, optimizer, batches)
    handle.flush()
    assert_close(sparse.weight.detach(), dense.weight.detach())


def test_a_bag_catches_up() -> None:
    tables = [nn.EmbeddingBag(ROWS, WIDTH, sparse=sparse) for sparse in (True, False)]
    tables[1].load_state_dict(tables[0].state_dict())
    ours = momentum_sgd(tables[0].parameters())
    theirs = torchs_momentum_sgd(tables[1].parameters())
    handle = optim.catch_up(ours, tables[0])
    for table, optimizer in zip(tables, (ours, theirs), strict=True):
        for step in range(4):
            optimizer.zero_grad()
            bags = torch.tensor([[step, 7], [9, 9 - step]])
            table(input=bags).square().sum().backward()
            optimizer.step()
    handle.flush()
    assert_close(tables[0].weight.detach(), tables[1].weight.detach())


def test_reading_past_the_module() -> None:
    table, _ = make_tables()
    optimizer = momentum_sgd(table.parameters())
    handle = optim.catch_up(optimizer, table)
    train(table, optimizer, [[2], [3], [3]])
    before = table.weight.detach().clone()
    handle.update(table.weight, torch.tensor([2, 2, 4]))
    changed = (table.weight.detach() != before).any(1).nonzero().squeeze(1)
    assert changed.tolist() == [2, 4]
    caught_up = table.weight.detach()[[2, 4]].clone()
    handle.flush()
    assert_same_bits(table.weight.detach()[[2, 4]], caught_up)
    handle.update(nn.Parameter(torch.ones(3, 2)), torch.tensor([0]))  # of no module: passed over


def test_bad_indices_are_the_lookups_to_refuse() -> None:
    table, _ = make_tables()
    optimizer = momentum_sgd(table.parameters())
    optim.catch_up(optimizer, table)
    train(table, optimizer, [[2], [3]])
    with pytest.raises(IndexError, match="embedding"):
        table(torch.tensor([ROWS]))


def test_remove_brings_rows_up_to_date_and_ends_it() -> None:
    table, dense = make_tables()
    optimizer = momentum_sgd(table.parameters())
    handle = optim.catch_up(optimizer, table)
    train(table, optimizer, [[2], [3]])
    handle.remove()
    train(
        dense,
        torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.75, weight_decay=0.25),
        [[2], [3]],
    )
    assert_close(table.weight.detach(), dense.weight.detach())
    before = table.weight.detach().clone()
    train(table, optimizer, [[2]])
    table(torch.tensor([5]))
    assert_same_bits(table.weight.detach()[3:], before[3:])
    assert optim.catch_up(optimizer, table).tables == [table.weight]
