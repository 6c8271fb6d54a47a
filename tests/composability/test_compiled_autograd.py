"""Compiled autograd: the backward of an eager or compiled forward, captured as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters

from tests.common import assert_close, make_indices
from tests.composability.lookups import OPTIONS, gradient, make_pair

NUM_ROWS, WIDTH = 23, 6


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Captures are counted from zero, and no cached graph is left to the next test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def backward_in_a_graph(run: Callable[[], Any], dynamic: bool | None = None) -> None:
    compiler = torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with compiled_autograd._enable(compiler):  # type: ignore[no-untyped-call]
        run()


def captures() -> int:
    return int(counters["compiled_autograd"]["captures"])


def loss(table: nn.Embedding, indices: Tensor) -> Tensor:
    return table(indices).pow(3).sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dense_gradient(options: dict[str, Any]) -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, **options)
    indices = make_indices((4, 9), NUM_ROWS)
    loss(theirs, indices).backward()
    backward_in_a_graph(lambda: loss(ours, indices).backward())
    assert captures() == 1
    assert_close(gradient(ours), gradient(theirs))


def test_compiled_forward_too() -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, padding_idx=1)
    indices = make_indices((4, 9), NUM_ROWS)
    loss(theirs, indices).backward()
    forward = torch.compile(loss, fullgraph=True, backend="aot_eager")
    backward_in_a_graph(lambda: forward(ours, indices).backward())
    assert_close(gradient(ours), gradient(theirs))


def test_two_lookups_in_one_graph() -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH)
    first, second = make_indices((4,), NUM_ROWS), make_indices((3, 2), NUM_ROWS, seed=2)
    (loss(theirs, first) + 2 * loss(theirs, second)).backward()
    backward_in_a_graph(lambda: (loss(ours, first) + 2 * loss(ours, second)).backward())
    assert_close(gradient(ours), gradient(theirs))


def test_options_are_part_of_the_cache_key() -> None:
    indices = make_indices((4, 9), NUM_ROWS)
    for options in OPTIONS.values():
        theirs, ours = make_pair(NUM_ROWS, WIDTH, **options)
        loss(theirs, indices).backward()
        backward_in_a_graph(lambda table=ours: loss(table, indices).backward())  # type: ignore[misc]
        assert_close(gradient(ours), gradient(theirs))


def test_one_capture_serves_every_batch_size() -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH)
    counts = []
    for table in (theirs, ours):
        torch._dynamo.reset()
        counters.clear()
        for batch in (7, 12, 9, 31):
            indices = make_indices((batch, 10), NUM_ROWS)
            table.weight.grad = None
            backward_in_a_graph(lambda t=table, i=indices: loss(t, i).backward(), True)  # type: ignore[misc]
        counts.append(captures())
    assert counts[1] == counts[0]
    assert_close(gradient(ours), gradient(theirs))


def test_double_backward() -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, padding_idx=1)
    indices = make_indices((4, 9), NUM_ROWS)

    def penalty(table: nn.Embedding) -> Tensor:
        (first,) = torch.autograd.grad(loss(table, indices), table.weight, create_graph=True)
        return first.pow(3).sum()

    penalty(theirs).backward()
    of_the_penalty = penalty(ours)
    backward_in_a_graph(of_the_penalty.backward)
    assert captures() == 1
    assert_close(gradient(ours), gradient(theirs))


def test_tensor_and_parameter_hooks_run() -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH)
    indices = make_indices((4, 9), NUM_ROWS)
    for table in (theirs, ours):
        table.weight.register_hook(lambda g: 2 * g)
    loss(theirs, indices).backward()
    backward_in_a_graph(lambda: loss(ours, indices).backward())
    assert_close(gradient(ours), gradient(theirs))
