"""A sparse gradient is made of the gradient that came in, where nobody else has that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import embed_ext
from tests.common import assert_close, assert_same_bits, generator

ROWS, WIDTH = 10, 4
OP = "embed_ext::embedding_sparse_backward"
SEEN: list[Tensor] = []


def some_indices(shape: tuple[int, ...] = (2, 3)) -> Tensor:
    return torch.randint(ROWS, shape, generator=generator(1))


def gradient_of(table: nn.Embedding, loss: Callable[[Tensor], Tensor], indices: Tensor) -> Tensor:
    """The gradient of a table by a loss of what was looked up."""
    loss(table(indices)).backward()  # type: ignore[no-untyped-call]
    assert table.weight.grad is not None
    return table.weight.grad


def traced(
    loss: Callable[[Tensor], Tensor], indices: Tensor, **options: Any
) -> tuple[Tensor, bool]:
    """A sparse gradient that is as torch's, and whether its values were copied for it."""
    weight = torch.randn(ROWS, WIDTH, generator=generator(2))
    ours = embed_ext.Embedding(ROWS, WIDTH, sparse=True, _weight=weight.clone(), **options)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        grad = gradient_of(ours, loss, indices)
    (event,) = [event for event in profiler.events() if event.name == OP]
    children = {child.name for child in event.cpu_children}
    dense = nn.Embedding(ROWS, WIDTH, _weight=weight, **options)
    assert_close(grad.to_dense(), gradient_of(dense, loss, indices.long()))
    return grad, bool(children & {"aten::copy_", "aten::index_select"})


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda output: output.square().sum(),
    "a view": lambda output: output.flatten(1).sin().sum(),
    "a view of a view": lambda output: output.flatten(1).unsqueeze(0).sin().sum(),
    "sum over tokens": lambda output: output.mean(1).square().sum(),
    "two uses": lambda output: (output.sin() * 2 + output.cos()).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32, torch.uint8])
def test_no_row_is_copied(name: str, index_dtype: torch.dtype) -> None:
    indices = some_indices().to(index_dtype)
    grad, copied = traced(LOSSES[name], indices)
    assert not copied
    before = grad._indices().clone()
    indices.fill_(0)
    assert_same_bits(grad._indices(), before)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 1)], ids=str)
def test_other_shapes(shape: tuple[int, ...]) -> None:
    _, copied = traced(lambda output: output.square().sum(), some_indices(shape))
    assert not copied


def watch_output(watch: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def loss(output: Tensor) -> Tensor:
        watch(output)
        return output.square().sum()

    return loss


def retain_grad(output: Tensor) -> None:
    output.retain_grad()
    SEEN.append(output)


WATCHERS: dict[str, Callable[[Tensor], object]] = {
    "retain_grad": retain_grad,
    "tensor hook": lambda output: output.register_hook(SEEN.append),  # type: ignore[no-untyped-call]
    "node's pre-hook": lambda output: output.grad_fn.register_prehook(SEEN.extend),  # type: ignore[union-attr]
    "node's hook": lambda output: output.grad_fn.register_hook(  # type: ignore[union-attr]
        lambda _, grads: SEEN.extend(grads)
    ),
}


@pytest.mark.parametrize("name", WATCHERS)
def test_who_has_seen_the_gradient_keeps_it(name: str) -> None:
    SEEN.clear()
    table = embed_ext.Embedding(ROWS, WIDTH, sparse=True)
    grad = gradient_of(table, watch_output(WATCHERS[name]), some_indices())
    (seen,) = SEEN
    if name == "retain_grad":
        assert seen.grad is not None
        seen = seen.grad
    expected = grad._values().clone()
    assert_same_bits(seen.reshape(-1, WIDTH), expected)
    seen.zero_()
    assert_same_bits(grad._values(), expected)


class Holding(torch.autograd.Function):
    """Whose gradient lies in memory that it keeps."""

    held = torch.empty(0)

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        Holding.held = grad_output + 1
        return Holding.held.view(grad_output.shape)


def test_memory_that_somebody_keeps() -> None:
    table = embed_ext.Embedding(ROWS, WIDTH, sparse=True)
    grad = gradient_of(table, lambda output: Holding.apply(output).sum(), some_indices())  # type: ignore[no-untyped-call]
    expected = grad._values().clone()
    Holding.held.zero_()
    assert_same_bits(grad._values(), expected)


def test_the_callers_gradient() -> None:
    table, grad_output = embed_ext.Embedding(ROWS, WIDTH, sparse=True), torch.ones(2, 3, WIDTH)
    table(some_indices()).backward(grad_output)
    grad = table.weight.grad
    assert grad is not None
    grad_output.zero_()
    assert_same_bits(grad._values(), torch.ones(6, WIDTH))


def test_two_gradients_from_one() -> None:
    """Both lookups get the gradient of their sum."""
    tables = [embed_ext.Embedding(ROWS, WIDTH, sparse=True) for _ in range(2)]
    indices = some_indices()
    (tables[0](indices) + tables[1](indices)).square().sum().backward()
    first, second = (table.weight.grad for table in tables)
    assert first is not None
    assert second is not None
    expected = second._values().clone()
    assert_same_bits(first._values(), expected)
    first._values().zero_()
    assert_same_bits(second._values(), expected)


@pytest.mark.parametrize("options", [{"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
def test_what_has_to_be_computed(options: dict[str, Any]) -> None:
    _, copied = traced(lambda output: output.square().sum(), some_indices(), **options)
    assert copied


def test_a_gradient_that_is_spread_out_is_copied() -> None:
    grad, copied = traced(lambda output: output.sum(), some_indices())
    assert copied
    assert grad._values().is_contiguous()
