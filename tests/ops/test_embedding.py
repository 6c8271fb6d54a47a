"""The forward op: a lookup copies bits, so that every comparison here is exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from embed_ext import reference
from tests.common import (
    FROZEN_DTYPES,
    GRAD_DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    assert_same_bits,
    expand_scalar,
    make_indices,
    make_table,
)

embedding = torch.ops.embed_ext.embedding

SHAPES = ((), (1,), (0,), (0, 5), (3, 4), (2, 1, 3))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", GRAD_DTYPES + FROZEN_DTYPES, ids=str)
def test_every_dtype_and_index_dtype(
    device: str, dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    weight = make_table(11, 5, dtype, device)
    indices = make_indices((4, 6), 11, index_dtype, device)
    out = embedding(weight, indices)
    assert_same_bits(out, reference.embedding(weight, indices))
    assert_same_bits(out, F.embedding(indices.long(), weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", [0, 1, 3, 4, 8, 16, 17, 32, 64, 65])
def test_every_shape_and_row_size(device: str, shape: tuple[int, ...], width: int) -> None:
    """Rows of 16 to 256 bytes have copies of their own; 0-D, empty and zero-width work too."""
    weight = make_table(9, width, device=device)
    indices = make_indices(shape, 9, device=device)
    out = embedding(weight, indices)
    assert out.shape == (*shape, width)
    assert out.is_contiguous()
    assert_same_bits(out, reference.embedding(weight, indices))


@pytest.mark.parametrize("dtype", [torch.int8, *GRAD_DTYPES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_table_layouts(device: str, layout: str, dtype: torch.dtype) -> None:
    """Element sizes of 1, 2, 4, 8 and 16 bytes, contiguous or not."""
    weight = LAYOUTS[layout](make_table(12, 7, dtype, device))
    indices = make_indices((50,), 12, device=device)
    assert_same_bits(embedding(weight, indices), reference.embedding(weight, indices))


@pytest.mark.parametrize("width", [1, 6])
def test_expanded_tables(device: str, width: int) -> None:
    """Strides of zero in either dimension, or both."""
    indices = make_indices((5, 3), 8, device=device)
    table = make_table(8, width, device=device)
    for weight in (
        expand_scalar(table),
        table[:1].expand(8, width),
        table[:, :1].expand(8, width),
        table[2:].t()[-1:].t().expand(6, width).repeat_interleave(2, dim=0)[:8],
    ):
        assert_same_bits(embedding(weight, indices), reference.embedding(weight, indices))


@pytest.mark.parametrize(("columns", "first"), [(6, 2), (8, 1)])
def test_offset_view(device: str, columns: int, first: int) -> None:
    """A table that starts inside its storage; in the second, nothing else forbids wide loads."""
    weight = make_table(20, columns, device=device)[3:, first : first + columns // 2]
    indices = make_indices((30,), 17, device=device)
    assert_same_bits(embedding(weight, indices), reference.embedding(weight, indices))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_index_layouts(device: str, index_dtype: torch.dtype) -> None:
    """Transposed, sliced and expanded indices keep their shape and order."""
    weight = make_table(10, 3, device=device)
    indices = make_indices((6, 4), 10, index_dtype, device)
    for view in (indices.t(), indices[::2, 1:], indices[:, :1].expand(6, 5), indices[0, 0]):
        assert_same_bits(embedding(weight, view), reference.embedding(weight, view))


@pytest.mark.parametrize("num_indices", [1, 15, 16, 17, 1000, 70_000])
def test_number_of_indices(device: str, num_indices: int) -> None:
    """Around the distance of the prefetch, and enough for several threads."""
    weight = make_table(300, 12, device=device)
    indices = make_indices((num_indices,), 300, torch.int32, device)
    assert_same_bits(embedding(weight, indices), reference.embedding(weight, indices))


@pytest.mark.parametrize("num_indices", [6000, 50_000])
def test_rows_that_end_within_a_sector(device: str, num_indices: int) -> None:
    """So many that a block, on CUDA, takes as many rows as there is room for."""
    weight = make_table(300, 3, device=device)
    indices = make_indices((num_indices,), 300, device=device)
    assert_same_bits(embedding(weight, indices), reference.embedding(weight, indices))


@pytest.mark.parametrize("width", [516, 1000, 1001])
def test_the_last_of_long_rows(device: str, width: int) -> None:
    """Nothing lies behind it that a kernel may read."""
    weight = make_table(3, width, device=device)
    indices = torch.tensor([2, 0, 2], device=device)
    assert_same_bits(embedding(weight, indices), reference.embedding(weight, indices))


def test_one_row_table(device: str) -> None:
    weight = make_table(1, 4, device=device)
    out = embedding(weight, torch.zeros(2, 3, dtype=torch.int64, device=device))
    assert_same_bits(out, weight[0].expand(2, 3, 4))


def test_empty_table_with_no_indices(device: str) -> None:
    weight = torch.empty(0, 4, device=device)
    assert embedding(weight, torch.empty(0, 2, dtype=torch.int64, device=device)).shape == (0, 2, 4)


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_special_values_keep_their_bits(device: str, dtype: torch.dtype) -> None:
    """-0.0, infinities and NaNs come out as they lie in the table."""
    real = torch.finfo(dtype).tiny
    values = [-0.0, 0.0, float("nan"), float("inf"), -float("inf"), real, -real / 2]
    weight = torch.tensor(values, dtype=dtype, device=device).unsqueeze(1).repeat(1, 5)
    indices = torch.arange(len(values), device=device).flip(0)
    assert_same_bits(embedding(weight, indices), weight.flip(0))


def test_nan_payload_survives(device: str) -> None:
    bits = torch.tensor([[0x7FC12345, 0x7F812345]], dtype=torch.int32, device=device)
    weight = bits.view(torch.float32)
    out = embedding(weight, torch.zeros(1, dtype=torch.int64, device=device))
    assert torch.equal(out.view(torch.int32), bits)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_conjugate_and_negative_views(device: str, dtype: torch.dtype) -> None:
    """Views that carry a lazy conjugation or sign are resolved, not copied as they lie."""
    weight = make_table(6, 4, dtype, device)
    indices = make_indices((9,), 6, device=device)
    for view in (weight.conj(), weight.conj().imag, weight.conj().t().contiguous().t()):
        assert_same_bits(embedding(view, indices), reference.embedding(view, indices))


def test_options_leave_the_values_alone(device: str) -> None:
    """padding_idx, scale_grad_by_freq and sparse shape the gradient only."""
    weight = make_table(6, 4, device=device)
    indices = make_indices((9,), 6, device=device)
    for options in ((2, False, False), (-1, True, False), (99, True, True)):
        assert_same_bits(embedding(weight, indices, *options), weight[indices])


def test_result_is_a_copy(device: str) -> None:
    """Writing to the result changes neither the table nor, later, the other way round."""
    weight = make_table(4, 3, device=device)
    before = weight.clone()
    out = embedding(weight, torch.tensor([1, 1], device=device))
    out.zero_()
    assert torch.equal(weight, before)
