"""Tokens of one row are summed in the order of the batch, whichever way they were sorted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from embed_ext import reference
from tests.common import assert_same_bits, generator, make_indices, make_table

dense_backward = torch.ops.embed_ext.embedding_dense_backward
grad_add = torch.ops.embed_ext.embedding_grad_add_

# Around each choice of the sort by row: insertion below 48 tokens, two threads from 2 * 8,192 on
# (and to look for runs from 2 * 16,384), chunks of 1,024, digits of up to 11 bits.
COUNTS = [4, 47, 48, 49, 1025, 16_383, 16_384, 32_767, 32_768, 50_001]
NUM_ROWS = [1, 2, 3, 2048, 2049, 65_537, 5_000_000]


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def spread(num_groups: int, num_rows: int) -> Tensor:
    """Rows [num_groups], no two alike, from one end of the table to the other, shuffled."""
    rows = torch.linspace(0, num_rows - 1, num_groups, dtype=torch.float64).long()
    return rows[torch.randperm(num_groups, generator=generator())]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [n for n in COUNTS if n >= 8])
@pytest.mark.parametrize("num_rows", [n for n in NUM_ROWS if n >= 3])
def test_order_decides_the_sum(num_rows: int, count: int, threads: int) -> None:
    """1e8 + 1 - 1e8 + 1 is 1 in float32, in this order alone. What is left is padding."""
    torch.set_num_threads(threads)
    values = torch.tensor([1e8, 1.0, -1e8, 1.0])
    rows = spread(min(count // 4, num_rows), num_rows)
    places = torch.randperm(count, generator=generator(1))[: 4 * len(rows)].sort().values
    indices = torch.full((count,), num_rows)
    indices[places] = rows.repeat(4)  # all first uses, all second ones, ...
    grad = torch.full((count, 2), 3.0)
    grad[places] = values.repeat_interleave(len(rows))[:, None]
    expected = torch.zeros(num_rows + 1, 2)
    expected[rows] = 1
    assert_same_bits(dense_backward(grad, indices, num_rows + 1, num_rows), expected)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_order_decides_the_sum_of_few_tokens(threads: int, index_dtype: torch.dtype) -> None:
    """Every count that is sorted by insertion, the tokens of two rows taking turns."""
    torch.set_num_threads(threads)
    values = torch.tensor([1e8, 1.0, -1e8, 1.0])
    for times in range(1, 6):
        # Rows 7 and 2 use each value in turn; between them others that come once.
        others = torch.arange(10, 10 + times)
        indices = torch.cat([torch.tensor([7, 2] * 4), others]).to(index_dtype)
        grad = torch.cat([values.repeat_interleave(2), torch.full((times,), 5.0)])[:, None]
        actual = dense_backward(grad, indices, 20)
        expected = torch.zeros(20, 1)
        expected[[2, 7]] = 1
        expected[others] = 5
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_every_token_is_summed_once(num_rows: int, count: int, index_dtype: torch.dtype) -> None:
    """Whole numbers, so that the sums are exact: nothing is lost, doubled or put elsewhere."""
    indices = make_indices((count,), num_rows, index_dtype)
    indices[:: max(1, count // 7)] = num_rows - 1  # the largest, whose digits are the most
    grad = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    for padding_idx in (-1, int(indices[0]), int(indices[-1])):
        expected = reference.embedding_dense_backward(grad, indices, num_rows, padding_idx, False)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert_same_bits(dense_backward(grad, indices, num_rows, padding_idx), expected)
            table = torch.zeros(num_rows, 1, dtype=torch.float64)
            grad_add(table, grad, indices, padding_idx)
            assert_same_bits(table, expected)


@pytest.mark.parametrize("count", [40, 5000, 40_000, 70_000])
@pytest.mark.parametrize("num_rows", [300, 3000, 70_000])
def test_same_bits_as_torch(num_rows: int, count: int) -> None:
    """Torch sums in token order too; rows of up to a chunk, from values of all magnitudes."""
    indices = make_indices((count,), num_rows)
    grad = make_table(count, 3) * 10.0 ** make_table(count, 1, seed=3)
    expected = torch.ops.aten.embedding_dense_backward(grad, indices, num_rows, 5, False)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(dense_backward(grad, indices, num_rows, 5), expected)
