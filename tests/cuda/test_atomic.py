"""The dense backward that adds atomically: every row gets all of its tokens, each once."""

from __future__ import annotations

import pytest
import torch

import embed_ext
from tests.cuda.common import DEVICE, WIDTHS, needs_cuda, row_sums, whole_numbers

pytestmark = needs_cuda

dense_backward = torch.ops.embed_ext.embedding_dense_backward

# Tokens of a row within a tile of 32: fewer than, as many as and more than a group of lanes takes.
RUNS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_that_share_a_tile(dtype: torch.dtype, width: int, shuffled: bool) -> None:
    """Rows that end anywhere in a group of lanes, padding among them."""
    repeats = torch.tensor(RUNS * 3)
    indices = torch.repeat_interleave(torch.arange(len(repeats)), repeats)
    indices[::11] = 5
    if shuffled:
        indices = indices[torch.randperm(len(indices))]
    indices = indices.to(DEVICE)
    grad = whole_numbers((len(indices), width), dtype).to(DEVICE)
    num_rows = len(indices)  # so many that tokens are not sorted
    actual = dense_backward(grad, indices, num_rows, 7)
    expected = row_sums(grad, indices, num_rows)
    expected[7] = 0
    assert torch.equal(actual.double(), expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_one_row_takes_every_token(width: int) -> None:
    indices = torch.full((8192,), 3, device=DEVICE)
    grad = whole_numbers((8192, width), torch.float32).to(DEVICE)
    actual = dense_backward(grad, indices, 8192)
    assert torch.equal(actual.double(), row_sums(grad, indices, 8192))


def test_bad_indices_among_the_tokens_of_a_row() -> None:
    indices = torch.full((100,), 3, device=DEVICE)
    indices[7::9] = 1000
    grad = whole_numbers((100, 4), torch.float32).to(DEVICE)
    actual = dense_backward(grad, indices, 500)
    good = indices < 500
    assert torch.equal(actual.double(), row_sums(grad[good], indices[good], 500))
    with pytest.raises(IndexError, match="is 1000, but weight has 500 rows"):
        embed_ext.check_indices()
