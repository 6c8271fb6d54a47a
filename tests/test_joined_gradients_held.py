"""What arrives for a table before a lookup, and is somebody else's too, is added to elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.joined_gradients import (
    PROGRAMS,
    ROWS,
    WIDTH,
    Uses,
    assert_same,
    gradient,
    integers,
    make_tables,
)


class Hands(torch.autograd.Function):
    """weight [V, D], make -> 0; the gradient of weight is what make(ctx) says, [V, D]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, make: Callable[[Any], Tensor]) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(integers(*weight.shape, seed=9, dtype=weight.dtype))
        return weight.new_zeros((), dtype=weight.real.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.make(ctx), None


def loss_of(table: nn.Embedding, make: Callable[[Any], Tensor]) -> Tensor:
    """Lookups whose gradients arrive after what `make` makes, and one before it is looked at."""
    uses = Uses(table)
    lookups = uses.weighed_lookups(3)
    return lookups + Hands.apply(table.weight, make)


# held [V, 3 V], large enough for all of them -> gradient [V, D] in held's memory
HELD: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda held: held[:, :WIDTH],
    "contiguous": lambda held: held.view(-1)[: ROWS * WIDTH].view(ROWS, WIDTH),
    "detached": lambda held: held.view(-1)[: ROWS * WIDTH].view(ROWS, WIDTH).detach(),
    "data": lambda held: held.data[:, :WIDTH].data,
    "transposed": lambda held: held[:WIDTH, :ROWS].t(),
    "one row": lambda held: held[0, :WIDTH].expand(ROWS, WIDTH),
    "one number": lambda held: held[0, 0].expand(ROWS, WIDTH),
    "overlapping": lambda held: held.as_strided((ROWS, WIDTH), (1, 1)),
    "overlapping rows": lambda held: held.as_strided((ROWS, WIDTH), (2, 1)),
    "backwards": lambda held: held.flip(0)[:, :WIDTH],
    "negative": lambda held: torch._neg_view(held[:, :WIDTH]),
    "lazily cloned": lambda held: torch._lazy_clone(held)[:, :WIDTH],
    "of a dead view": lambda held: held[:, :-1][:, :WIDTH],
    "shared by set_": lambda held: torch.empty(0, dtype=held.dtype).set_(
        held.untyped_storage(), 0, (ROWS, WIDTH), (WIDTH, 1)
    ),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", HELD)
def test_memory_that_is_held(kind: str, keep: bool) -> None:
    grads = []
    for table in make_tables(keep):
        held = integers(ROWS, 3 * ROWS, seed=7)
        before = held.clone()
        for _ in range(2):  # then onto a gradient
            loss_of(table, lambda ctx, held=held: HELD[kind](held)).backward()
            assert_same(held, before)
        grads.append(gradient(table))
    assert_same(*grads)


@pytest.mark.parametrize("keep", [False, True])
def test_a_tensor_that_is_held(keep: bool) -> None:
    for table in make_tables(keep):
        held = integers(ROWS, WIDTH)
        loss_of(table, lambda ctx, held=held: held).backward()
        assert_same(held, integers(ROWS, WIDTH))
        assert not torch.equal(gradient(table), held)


@pytest.mark.parametrize("keep", [False, True])
def test_a_tensor_that_is_saved(keep: bool) -> None:
    grads = []
    for table in make_tables(keep):
        loss = loss_of(table, lambda ctx: ctx.saved_tensors[0])
        loss.backward(retain_graph=True)
        first = gradient(table).clone()
        loss.backward()
        assert_same(gradient(table), 2 * first)
        grads.append(first)
    assert_same(*grads)


COMPLEX_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "conj": lambda held: held.conj(),
    "real": lambda held: held.real,
    "imag": lambda held: held.imag,
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", COMPLEX_VIEWS)
def test_complex_views(kind: str, keep: bool) -> None:
    grads = []
    for table in make_tables(keep, torch.complex128 if kind == "conj" else torch.float64):
        held = torch.complex(integers(ROWS, WIDTH, seed=3), integers(ROWS, WIDTH, seed=4))
        before = held.clone()
        loss_of(table, lambda ctx, held=held: COMPLEX_VIEWS[kind](held)).backward()
        assert_same(held, before)
        grads.append(gradient(table))
    assert_same(*grads)


class HandsToBoth(torch.autograd.Function):
    """first [V, D], second [V, D] -> 0; the gradient of both is one tensor, or one's memory."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, detached: bool) -> Tensor:
        ctx.detached = detached
        return first.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        both = integers(ROWS, WIDTH, seed=9)
        return both, both.detach() if ctx.detached else both, None


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("way", ["leaf", "through a view", "retained", "asked for"])
def test_one_tensor_for_two_inputs(way: str, swapped: bool, detached: bool, keep: bool) -> None:
    grads = []
    for table in make_tables(keep):
        other = torch.zeros(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
        use = other if way == "leaf" else other.view(ROWS, WIDTH)
        pair = (use, table.weight) if swapped else (table.weight, use)
        loss = Uses(table).weighed_lookups(2) + HandsToBoth.apply(*pair, detached)
        if way == "asked for":
            grad, of_use = torch.autograd.grad(loss, [table.weight, use])
        else:
            if way == "retained":
                use.retain_grad()
            loss.backward()
            grad, of_use = gradient(table), use.grad if way == "retained" else other.grad
        assert_same(of_use, integers(ROWS, WIDTH, seed=9))
        grads.append(grad)
    assert_same(*grads)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("asked_for", [False, True])
def test_a_gradient_that_passes_through(asked_for: bool, keep: bool) -> None:
    """clone() hands on the very tensor that is the gradient of its result."""
    grads = []
    for table in make_tables(keep):
        lookups = Uses(table).weighed_lookups(3)
        clone = table.weight.clone()
        numbers = integers(ROWS, WIDTH, seed=9)
        loss = lookups + (clone * numbers).sum()
        if asked_for:
            grad, of_clone = torch.autograd.grad(loss, [table.weight, clone])
        else:
            clone.retain_grad()
            loss.backward()
            grad, of_clone = gradient(table), clone.grad
        assert_same(of_clone, numbers)
        grads.append(grad)
    assert_same(*grads)


# weight [V, D] -> (a view of it, a use of the view); the gradient of weight is a view of the view's
# that Python has not seen.
VIEWS: dict[str, Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]] = {
    "flat": lambda weight: (weight.view(-1), lambda flat: flat * integers(ROWS * WIDTH, seed=9)),
    "unsqueezed": lambda weight: (weight[None], lambda one: one * integers(ROWS, WIDTH, seed=9)),
    "transposed": lambda weight: (weight.t(), lambda wt: integers(5, WIDTH, seed=9) @ wt),
    "alias": lambda weight: (weight.view_as(weight), lambda it: it * integers(ROWS, WIDTH, seed=9)),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("held_by", ["retain_grad", "hook", "view", "data", "asked for"])
@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_of_a_gradient_that_is_held(kind: str, held_by: str, keep: bool) -> None:
    grads: list[list[Tensor]] = []
    for table in make_tables(keep):
        lookups = Uses(table).weighed_lookups(3)
        view, use = VIEWS[kind](table.weight)
        held: list[Tensor] = []
        loss = lookups + use(view).sum()
        if held_by == "asked for":
            grads.append([*torch.autograd.grad(loss, [table.weight, view])])
            continue
        if held_by == "retain_grad":
            view.retain_grad()
        elif held_by == "hook":
            view.register_hook(held.append)
        elif held_by == "view":
            view.register_hook(lambda grad, held=held: held.append(grad[..., 1:]))
        else:
            view.register_hook(lambda grad, held=held: held.append(grad.data))
        loss.backward()
        if held_by == "retain_grad":
            held.append(view.grad)
        grads.append([gradient(table), *held])
    for actual, expected in zip(*grads, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_of_a_gradient_that_nobody_holds(kind: str, keep: bool) -> None:
    grads = []
    for table in make_tables(keep):
        lookups = Uses(table).weighed_lookups(3)
        view, use = VIEWS[kind](table.weight)
        (lookups + use(view).sum()).backward()
        grads.append(gradient(table))
    assert_same(*grads)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("weight_first", [False, True])
def test_a_gradient_that_the_caller_gives(weight_first: bool, keep: bool) -> None:
    grads = []
    for table in make_tables(keep):
        held = integers(ROWS, WIDTH, seed=9)
        roots = [(Uses(table).weighed_lookups(3), None), (table.weight, held)]
        tensors, given = zip(*roots[:: -1 if weight_first else 1], strict=True)
        torch.autograd.backward(tensors, given)
        assert_same(held, integers(ROWS, WIDTH, seed=9))
        grads.append(gradient(table))
    assert_same(*grads)


@pytest.mark.parametrize("keep", [False, True])
def test_output_gradients_are_read_only(keep: bool) -> None:
    """What a lookup is given, as large as the table, is also what has arrived there."""
    grads = []
    for table in make_tables(keep):
        out = table(torch.arange(ROWS).roll(1))
        both = out + table.weight
        both.retain_grad()
        (both * integers(ROWS, WIDTH, seed=9)).sum().backward()
        assert_same(both.grad, integers(ROWS, WIDTH, seed=9))
        grads.append(gradient(table))
    assert_same(*grads)


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_of_earlier_backwards(keep: bool) -> None:
    ours, theirs = make_tables(keep)
    held, expected = [], []
    for table, grads in ((ours, held), (theirs, expected)):
        for program in ("4 lookups", "tied around", "2 lookups"):
            (grad,) = torch.autograd.grad(PROGRAMS[program](Uses(table)), table.weight)
            grads.append(grad)
            PROGRAMS[program](Uses(table)).backward()
            grads.append(gradient(table))
            table.zero_grad()
    for actual, wanted in zip(held, expected, strict=True):
        assert_same(actual, wanted)
