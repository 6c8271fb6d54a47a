"""Derivatives of every order and mode, checked against finite differences in double precision.

Two options make the *declared* gradient differ from the derivative of the forward, in nn.Embedding
as here: padding_idx (the row is read but gets no gradient) and scale_grad_by_freq. With padding_idx
the backward op and the double backward can be checked numerically all the same. With
scale_grad_by_freq they cannot: the scale is left out of the double backward, so that a Hessian of
the lookup, whose own backward scales, has it once; this is compared with torch instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import embed_ext
from embed_ext import EmbeddingFunction
from tests.common import assert_close, make_indices, make_table

ops = torch.ops.embed_ext

DTYPES = (torch.float64, torch.complex128)
OPTIONS = ((-1, False), (2, False), (-1, True), (2, True))  # padding_idx, scale_grad_by_freq
ROWS, WIDTH = 5, 3


def through_functional(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    coalesced: bool = False,
) -> Tensor:
    """functional.embedding in the ops' order, where a padding of -1 is none."""
    padding = None if padding_idx < 0 else padding_idx
    return embed_ext.functional.embedding(
        indices,
        weight,
        padding,
        scale_grad_by_freq=scale_grad_by_freq,
        sparse=sparse,
        coalesced=coalesced,
    )


def through_autograd_function(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    coalesced: bool = False,
) -> Tensor:
    """EmbeddingFunction, whose apply takes no keywords."""
    return EmbeddingFunction.apply(  # type: ignore[no-any-return]
        weight, indices, padding_idx, scale_grad_by_freq, sparse, coalesced
    )


LOOKUPS: dict[str, Callable[..., Tensor]] = {
    "op": ops.embedding,
    "functional": through_functional,
    "EmbeddingFunction": through_autograd_function,
}


every_lookup = pytest.mark.parametrize("lookup", LOOKUPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_option = pytest.mark.parametrize(("padding_idx", "scale"), OPTIONS)
unscaled = pytest.mark.parametrize(("padding_idx", "scale"), OPTIONS[:2])


def make_weight(device: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """A table [ROWS, WIDTH] that wants a gradient."""
    return make_table(ROWS, WIDTH, dtype, device).requires_grad_()


def make_tokens(device: str) -> Tensor:
    """Indices [2, 3] with a row used twice, the padding row 2 among them, and row 4 unused."""
    return torch.tensor([[0, 2, 1], [1, 3, 2]], device=device)


def make_grad(device: str, dtype: torch.dtype) -> Tensor:
    """grad_output [2, 3, WIDTH] that wants a gradient itself."""
    return make_table(6, WIDTH, dtype, device, seed=2).view(2, 3, WIDTH).requires_grad_()


EVERY_MODE: dict[str, Any] = {
    "check_forward_ad": True,
    "check_batched_grad": True,
    "check_batched_forward_grad": True,
}


@every_lookup
@every_dtype
def test_lookup(device: str, lookup: str, dtype: torch.dtype) -> None:
    """Backward, forward mode, and both under vmap."""
    indices = make_tokens(device)
    weight = make_weight(device, dtype)
    assert gradcheck(lambda w: LOOKUPS[lookup](w, indices), (weight,), **EVERY_MODE)


@every_lookup
@pytest.mark.parametrize("shape", [(), (0,), (0, 2), (1, 1, 4)], ids=str)
def test_lookup_of_every_shape(device: str, lookup: str, shape: tuple[int, ...]) -> None:
    indices = make_indices(shape, ROWS, device=device)
    weight = make_weight(device)
    assert gradcheck(lambda w: LOOKUPS[lookup](w, indices), (weight,), **EVERY_MODE)


@unscaled
@every_dtype
def test_dense_backward(device: str, dtype: torch.dtype, padding_idx: int, scale: bool) -> None:
    indices = make_tokens(device)
    backward = ops.embedding_dense_backward
    assert gradcheck(
        lambda g: backward(g, indices, ROWS, padding_idx, scale),
        (make_grad(device, dtype),),
        **EVERY_MODE,
    )


@every_lookup
@unscaled
@every_dtype
def test_double_backward_of_the_lookup(
    device: str, lookup: str, dtype: torch.dtype, padding_idx: int, scale: bool
) -> None:
    indices = make_tokens(device)
    assert gradgradcheck(
        lambda w: LOOKUPS[lookup](w, indices, padding_idx, scale),
        (make_weight(device, dtype),),
        (make_grad(device, dtype),),
        check_batched_grad=True,
    )


@every_lookup
@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_forward_over_reverse(device: str, lookup: str, padding_idx: int) -> None:
    indices = make_tokens(device)
    assert gradgradcheck(
        lambda w: LOOKUPS[lookup](w, indices, padding_idx),
        (make_weight(device),),
        (make_grad(device, torch.float64),),
        check_fwd_over_rev=True,
    )


@unscaled
@every_dtype
def test_double_backward_of_the_dense_backward(
    device: str, dtype: torch.dtype, padding_idx: int, scale: bool
) -> None:
    indices = make_tokens(device)
    backward = ops.embedding_dense_backward
    assert gradgradcheck(
        lambda g: backward(g, indices, ROWS, padding_idx, scale),
        (make_grad(device, dtype),),
        check_fwd_over_rev=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_scaled_double_backward_is_torch_s(device: str, padding_idx: int | None) -> None:
    """With respect to grad_output and, through a loss that is not linear, to the weight."""
    indices = make_tokens(device)
    results = []
    for embedding in (embed_ext.functional.embedding, F.embedding):
        grad, weight = make_grad(device, torch.float64), make_weight(device)
        out = embedding(indices, weight, padding_idx, scale_grad_by_freq=True)
        (grad_weight,) = torch.autograd.grad(out.pow(3), weight, grad, create_graph=True)
        results.append(torch.autograd.grad(grad_weight.pow(2).sum(), (grad, weight)))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


@every_lookup
@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_third_order(device: str, lookup: str, padding_idx: int) -> None:
    """d3/dw3 of sum(lookup(w) ** 4), by three backwards; F.embedding and theory agree."""
    indices = make_tokens(device)

    def third(embedding: Callable[[Tensor], Tensor]) -> Tensor:
        weight = make_weight(device)
        result = embedding(weight).pow(4).sum()
        for _ in range(3):
            (result_grad,) = torch.autograd.grad(result.sum(), weight, create_graph=True)
            result = result_grad
        return result.detach()

    ours = third(lambda w: LOOKUPS[lookup](w, indices, padding_idx))
    padding = None if padding_idx < 0 else padding_idx
    assert_close(ours, third(lambda w: F.embedding(indices, w, padding)))
    counts = torch.bincount(indices.flatten(), minlength=ROWS).double().unsqueeze(1)
    if padding_idx >= 0:
        counts[padding_idx] = 0
    assert_close(ours, 24 * counts * make_weight(device).detach())


@every_lookup
def test_tangent_of_the_padding_row(device: str, lookup: str) -> None:
    """Forward mode follows the forward, which reads the padding row; as in torch."""
    weight, tangent = make_weight(device), make_table(ROWS, WIDTH, torch.float64, device, seed=4)
    indices = make_tokens(device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, tangent)
        ours = forward_ad.unpack_dual(LOOKUPS[lookup](dual, indices, 2)).tangent
        theirs = forward_ad.unpack_dual(F.embedding(indices, dual, 2)).tangent
    assert ours is not None and theirs is not None
    assert_close(ours, theirs)
    assert_close(ours, tangent[indices])
