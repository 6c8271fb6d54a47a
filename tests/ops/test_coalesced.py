"""The coalesced sparse gradient: one COO entry a row in use, in ascending order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from embed_ext import reference
from tests.common import (
    GRAD_DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    assert_close,
    make_indices,
    make_table,
    runs_cuda_kernels,
)
from tests.cuda.common import deterministic
from tests.ops.test_sparse_backward import make_grad, sparse_backward

dense_backward = torch.ops.embed_ext.embedding_dense_backward


def coalesced_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int = -1, scale: bool = False
) -> Tensor:
    """grad [..., D], indices [...] -> sparse [V, D], with everything but the sums checked."""
    out: Tensor = sparse_backward(grad, indices, num_weights, padding_idx, scale, True)
    assert out.layout == torch.sparse_coo and out.is_coalesced()
    assert (out.shape, out.dtype) == ((num_weights, grad.size(-1)), grad.dtype)
    assert (out.sparse_dim(), out.dense_dim()) == (1, 1)
    used = indices.long()[indices.long() != padding_idx].unique()
    assert torch.equal(out.indices(), used.unsqueeze(0))
    assert out.values().is_contiguous() and out.indices().is_contiguous()
    return out


def exact(grad: Tensor, indices: Tensor, num_weights: int, *options: object) -> Tensor:
    """The values [U, D] in double precision, rounded to the gradient's dtype."""
    wide = grad.to(torch.complex128 if grad.is_complex() else torch.float64)
    out = reference.embedding_sparse_backward(wide, indices, num_weights, *options, coalesced=True)  # type: ignore[arg-type]
    return out.values().to(grad.dtype)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("padding_idx", [-1, 3])
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_every_dtype_and_index_dtype(
    device: str, dtype: torch.dtype, index_dtype: torch.dtype, padding_idx: int, scale: bool
) -> None:
    indices = make_indices((4, 9), 11, index_dtype, device)
    grad = make_grad(indices, 5, dtype)
    actual = coalesced_backward(grad, indices, 11, padding_idx, scale)
    assert_close(actual.values(), exact(grad, indices, 11, padding_idx, scale))
    with deterministic(runs_cuda_kernels(device)):  # atomic adds come in any order
        dense = dense_backward(grad, indices, 11, padding_idx, scale)
    assert torch.equal(actual.to_dense(), dense)


@pytest.mark.parametrize("padding_idx", [-1, 7])
@pytest.mark.parametrize("count", [40, 300, 30_000])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_is_the_other_one_coalesced(
    device: str, dtype: torch.dtype, count: int, padding_idx: int
) -> None:
    """To the last bit, of whole numbers. In 16 bits torch's sum of many does not hold these."""
    indices = make_indices((count,), 5000, device=device)
    indices[: count // 3] = 4999  # in several chunks of the sum
    grad = make_table(count, 3, torch.float64, device, seed=2).sign().to(dtype)
    actual = coalesced_backward(grad, indices, 5000, padding_idx)
    wide = grad.double() if dtype.itemsize == 2 else grad
    expected = sparse_backward(wide, indices, 5000, padding_idx).coalesce()
    assert torch.equal(actual.indices(), expected.indices())
    assert torch.equal(actual.values(), expected.values().to(dtype))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (3, 4), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("width", [0, 1, 6])
def test_every_shape(device: str, shape: tuple[int, ...], width: int) -> None:
    indices = make_indices(shape, 7, device=device)
    for dtype in (torch.float32, torch.complex64):
        grad = make_grad(indices, width, dtype)
        for padding_idx in (-1, 2):
            for scale in (False, True):
                actual = coalesced_backward(grad, indices, 7, padding_idx, scale)
                assert_close(actual.values(), exact(grad, indices, 7, padding_idx, scale))


@pytest.mark.parametrize("num_rows", [0, 1])
def test_smallest_tables(device: str, num_rows: int) -> None:
    indices = torch.zeros(5 * num_rows, dtype=torch.int64, device=device)
    actual = coalesced_backward(torch.ones(5 * num_rows, 2, device=device), indices, num_rows)
    assert actual.values().tolist() == [[5.0, 5.0]] * num_rows


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_one_row_takes_every_token(device: str, dtype: torch.dtype, scale: bool) -> None:
    """A bfloat16 running sum would stop at 256."""
    indices = torch.full((4096,), 3, device=device)
    actual = coalesced_backward(
        torch.ones(4096, 2, dtype=dtype, device=device), indices, 6, -1, scale
    )
    assert actual.values().tolist() == [[1.0 if scale else 4096.0] * 2]


@pytest.mark.parametrize("count", [1, 2500])
def test_only_padding_leaves_no_entry(device: str, count: int) -> None:
    indices = torch.full((count,), 3, device=device)
    for dtype in (torch.float32, torch.complex64):
        grad = torch.ones(count, 4, dtype=dtype, device=device)
        assert coalesced_backward(grad, indices, 6, 3, True)._nnz() == 0


@pytest.mark.parametrize("padding_idx", [6, 2**40, -1, -2])
def test_padding_that_names_no_row_is_none(device: str, padding_idx: int) -> None:
    indices = make_indices((30,), 6, device=device)
    grad = make_grad(indices, 4)
    actual = coalesced_backward(grad, indices, 6, padding_idx)
    assert torch.equal(actual.to_dense(), coalesced_backward(grad, indices, 6).to_dense())


def test_a_row_whose_sum_is_zero_keeps_its_entry(device: str) -> None:
    """As in coalesce(): an optimizer's moments of that row move on."""
    indices = torch.tensor([4, 1, 4], device=device)
    grad = torch.tensor([[2.0], [1.0], [-2.0]], device=device)
    actual = coalesced_backward(grad, indices, 6)
    assert actual.values().flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_layouts(device: str, layout: str) -> None:
    indices = make_indices((30,), 6, device=device)
    for dtype in (torch.float32, torch.complex64):
        grad = LAYOUTS[layout](make_grad(indices, 7, dtype))
        actual = coalesced_backward(grad, indices, 6, 2)
        assert_close(actual.values(), exact(grad, indices, 6, 2))


def test_expanded_grads_and_indices(device: str) -> None:
    indices = make_indices((6, 4), 9, torch.int32, device)
    one = torch.full((), 0.5, device=device)
    for grad, index in (
        (one.expand(6, 4, 5), indices),
        (one.expand(4, 6, 5), indices.t()),
        (one.expand(6, 3, 5), indices[:, :1].expand(6, 3)),
        (make_table(24, 5, device=device).view(4, 6, 5).transpose(0, 1), indices),
    ):
        assert_close(coalesced_backward(grad, index, 9).values(), exact(grad, index, 9))


def test_conjugate_views(device: str) -> None:
    indices = make_indices((20,), 5, device=device)
    grad = make_grad(indices, 3, torch.complex64).conj()
    assert_close(coalesced_backward(grad, indices, 5).values(), exact(grad, indices, 5))


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_shares_no_memory_with_its_inputs(device: str, index_dtype: torch.dtype) -> None:
    """The caller may write to its indices and grad_output while the gradient lives on."""
    indices = torch.arange(1, 4, dtype=index_dtype, device=device)
    grad = make_grad(indices, 2)
    actual = coalesced_backward(grad, indices, 4)
    before = actual.to_dense()
    indices.zero_()
    grad.zero_()
    assert torch.equal(actual.to_dense(), before)


def test_bad_index_is_named() -> None:
    message = r"embedding_sparse_backward: index out of range: indices\[1\] is 5"
    with pytest.raises(IndexError, match=message):
        sparse_backward(torch.ones(3, 2), torch.tensor([0, 5, 1]), 5, -1, False, True)


def test_without_data() -> None:
    grad = torch.ones(3, 4, 2, device="meta", dtype=torch.bfloat16)
    indices = torch.zeros(3, 4, device="meta", dtype=torch.int64)
    actual = sparse_backward(grad, indices, 5, -1, False, True)
    assert actual.is_meta and actual.is_coalesced()
    assert (actual.shape, actual.dtype) == ((5, 2), torch.bfloat16)
