"""The sparse gradient: one COO entry a token, in order, so that comparisons here are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from embed_ext import reference
from tests.common import (
    GRAD_DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    assert_close,
    make_indices,
    make_table,
)

sparse_backward = torch.ops.embed_ext.embedding_sparse_backward
dense_backward = torch.ops.embed_ext.embedding_dense_backward
torch_sparse_backward = torch.ops.aten.embedding_sparse_backward


def assert_same_entries(actual: Tensor, expected: Tensor) -> None:
    """Compare two uncoalesced COO tensors [V, D] entry by entry, order included."""
    assert actual.layout == expected.layout == torch.sparse_coo
    assert not actual.is_coalesced()
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert (actual.sparse_dim(), actual.dense_dim()) == (1, 1)
    torch.testing.assert_close(actual._indices(), expected._indices(), rtol=0, atol=0)
    torch.testing.assert_close(actual._values(), expected._values(), rtol=0, atol=0, equal_nan=True)


def make_grad(indices: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """indices [...] -> grad_output [..., width]."""
    table = make_table(indices.numel(), width, dtype, str(indices.device), seed=2)
    return table.view(*indices.shape, width)


@pytest.mark.parametrize("padding_idx", [-1, 3])
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_every_dtype_and_index_dtype(
    device: str, dtype: torch.dtype, index_dtype: torch.dtype, padding_idx: int
) -> None:
    indices = make_indices((4, 9), 11, index_dtype, device)
    grad = make_grad(indices, 5, dtype)
    actual = sparse_backward(grad, indices, 11, padding_idx)
    assert_same_entries(actual, reference.embedding_sparse_backward(grad, indices, 11, padding_idx))
    theirs = torch_sparse_backward(grad, indices.long(), 11, padding_idx, False)
    assert_same_entries(actual, theirs)


@pytest.mark.parametrize("padding_idx", [-1, 3])
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_scale_grad_by_freq(device: str, dtype: torch.dtype, padding_idx: int) -> None:
    """torch refuses this combination; here its sum is the dense gradient's."""
    indices = make_indices((40,), 11, torch.int32, device)
    grad = make_grad(indices, 5, dtype)
    options = (11, padding_idx, True)
    actual = sparse_backward(grad, indices, *options)
    wide = grad.to(torch.complex128 if dtype.is_complex else torch.float64)
    expected = reference.embedding_sparse_backward(wide, indices, *options)
    assert torch.equal(actual._indices(), expected._indices())
    assert_close(actual._values(), expected._values().to(dtype))
    assert_close(
        actual.to(wide.dtype).to_dense().to(dtype), dense_backward(grad, indices, *options)
    )


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (3, 4), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("width", [0, 1, 6])
def test_every_shape(device: str, shape: tuple[int, ...], width: int) -> None:
    indices = make_indices(shape, 7, device=device)
    for dtype in (torch.float32, torch.complex64):
        grad = make_grad(indices, width, dtype)
        for scale in (False, True):
            actual = sparse_backward(grad, indices, 7, 2, scale)
            assert actual.shape == (7, width)
            assert torch.equal(actual._indices()[0], indices.reshape(-1)[indices.reshape(-1) != 2])
            assert_close(actual.to_dense(), dense_backward(grad, indices, 7, 2, scale))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_layouts(device: str, layout: str) -> None:
    indices = make_indices((30,), 6, device=device)
    grad = LAYOUTS[layout](make_grad(indices, 7))
    for padding_idx in (-1, 2):
        actual = sparse_backward(grad, indices, 6, padding_idx)
        assert_same_entries(
            actual, reference.embedding_sparse_backward(grad, indices, 6, padding_idx)
        )


def test_expanded_grads_and_indices(device: str) -> None:
    indices = make_indices((6, 4), 9, torch.int32, device)
    one = torch.full((), 0.5, device=device)
    for grad, index in (
        (one.expand(6, 4, 5), indices),
        (one.expand(4, 6, 5), indices.t()),
        (one.expand(6, 3, 5), indices[:, :1].expand(6, 3)),
        (make_table(24, 5, device=device).view(4, 6, 5).transpose(0, 1), indices),
    ):
        actual = sparse_backward(grad, index, 9)
        assert actual._values().is_contiguous()
        assert_same_entries(actual, reference.embedding_sparse_backward(grad, index, 9))


@pytest.mark.parametrize("count", [1, 2500])
def test_only_padding_leaves_no_entry(device: str, count: int) -> None:
    indices = torch.full((count,), 3, device=device)
    actual = sparse_backward(torch.ones(count, 4, device=device), indices, 6, 3, True)
    assert actual._nnz() == 0
    assert actual.shape == (6, 4)


@pytest.mark.parametrize("padding_idx", [6, 2**40, -1, -2])
def test_padding_that_names_no_row_is_none(device: str, padding_idx: int) -> None:
    indices = make_indices((30,), 6, device=device)
    grad = make_grad(indices, 4)
    actual = sparse_backward(grad, indices, 6, padding_idx)
    assert_same_entries(actual, reference.embedding_sparse_backward(grad, indices, 6))


def test_special_values(device: str) -> None:
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1.0], device=device)
    actual = sparse_backward(values.unsqueeze(1), torch.tensor([1, 1, 0, 2], device=device), 3)
    assert torch.equal(actual._values().view(torch.int32), values.view(torch.int32).unsqueeze(1))


@pytest.mark.parametrize("padding_idx", [-1, 0])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_shares_no_memory_with_its_inputs(
    device: str, index_dtype: torch.dtype, padding_idx: int
) -> None:
    """The caller may write to its indices and grad_output while the gradient lives on."""
    indices = torch.arange(1, 4, dtype=index_dtype, device=device)
    grad = make_grad(indices, 2)
    actual = sparse_backward(grad, indices, 4, padding_idx)
    before = actual.to_dense()
    indices.zero_()
    grad.zero_()
    assert torch.equal(actual.to_dense(), before)


def test_conjugate_views(device: str) -> None:
    indices = make_indices((20,), 5, device=device)
    grad = make_grad(indices, 3, torch.complex64).conj()
    actual = sparse_backward(grad, indices, 5)
    assert_same_entries(actual, reference.embedding_sparse_backward(grad, indices, 5))
