"""coalesced=True as a user meets it: ``.grad`` after a backward, and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import embed_ext
from embed_ext import Embedding, EmbeddingFunction
from tests.common import assert_close, make_indices, make_table

NUM_ROWS, WIDTH = 20, 4


def tables(**options: Any) -> tuple[Embedding, nn.Embedding]:
    """The module with coalesced gradients and nn.Embedding with sparse ones, of equal weights."""
    ours = Embedding(NUM_ROWS, WIDTH, sparse=True, coalesced=True, **options)
    theirs = nn.Embedding(NUM_ROWS, WIDTH, sparse=True, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def some_indices(seed: int = 1) -> Tensor:
    return make_indices((5, 8), NUM_ROWS, seed=seed)


def loss(table: nn.Embedding, indices: Tensor) -> Tensor:
    return table(indices).pow(3).sum()  # type: ignore[no-any-return]


def gradient(table: nn.Embedding) -> Tensor:
    assert table.weight.grad is not None
    return table.weight.grad


def assert_coalesced(actual: Tensor, expected: Tensor) -> None:
    """Check that `actual` says that it is, and truly is, `expected` coalesced."""
    assert actual.is_coalesced() and not expected.is_coalesced()
    expected = expected.coalesce()
    assert torch.equal(actual.indices(), expected.indices())
    assert_close(actual.values(), expected.values())


# The gradient that a backward leaves.


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_gradient_after_a_backward(padding_idx: int | None, device: str) -> None:
    ours, theirs = (table.to(device) for table in tables(padding_idx=padding_idx))
    for table in (ours, theirs):
        loss(table, some_indices().to(device)).backward()
    assert_coalesced(gradient(ours), gradient(theirs))
    assert gradient(ours).coalesce() is gradient(ours)


def test_gradient_of_a_plain_call() -> None:
    weight = make_table(NUM_ROWS, WIDTH).requires_grad_()
    out = embed_ext.functional.embedding(some_indices(), weight, sparse=True, coalesced=True)
    out.sum().backward()
    assert weight.grad is not None and weight.grad.is_coalesced()


def test_gradient_of_the_autograd_function() -> None:
    weight = make_table(NUM_ROWS, WIDTH).requires_grad_()
    EmbeddingFunction.apply(weight, some_indices(), -1, False, True, True).sum().backward()
    assert weight.grad is not None and weight.grad.is_coalesced()


def test_gradient_keeps_the_memory_that_the_kernel_wrote() -> None:
    ours, _ = tables()
    out = ours(some_indices())
    written: list[tuple[int, int]] = []
    out.grad_fn.register_hook(
        lambda grads, _: written.append(
            (grads[0]._indices().data_ptr(), grads[0]._values().data_ptr())
        )
    )
    out.sum().backward()
    grad = gradient(ours)
    assert grad.is_coalesced()
    assert written == [(grad.indices().data_ptr(), grad.values().data_ptr())]


def test_several_backwards_add_up() -> None:
    """PyTorch's sum of two coalesced tensors is one on the CPU."""
    ours, theirs = tables()
    for seed in range(3):
        for table in (ours, theirs):
            loss(table, some_indices(seed)).backward()
    assert_coalesced(gradient(ours), gradient(theirs))


def test_table_that_is_used_twice() -> None:
    ours, theirs = tables()
    for table in (ours, theirs):
        (loss(table, some_indices(1)) + loss(table, some_indices(2))).backward()
    assert_coalesced(gradient(ours), gradient(theirs))


def test_two_tables_of_one_size() -> None:
    pairs = [tables(), tables()]
    for one, other in zip(*pairs, strict=True):
        (loss(one, some_indices(1)) + loss(other, some_indices(2))).backward()
    for ours, theirs in pairs:
        assert_coalesced(gradient(ours), gradient(theirs))


@pytest.mark.parametrize("create_graph", [False, True])
def test_autograd_grad(create_graph: bool) -> None:
    ours, theirs = tables()
    grads = [
        torch.autograd.grad(loss(table, some_indices()), table.weight, create_graph=create_graph)[
            0
        ].detach()
        for table in (ours, theirs)
    ]
    assert_coalesced(*grads)
    assert ours.weight.grad is None


def test_backward_that_records() -> None:
    ours, theirs = tables()
    for table in (ours, theirs):
        loss(table, some_indices()).backward(create_graph=True)
    assert_coalesced(gradient(ours).detach(), gradient(theirs).detach())


def double_the_grad(weight: Tensor) -> None:
    assert weight.grad is not None and not weight.grad.is_coalesced()  # not yet
    weight.grad.mul_(2)


HOOKS: dict[str, Callable[[nn.Embedding], object]] = {
    "tensor": lambda table: table.weight.register_hook(lambda grad: 2 * grad),
    "in_place": lambda table: table.weight.register_hook(lambda grad: grad.mul_(2)),
    "accumulated": lambda table: table.weight.register_post_accumulate_grad_hook(double_the_grad),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_run_as_ever(hook: Callable[[nn.Embedding], object]) -> None:
    ours, theirs = tables()
    for table in (ours, theirs):
        hook(table)
        loss(table, some_indices()).backward()
    assert_coalesced(gradient(ours), gradient(theirs))


def test_a_gradient_that_a_hook_has_put_in_another_order_is_not_marked() -> None:
    ours, theirs = tables()

    def reverse(grad: Tensor) -> Tensor:
        flipped = grad._indices().flip(1), grad._values().flip(0)
        with torch.sparse.check_sparse_tensor_invariants(enable=False):  # type: ignore[no-untyped-call]
            return torch.sparse_coo_tensor(*flipped, grad.shape)

    ours.weight.register_hook(reverse)
    for table in (ours, theirs):
        loss(table, some_indices()).backward()
    assert not gradient(ours).is_coalesced()
    assert_close(gradient(ours).to_dense(), gradient(theirs).to_dense())


def test_nothing_changes_without_it() -> None:
    ours, theirs = tables()
    ours.coalesced = False
    for table in (ours, theirs):
        loss(table, some_indices()).backward()
    assert not gradient(ours).is_coalesced()
    assert torch.equal(gradient(ours)._indices(), gradient(theirs)._indices())


def test_no_effect_on_a_dense_gradient() -> None:
    weight = make_table(NUM_ROWS, WIDTH).requires_grad_()
    embed_ext.functional.embedding(some_indices(), weight, coalesced=True).sum().backward()
    ours, _ = tables()
    ours.sparse = False
    loss(ours, some_indices()).backward()
    for grad in (weight.grad, ours.weight.grad):
        assert grad is not None and grad.layout == torch.strided


# Optimizers.


class Coalesced(TorchDispatchMode):
    """Counts the sorts behind ``coalesce()``."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._coalesce.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [torch.optim.SparseAdam, torch.optim.Adagrad])
def test_optimizers_find_it_coalesced(kind: Any) -> None:
    counts = []
    for table in tables():
        optimizer = kind(table.parameters(), lr=0.1)
        loss(table, some_indices()).backward()
        with Coalesced() as coalesced:
            optimizer.step()
        counts.append(coalesced.count)
    assert counts[0] == 0 < counts[1]
