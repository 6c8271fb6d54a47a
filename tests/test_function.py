"""EmbeddingFunction, the lookup as a torch.autograd.Function to subclass."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from embed_ext import EmbeddingFunction
from embed_ext.functional import embedding
from tests.common import (
    FROZEN_DTYPES,
    GRAD_DTYPES,
    assert_close,
    generator,
    make_indices,
    make_table,
)

OPTIONS: dict[str, tuple[Any, ...]] = {
    "defaults": (),
    "no_padding": (-1,),
    "padding_first": (0,),
    "padding": (3,),
    "frequency": (-1, True),
    "sparse": (-1, False, True),
    "sparse_padding": (3, False, True),
    "sparse_frequency": (3, True, True),
    "coalesced": (3, False, True, True),
    "all_dense": (3, True, False),
}


def value_and_grad(out: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the table [V, D] for a fixed gradient of the output."""
    grad_output = torch.randn(out.shape, generator=generator(), dtype=torch.float64).to(out)
    (grad,) = torch.autograd.grad(out, weight, grad_output)
    return out.detach(), grad


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_values_and_gradients_are_the_functional_ones(
    dtype: torch.dtype, options: tuple[Any, ...], device: str
) -> None:
    weight = make_table(6, 4, dtype, device).requires_grad_()
    indices = make_indices((3, 5), 6, device=device)
    defaults = (-1, False, False, False)
    padding_idx, scale_grad_by_freq, sparse, coalesced = (*options, *defaults[len(options) :])
    functional_out = embedding(
        indices,
        weight,
        padding_idx=None if padding_idx == -1 else padding_idx,
        scale_grad_by_freq=scale_grad_by_freq,
        sparse=sparse,
        coalesced=coalesced,
    )
    expected = value_and_grad(functional_out, weight)
    actual = value_and_grad(EmbeddingFunction.apply(weight, indices, *options), weight)
    assert actual[1].is_sparse == sparse
    assert not sparse or actual[1].is_coalesced() == coalesced
    for mine, functional in zip(actual, expected, strict=True):
        assert_close(mine, functional)


def test_default_arguments_are_the_documented_ones() -> None:
    parameters = inspect.signature(EmbeddingFunction.forward).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "weight": inspect.Parameter.empty,
        "indices": inspect.Parameter.empty,
        "padding_idx": -1,
        "scale_grad_by_freq": False,
        "sparse": False,
        "coalesced": False,
    }


def test_subclass_may_change_the_gradient(device: str) -> None:
    class ClippedEmbedding(EmbeddingFunction):
        """Clips what reaches each token before it is summed into the table."""

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            return EmbeddingFunction.backward(ctx, grad_output.clamp(-1, 1))

    weight = torch.zeros(4, 1, requires_grad=True, device=device)
    indices = torch.tensor([1, 1, 2], device=device)
    grad_output = torch.tensor([[5.0], [0.5], [-7.0]], device=device)
    ClippedEmbedding.apply(weight, indices).backward(grad_output)
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [0.0, 1.5, -1.0, 0.0]
    EmbeddingFunction.apply(weight, indices).backward(grad_output)
    assert weight.grad.flatten().tolist() == [0.0, 7.0, -8.0, 0.0]


def test_weight_without_gradient_records_nothing() -> None:
    weight = make_table(5, 3)
    out = EmbeddingFunction.apply(weight, torch.tensor([1, 4]))
    assert not out.requires_grad and out.grad_fn is None
    assert torch.equal(out, weight[[1, 4]])


def test_no_grad_records_nothing() -> None:
    weight = make_table(5, 3).requires_grad_()
    with torch.no_grad():
        out = EmbeddingFunction.apply(weight, torch.tensor([1, 4]))
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", FROZEN_DTYPES, ids=str)
def test_frozen_dtypes_are_looked_up(dtype: torch.dtype) -> None:
    weight = make_table(5, 4, dtype)
    out = EmbeddingFunction.apply(weight, torch.tensor([4, 1]))
    assert out.dtype == dtype
    assert torch.equal(out.view(torch.uint8), weight.view(torch.uint8)[[4, 1]])


def test_backward_without_a_need_for_the_gradient_returns_none() -> None:
    class Context:
        needs_input_grad = (False,) * 6

    assert EmbeddingFunction.backward(Context(), torch.ones(2, 3)) == (None,) * 6


def test_gradient_of_something_else_leaves_the_table_alone() -> None:
    weight = make_table(5, 3).requires_grad_()
    factor = torch.tensor(2.0, requires_grad=True)
    out = EmbeddingFunction.apply(weight, torch.tensor([1, 4])) * factor
    (grad,) = torch.autograd.grad(out.sum(), factor)
    assert_close(grad, weight.detach()[[1, 4]].sum())
    assert weight.grad is None


def test_several_sparse_backwards_add_entries() -> None:
    weight = make_table(5, 2).requires_grad_()
    for rows in ([3, 1, 3], [0]):
        EmbeddingFunction.apply(weight, torch.tensor(rows), -1, False, True).sum().backward()
    assert weight.grad is not None and weight.grad._nnz() == 4
    assert weight.grad.to_dense()[:, 0].tolist() == [1.0, 1.0, 0.0, 2.0, 0.0]


def test_indices_are_not_differentiable() -> None:
    weight = make_table(5, 3).requires_grad_()
    out = EmbeddingFunction.apply(weight, torch.tensor([1, 4]))
    edges = [node for node, _ in out.grad_fn.next_functions if node is not None]
    assert len(edges) == 1


def test_changed_indices_are_noticed_before_backward() -> None:
    weight = make_table(5, 3).requires_grad_()
    indices = torch.tensor([1, 4])
    out = EmbeddingFunction.apply(weight, indices)
    indices.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_errors_are_those_of_the_op() -> None:
    weight = make_table(5, 3)
    with pytest.raises(IndexError, match="index out of range"):
        EmbeddingFunction.apply(weight, torch.tensor([5]))
    with pytest.raises(RuntimeError, match="'weight' must be 2-D"):
        EmbeddingFunction.apply(weight[0], torch.tensor([0]))
    with pytest.raises(RuntimeError, match="int64, int32"):
        EmbeddingFunction.apply(weight, torch.tensor([0.0]))
