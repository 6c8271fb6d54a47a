"""Derivatives through the sparse gradient, coalesced and not; the rest is in test_gradients.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from embed_ext import reference
from tests.common import assert_close, make_table
from tests.ops.test_gradients import (
    LOOKUPS,
    ROWS,
    WIDTH,
    every_dtype,
    every_lookup,
    make_grad,
    make_tokens,
    make_weight,
    ops,
    unscaled,
)

either_way = pytest.mark.parametrize("coalesced", [False, True])


class Densify(torch.autograd.Function):
    """The identity; its gradient is dense, since gradcheck takes no sparse one of a dense input."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:  # type: ignore[override]
        """weight [V, D] -> a copy."""
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """grad [V, D], sparse -> dense."""
        return grad.to_dense()


class Dense(torch.autograd.Function):
    """to_dense, whose own gradient is sparse, which torch cannot differentiate once more."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """grad [V, D], sparse -> dense."""
        return grad.to_dense()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """grad [V, D], dense -> itself."""
        return grad


@either_way
@unscaled
@every_dtype
def test_sparse_backward(
    device: str, dtype: torch.dtype, padding_idx: int, scale: bool, coalesced: bool
) -> None:
    """Seen through to_dense: finite differences of a sparse tensor do not exist."""
    indices = make_tokens(device)
    backward = ops.embedding_sparse_backward
    assert gradcheck(
        lambda g: backward(g, indices, ROWS, padding_idx, scale, coalesced).to_dense(
            masked_grad=False
        ),
        (make_grad(device, dtype),),
    )


def test_sparse_backward_has_no_forward_mode(device: str) -> None:
    """torch keeps no tangent of a sparse tensor; torch's own op raises the same type."""
    indices = make_tokens(device)
    grad = make_grad(device, torch.float64)
    aten = torch.ops.aten.embedding_sparse_backward
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(grad, torch.ones_like(grad))
        with pytest.raises(NotImplementedError, match="forward AD"):
            aten(dual, indices, ROWS, -1, False)
        with pytest.raises(NotImplementedError, match="embedding_sparse_backward"):
            ops.embedding_sparse_backward(dual, indices, ROWS)


@either_way
@every_lookup
@every_dtype
def test_sparse_gradient_of_the_lookup(
    device: str, lookup: str, dtype: torch.dtype, coalesced: bool
) -> None:
    indices = make_tokens(device)
    weight = make_weight(device, dtype)

    def run(weight: Tensor) -> Tensor:
        return LOOKUPS[lookup](Densify.apply(weight), indices, sparse=True, coalesced=coalesced)

    assert gradcheck(run, (weight,))


@either_way
@unscaled
@every_dtype
def test_double_backward_of_the_sparse_backward(
    device: str, dtype: torch.dtype, padding_idx: int, scale: bool, coalesced: bool
) -> None:
    indices = make_tokens(device)
    backward = ops.embedding_sparse_backward
    assert gradgradcheck(
        lambda g: Dense.apply(backward(g, indices, ROWS, padding_idx, scale, coalesced)),
        (make_grad(device, dtype),),
    )


@either_way
@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_sparse_double_backward(device: str, padding_idx: int, coalesced: bool) -> None:
    """A gradient of the sparse gradient, itself sparse or dense, is a lookup without padding."""
    indices = make_tokens(device)
    upstream = make_table(ROWS, WIDTH, torch.float64, device, seed=5)
    expected = reference.embedding(upstream, indices)
    expected[indices == padding_idx] = 0
    for grad in (upstream, upstream.to_sparse(1)):
        grad_output = make_grad(device, torch.float64)
        out = ops.embedding_sparse_backward(
            grad_output, indices, ROWS, padding_idx, False, coalesced
        )
        (actual,) = torch.autograd.grad(out, grad_output, grad)
        assert_close(actual, expected)
