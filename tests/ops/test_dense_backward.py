"""The dense gradient: a sum by row, compared with the reference in float64 and with torch."""

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
    runs_cuda_kernels,
)

dense_backward = torch.ops.embed_ext.embedding_dense_backward
torch_dense_backward = torch.ops.aten.embedding_dense_backward


def expected(
    grad_output: Tensor,
    indices: Tensor,
    num_weights: int,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """grad_output [..., D], indices [...] -> [V, D], summed in double precision, rounded once."""
    wide = torch.complex128 if grad_output.is_complex() else torch.float64
    total = reference.embedding_dense_backward(
        grad_output.to(wide), indices, num_weights, padding_idx, scale_grad_by_freq
    )
    return total.to(grad_output.dtype)


def make_grad(
    indices: Tensor, width: int, dtype: torch.dtype = torch.float32, seed: int = 2
) -> Tensor:
    """indices [...] -> grad_output [..., width]."""
    table = make_table(indices.numel(), width, dtype, str(indices.device), seed)
    return table.view(*indices.shape, width)


@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_every_dtype_and_index_dtype(
    device: str, dtype: torch.dtype, index_dtype: torch.dtype, scale_grad_by_freq: bool
) -> None:
    indices = make_indices((4, 9), 11, index_dtype, device)
    grad = make_grad(indices, 5, dtype)
    for padding_idx in (-1, 3):
        options = (11, padding_idx, scale_grad_by_freq)
        actual = dense_backward(grad, indices, *options)
        assert_close(actual, expected(grad, indices, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("padding_idx", [-1, 0, 7])
def test_same_bits_as_torch(device: str, dtype: torch.dtype, padding_idx: int) -> None:
    """Both add a row's tokens in order, so that short sums agree exactly (on the CPU)."""
    indices = make_indices((40, 30), 50, device=device)
    grad = make_grad(indices, 33, dtype)
    theirs = torch_dense_backward(grad, indices, 50, padding_idx, False)
    actual = dense_backward(grad, indices, 50, padding_idx)
    if not runs_cuda_kernels(device):
        assert torch.equal(actual, theirs)
    assert_close(actual, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_grad_by_freq_as_torch(device: str, dtype: torch.dtype) -> None:
    indices = make_indices((40, 3), 20, device=device)
    grad = make_grad(indices, 6, dtype)
    theirs = torch_dense_backward(grad, indices, 20, 4, True)
    assert_close(dense_backward(grad, indices, 20, 4, True), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rows_used_once_are_exact(device: str, dtype: torch.dtype) -> None:
    indices = torch.randperm(64, device=device)[:40]
    grad = make_grad(indices, 9, dtype)
    theirs = torch_dense_backward(grad, indices, 64, -1, False)
    assert torch.equal(dense_backward(grad, indices, 64), theirs)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (3, 4), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("width", [0, 1, 3, 8, 65, 513])
def test_every_shape(device: str, shape: tuple[int, ...], width: int) -> None:
    """Including rows longer than the block that is summed at a time."""
    indices = make_indices(shape, 7, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        grad = make_grad(indices, width, dtype)
        actual = dense_backward(grad, indices, 7)
        assert actual.shape == (7, width)
        assert_close(actual, expected(grad, indices, 7))


@pytest.mark.parametrize("num_weights", [1, 255, 256, 257, 2049, 70_000])
@pytest.mark.parametrize("num_tokens", [47, 48, 1000, 9000])
def test_sorting_of_tokens(device: str, num_weights: int, num_tokens: int) -> None:
    """Sizes on both sides of each choice that the sort by row makes."""
    indices = make_indices((num_tokens,), num_weights, device=device)
    grad = make_grad(indices, 2, torch.float64)
    actual = dense_backward(grad, indices, num_weights)
    assert_close(actual, expected(grad, indices, num_weights))


@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("count", [1023, 1024, 1025, 2048, 2500])
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_all_tokens_name_one_row(
    device: str, dtype: torch.dtype, count: int, scale_grad_by_freq: bool
) -> None:
    """Rows used often are summed in chunks whose sums are added afterwards."""
    indices = torch.full((count,), 2, device=device)
    grad = make_grad(indices, 3, dtype)
    if not dtype.is_complex:
        grad = grad.abs()  # so that nothing cancels and errors can be judged relative to the sum
    options = (4, -1, scale_grad_by_freq)
    rtol = 1e-5 if dtype in (torch.float32, torch.complex64) else torch.finfo(dtype).eps
    torch.testing.assert_close(
        dense_backward(grad, indices, *options),
        expected(grad, indices, *options),
        rtol=max(rtol, 1e-12),
        atol=1e-3 if dtype == torch.complex64 else 1e-9,
    )


def test_hot_rows_among_others(device: str) -> None:
    """Chunked rows beside rows used once, wider than one block."""
    hot = torch.tensor([5, 90, 91], device=device).repeat_interleave(1500)
    indices = torch.cat([hot, make_indices((500,), 100, device=device)])
    indices = indices[torch.randperm(indices.numel(), device="cpu").to(device)]
    grad = make_grad(indices, 515, torch.float64)
    for padding_idx in (-1, 90):
        actual = dense_backward(grad, indices, 100, padding_idx, True)
        assert_close(actual, expected(grad, indices, 100, padding_idx, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_summed_in_float32(device: str, dtype: torch.dtype) -> None:
    """Forty thousand ones and a half, rounded once; a sum in the dtype itself stops growing."""
    indices = torch.zeros(40_001, dtype=torch.int64, device=device)
    grad = torch.ones(40_001, 2, dtype=dtype, device=device)
    grad[0] = 0.5
    actual = dense_backward(grad, indices, 1)
    assert torch.equal(actual, torch.full((1, 2), 40_000.5, dtype=dtype, device=device))
    if device == "cpu":
        stuck = 256 if dtype == torch.bfloat16 else 2048
        theirs = torch_dense_backward(grad[1:], indices[1:], 1, -1, False)
        assert theirs.unique().tolist() == [stuck]


def test_a_hundred_thousand_hits_in_bfloat16(device: str) -> None:
    """100,000 is past float16's largest value, which then is rightly infinite."""
    indices = torch.zeros(100_000, dtype=torch.int32, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        grad = torch.ones(100_000, 1, dtype=dtype, device=device)
        assert torch.equal(dense_backward(grad, indices, 1), torch.tensor([[1e5]]).to(grad))
        scaled = dense_backward(grad, indices, 1, -1, True)
        assert torch.equal(scaled, torch.ones(1, 1).to(grad)), "the mean needs no large number"


@pytest.mark.parametrize("count", [1, 5, 3000])
def test_only_padding(device: str, count: int) -> None:
    indices = torch.full((count,), 3, device=device)
    actual = dense_backward(torch.ones(count, 4, device=device), indices, 6, 3)
    assert torch.equal(actual, torch.zeros(6, 4, device=device))


@pytest.mark.parametrize("padding_idx", [6, 2**40, -1, -2])
def test_padding_that_names_no_row_is_none(device: str, padding_idx: int) -> None:
    indices = make_indices((30,), 6, device=device)
    grad = make_grad(indices, 4)
    actual = dense_backward(grad, indices, 6, padding_idx)
    assert_close(actual, expected(grad, indices, 6))


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_layouts(device: str, layout: str, dtype: torch.dtype) -> None:
    indices = make_indices((30,), 6, device=device)
    grad = LAYOUTS[layout](make_grad(indices, 7, dtype))
    actual = dense_backward(grad, indices, 6)
    assert actual.is_contiguous()
    assert_close(actual, expected(grad, indices, 6))


@pytest.mark.parametrize("width", [1, 5])
def test_expanded_grads_and_indices(device: str, width: int) -> None:
    """What sum().backward() hands over: strides of zero."""
    indices = make_indices((6, 4), 9, device=device)
    one = torch.full((), 0.5, device=device)
    row = make_table(1, width, device=device)
    for grad, index in (
        (one.expand(6, 4, width), indices),
        (one.expand(4, 6, width), indices.t()),
        (row.expand(6, 4, width), indices),
        (row.expand(6, 3, width), indices[:, :1].expand(6, 3)),
        (make_table(24, width, device=device).view(4, 6, width).transpose(0, 1), indices),
        (row[0], indices[2, 2]),
    ):
        assert_close(dense_backward(grad, index, 9), expected(grad, index, 9))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_conjugate_and_negative_views(device: str, dtype: torch.dtype) -> None:
    indices = make_indices((20,), 5, device=device)
    grad = make_grad(indices, 3, dtype)
    for view in (grad.conj(), grad.conj().imag, grad.conj()[:, ::2]):
        assert_close(dense_backward(view, indices, 5), expected(view, indices, 5))


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_special_values(device: str, dtype: torch.dtype) -> None:
    """NaN and infinities reach their own row and no other; inf - inf is NaN; -0.0 is zero."""
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([nan, inf, inf, inf, -inf, -0.0, -0.0, 1.0], device=device)
    indices = torch.tensor([0, 1, 1, 2, 2, 3, 4, 4], device=device)
    grad = values.to(dtype).unsqueeze(1).expand(8, 9)
    actual = dense_backward(grad, indices, 6)
    real = actual.real if dtype.is_complex else actual
    column = torch.tensor([nan, inf, nan, 0.0, 1.0, 0.0], device=device).to(real.dtype)
    torch.testing.assert_close(real, column.unsqueeze(1).expand(6, 9), equal_nan=True)


def test_empty_table(device: str) -> None:
    indices = torch.empty(0, dtype=torch.int64, device=device)
    grad = torch.empty(0, 3, device=device)
    assert dense_backward(grad, indices, 0).shape == (0, 3)
    assert torch.equal(dense_backward(grad, indices, 2), torch.zeros(2, 3, device=device))


def test_result_shares_no_memory_with_grad_output(device: str) -> None:
    grad = make_table(3, 4, device=device)
    before = grad.clone()
    dense_backward(grad, torch.arange(3, device=device), 3).zero_()
    assert torch.equal(grad, before)
