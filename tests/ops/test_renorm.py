"""max_norm: rows that are looked up and too long are scaled in place, each once."""

from __future__ import annotations

import math

import pytest
import torch

from embed_ext import reference
from tests.common import (
    COMPLEX_DTYPES,
    GRAD_DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    assert_close,
    make_indices,
    make_table,
)

renorm_ = torch.ops.embed_ext.embedding_renorm_
torch_renorm_ = torch.ops.aten.embedding_renorm_

NORM_TYPES = (2.0, 1.0, 3.0, 0.5, 0.0, math.inf, -math.inf)


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_every_dtype_and_index_dtype(
    device: str, dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    weight = make_table(11, 5, dtype, device)
    indices = make_indices((2, 3), 11, index_dtype, device)
    wide = weight.to(torch.complex128 if dtype.is_complex else torch.float64, copy=True)
    reference.embedding_renorm_(wide, indices, 1.0)
    renorm_(weight, indices, 1.0)
    assert_close(weight, wide.to(dtype))


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128], ids=str)
def test_every_norm(device: str, dtype: torch.dtype, norm_type: float) -> None:
    weight = make_table(12, 7, dtype, device)
    indices = make_indices((9,), 12, device=device)
    weight[indices[0], 2] = 0  # which is not counted where p is 0
    expected, theirs = weight.clone(), weight.clone()
    reference.embedding_renorm_(expected, indices, 0.7, norm_type)
    torch_renorm_(theirs, indices, 0.7, norm_type)
    renorm_(weight, indices, 0.7, norm_type)
    assert_close(weight, expected)
    assert_close(weight, theirs)


@pytest.mark.parametrize("width", [513, 1025, 2049, 5000, 17_000])
def test_long_rows_of_other_norms(device: str, width: int) -> None:
    """Which several warps may share, and several rows a block."""
    weight = make_table(9, width, device=device)
    weight *= torch.linspace(0.1, 2, 9, device=device).unsqueeze(1)
    expected = weight.clone()
    indices = torch.arange(9, device=device)
    reference.embedding_renorm_(expected, indices, math.sqrt(width))
    renorm_(weight, indices, math.sqrt(width))
    assert_close(weight, expected)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_as_torch(device: str, dtype: torch.dtype) -> None:
    weight = make_table(40, 16, dtype, device)
    theirs = weight.clone()
    indices = make_indices((5, 9), 40, device=device)
    torch_renorm_(theirs, indices, 3.5, 2.0)
    renorm_(weight, indices, 3.5, 2.0)
    assert_close(weight, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_table_layouts(device: str, layout: str) -> None:
    """Written through the view's own strides; what lies between its elements stays."""
    weight = LAYOUTS[layout](make_table(12, 7, torch.float64, device))
    expected = weight.clone()
    indices = make_indices((3, 3), 12, device=device).t()
    reference.embedding_renorm_(expected, indices, 1.0)
    renorm_(weight, indices, 1.0)
    assert_close(weight, expected)


def test_only_the_view_is_written(device: str) -> None:
    whole = make_table(8, 9, device=device)
    before = whole.clone()
    renorm_(whole[1::2, 2::3], torch.arange(4, device=device), 0.1)
    changed = whole != before
    expected = torch.zeros_like(changed)
    expected[1::2, 2::3] = True
    assert torch.equal(changed, expected)


def test_rows_not_named_and_rows_short_enough_stay(device: str) -> None:
    weight = torch.tensor([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]], device=device)
    renorm_(weight, torch.tensor([0, 1, 0], device=device), 1.0)
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4], [30.0, 40.0]], device=device)
    assert_close(weight, expected)
    assert torch.equal(weight[1:], expected[1:])


def test_a_row_named_often_is_scaled_once(device: str) -> None:
    """A second pass could shrink it again by rounding; and threads would race."""
    weight = make_table(6, 64, device=device)
    once, often = weight.clone(), weight.clone()
    rows = torch.arange(6, device=device)
    renorm_(once, rows, 0.3)
    renorm_(often, rows.repeat(2000), 0.3)
    assert torch.equal(once, often)


@pytest.mark.parametrize("shape", [(0,), (0, 5), ()], ids=str)
@pytest.mark.parametrize("width", [0, 1, 4])
def test_empty_and_scalar(device: str, shape: tuple[int, ...], width: int) -> None:
    weight = make_table(3, width, torch.float64, device)
    expected = weight.clone()
    indices = make_indices(shape, 3, device=device)
    reference.embedding_renorm_(expected, indices, 0.1)
    renorm_(weight, indices, 0.1)
    assert_close(weight, expected)


def test_zero_rows_and_zero_max_norm(device: str) -> None:
    """A row of norm zero is never longer than max_norm, so that nothing is divided by zero."""
    weight = torch.tensor([[0.0, -0.0], [1.0, 2.0]], device=device)
    renorm_(weight, torch.tensor([0, 1], device=device), 0.0)
    assert torch.equal(weight, torch.zeros(2, 2, device=device))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, -math.inf, 3.0])
def test_nan_and_infinite_rows_as_torch(device: str, norm_type: float) -> None:
    """A row with a NaN has no norm and stays; an infinite one becomes what torch makes of it."""
    inf, nan = math.inf, math.nan
    weight = torch.tensor([[nan, 9.0], [9.0, nan], [inf, 9.0], [9.0, 9.0]], device=device)
    theirs = weight.clone()
    indices = torch.arange(4, device=device)
    torch_renorm_(theirs, indices, 1.0, norm_type)
    renorm_(weight, indices, 1.0, norm_type)
    torch.testing.assert_close(weight, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, *COMPLEX_DTYPES], ids=str)
def test_norms_that_overflow_the_dtype(device: str, dtype: torch.dtype) -> None:
    """The norm is taken in double precision: squares past the dtype's range are no trouble."""
    largest = 6e4 if dtype == torch.float16 else 3e38
    weight = torch.full((1, 4), largest, dtype=dtype, device=device)
    renorm_(weight, torch.zeros(1, dtype=torch.int64, device=device), 2.0)
    assert_close(weight, torch.ones(1, 4, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("value", "dtype", "norm_type", "max_norm"),
    [
        (1e20, torch.bfloat16, 2.0, 2.0),
        (1e4, torch.float32, 10.0, 1.0),
        (2e-23, torch.float32, 2.0, 2e-23),
        (2e-23, torch.complex64, 2.0, 2e-23),
    ],
    ids=str,
)
def test_norms_outside_the_range_of_float32(
    device: str, value: float, dtype: torch.dtype, norm_type: float, max_norm: float
) -> None:
    """The elements are inside it, their powers are too large or too small for it."""
    weight = torch.full((1, 4), value, dtype=dtype, device=device)
    exact = torch.full((1, 4), float(weight[0, 0].real), dtype=torch.float64, device=device)
    length = torch.linalg.vector_norm(exact, norm_type)
    renorm_(weight, torch.zeros(1, dtype=torch.int64, device=device), max_norm, norm_type)
    expected = exact * (max_norm / (length + 1e-7))
    assert_close((weight / expected).to(dtype), torch.ones_like(weight))


def test_version_goes_up(device: str) -> None:
    """So that autograd notices that a table it saved has changed."""
    weight = make_table(3, 2, device=device)
    version = weight._version
    renorm_(weight, torch.tensor([0], device=device), 100.0)
    assert weight._version == version + 1


def test_written_to_overlapping_memory_is_refused_as_in_torch(device: str) -> None:
    """One stored element seen as several columns would be scaled several times."""
    weight = torch.full((3, 1), 5.0, device=device).expand(3, 4)
    indices = torch.tensor([1], device=device)
    with pytest.raises(RuntimeError, match="memory location"):
        torch_renorm_(weight, indices, 1.0, 2.0)
    with pytest.raises(RuntimeError, match="memory location"):
        renorm_(weight, indices, 1.0)
