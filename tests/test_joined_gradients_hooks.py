"""Whoever looks at a gradient of a table that is used several times sees what torch shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks

from tests.joined_gradients import (
    PROGRAMS,
    ROWS,
    WIDTH,
    Uses,
    assert_same,
    gradient,
    gradients_made,
    integers,
    make_tables,
)

Seen = list[Tensor]


def accumulator_of(table: nn.Embedding) -> Any:
    return table.weight.view_as(table.weight).grad_fn.next_functions[0][0]


def on_leaf_reads(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    return table.weight.register_hook(lambda grad: seen.append(grad.clone()))


def on_leaf_replaces(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    return table.weight.register_hook(lambda grad: 2 * grad)


def on_leaf_keeps(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    return table.weight.register_hook(seen.append)


def after_accumulation(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    def hook(weight: Tensor) -> None:
        seen.append(weight.grad.clone())

    return table.weight.register_post_accumulate_grad_hook(hook)


def steps_in_backward(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    """As optimizers do that are fused into the backward: .grad goes within it."""

    def hook(weight: Tensor) -> None:
        seen.append(weight.grad)
        weight.grad = None

    return table.weight.register_post_accumulate_grad_hook(hook)


def before_accumulator(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    return accumulator_of(table).register_prehook(lambda grads: seen.append(grads[0]))


def after_accumulator(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    return accumulator_of(table).register_hook(lambda _, grads: seen.append(grads[0].clone()))


def after_a_node(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    return outs[-1].grad_fn.register_hook(lambda grads, _: seen.append(grads[0]))


def after_a_node_replaces(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    return outs[-1].grad_fn.register_hook(lambda grads, _: (3 * grads[0],))


def before_a_node(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    return outs[0].grad_fn.register_prehook(lambda grads: (3 * grads[0],))


def on_an_output(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    return outs[-1].register_hook(lambda grad: grad - 1)


def of_several(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    return register_multi_grad_hook([table.weight, *outs], lambda grads: seen.extend(grads))


def retained(table: nn.Embedding, outs: list[Tensor], seen: Seen) -> object:
    for out in outs:
        out.retain_grad()
        out.register_hook(seen.append)
    return None


HOOKS = [
    on_leaf_reads,
    on_leaf_replaces,
    on_leaf_keeps,
    after_accumulation,
    steps_in_backward,
    before_accumulator,
    after_accumulator,
    after_a_node,
    after_a_node_replaces,
    before_a_node,
    on_an_output,
    of_several,
    retained,
]


def step(
    table: nn.Embedding, attach: Callable[..., object], seen: Seen, lookups: int, tied: bool
) -> None:
    uses = Uses(table)
    outs = [uses.lookup() for _ in range(lookups)]
    handle = attach(table, outs, seen)
    loss = torch.stack([uses.weigh(out) for out in outs]).sum()
    if tied:
        loss = loss + uses.weigh(outs[-1] @ table.weight.t())
    loss.backward()
    if hasattr(handle, "remove"):
        handle.remove()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("lookups", "tied"), [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("attach", HOOKS, ids=lambda attach: attach.__name__)
def test_hooks(
    attach: Callable[..., object], zeroed: bool, lookups: int, tied: bool, keep: bool
) -> None:
    seen: tuple[Seen, Seen] = ([], [])
    tables = make_tables(keep)
    for _ in range(3):
        for table, record in zip(tables, seen, strict=True):
            if zeroed:
                table.zero_grad()
            step(table, attach, record, lookups, tied)
    assert len(seen[0]) == len(seen[1])
    for actual, expected in zip(*seen, strict=True):  # what was kept is as it was, steps later
        assert_same(actual, expected)
    if attach is not steps_in_backward:
        assert_same(*(gradient(table) for table in tables))


def test_a_hook_of_the_leaf_gets_the_memory_that_the_lookups_wrote() -> None:
    ours, _ = make_tables()
    seen: list[int] = []
    ours.weight.register_hook(lambda grad: seen.append(grad.data_ptr()))
    assert gradients_made(ours, PROGRAMS["4 lookups"](Uses(ours)).backward) == 1
    assert seen == [gradient(ours).data_ptr()]


@pytest.mark.parametrize("keep", [False, True])
def test_saved_tensor_hooks_are_asked_once_for_each_lookup(keep: bool) -> None:
    counts, grads = [], []
    for table in make_tables(keep):
        unpacked: list[Tensor] = []

        def unpack(saved: Tensor, unpacked: list[Tensor] = unpacked) -> Tensor:
            unpacked.append(saved)
            return saved.clone()

        with saved_tensors_hooks(lambda saved: saved, unpack):
            outs = [table(torch.arange(count)) for count in (3, 4, 5)]
        sum(out.sum() for out in outs).backward()
        counts.append(len(unpacked))
        grads.append(gradient(table))
    assert counts == [3, 3]
    assert_same(*grads)


@pytest.mark.parametrize("keep", [False, True])
def test_a_backward_within_an_unpacking(keep: bool) -> None:
    """It adds to the same leaf while a sum of the outer backward is on its way."""
    grads = []
    for table in make_tables(keep):
        inner = [Uses(table).weighed_lookups(2)]

        def unpack(saved: Tensor, inner: list[Tensor] = inner) -> Tensor:
            while inner:
                with torch.enable_grad():
                    inner.pop().backward()
            return saved

        first = table(torch.arange(3)).sum()
        with saved_tensors_hooks(lambda saved: saved, unpack):
            middle = table(torch.arange(9)).sum()
        (first + middle + 2 * table(torch.arange(7)).sum()).backward()
        assert inner == []
        grads.append(gradient(table))
    assert_same(*grads)


def fail(*_: object) -> Any:
    raise ValueError("on purpose")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("which", range(4))
def test_an_error_in_the_middle_leaves_grad_alone(which: int, there: bool, keep: bool) -> None:
    ours, theirs = make_tables(keep)
    numbers = integers(ROWS, WIDTH, seed=5)
    for _ in range(3):
        before = ours.weight.grad = numbers.clone() if there else None
        uses = Uses(ours)
        outs = [uses.lookup() for _ in range(4)]
        outs[which].register_hook(fail)
        with pytest.raises(ValueError, match="on purpose"):
            torch.stack([uses.weigh(out) for out in outs]).sum().backward()
        assert ours.weight.grad is before
        if there:
            assert_same(before, numbers)
    for table in (ours, theirs):
        table.zero_grad()
        PROGRAMS["tied around"](Uses(table)).backward()
    assert_same(gradient(ours), gradient(theirs))


@pytest.mark.parametrize("keep", [False, True])
def test_a_bad_index_of_one_of_several_lookups_leaves_grad_alone(keep: bool) -> None:
    ours, theirs = make_tables(keep)
    ours.weight.grad = numbers = integers(ROWS, WIDTH, seed=5)
    indices = torch.tensor([1, 2, 3])
    outs = [ours(torch.arange(5)), ours(indices), ours(torch.arange(7))]
    indices.data[1] = ROWS  # past the version counter, after the forward has checked it
    with pytest.raises(IndexError, match="index out of range"):
        torch.cat(outs).sum().backward()
    assert gradient(ours) is numbers
    assert_same(numbers, integers(ROWS, WIDTH, seed=5))
    for table in (ours, theirs):
        table.zero_grad()
        PROGRAMS["4 lookups"](Uses(table)).backward()
    assert_same(gradient(ours), gradient(theirs))


@pytest.mark.parametrize("which", range(3))
def test_anomaly_mode_names_the_lookup_that_made_no_number(which: int) -> None:
    ours, _ = make_tables()
    with torch.autograd.set_detect_anomaly(True), pytest.warns(UserWarning):
        outs = [ours(torch.tensor([row, row])) for row in range(3)]
        outs[which] = outs[which] * torch.tensor([[float("inf")], [-float("inf")]])
        with pytest.raises(RuntimeError, match="EmbeddingBackward.*nan"):
            torch.cat(outs).sum().backward()
