"""Updates of rows on CUDA: bad indices, and rows of all lengths that teams of lanes have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import embed_ext
from embed_ext import reference
from tests.common import assert_close, assert_same_bits, make_table
from tests.cuda.common import DEVICE, needs_cuda

pytestmark = [*needs_cuda, pytest.mark.usefixtures("reports_later")]

ops = torch.ops.embed_ext

ROWS = 9


def update(weight: Tensor, total: Tensor, indices: list[int]) -> None:
    """Row-wise Adagrad of a gradient of ones."""
    values = torch.ones(len(indices), weight.size(1), device=DEVICE)
    ops.embedding_adagrad_(weight, total, torch.tensor(indices, device=DEVICE), values, 0.5)


BAD_INDICES = {
    "too large": ([1, 4, ROWS], [1, 4], rf"out of range: indices\[2\] is {ROWS}, but weight has"),
    "negative": ([-2, 4, 5], [4, 5], r"out of range: indices\[0\] is -2, but weight has 9 rows"),
    "smallest": ([-(2**63), 4], [4], r"out of range: indices\[0\] is -9223372036854775808, but"),
    "largest": ([3, 2**63 - 1], [3], r"out of range: indices\[1\] is 9223372036854775807, but"),
    "twice": ([1, 4, 4, 5], [1, 4, 5], r"ascending order, but indices\[2\] is 4 and the one be"),
    "descending": ([5, 7, 2], [5, 7], r"ascending order, but indices\[2\] is 2 and the one bef"),
}


@pytest.mark.parametrize("name", BAD_INDICES)
@pytest.mark.parametrize("width", [1, 3, 16, 130, 1030, 4096])
def test_a_bad_entry_is_left_out_and_reported_later(width: int, name: str) -> None:
    indices, good, message = BAD_INDICES[name]
    weight, total = make_table(ROWS, width, device=DEVICE), torch.zeros(ROWS, device=DEVICE)
    expected, expected_total = weight.clone(), total.clone()
    rows = torch.tensor(good, device=DEVICE)
    ones = torch.ones(len(good), width, device=DEVICE)
    reference.embedding_adagrad_(expected, expected_total, rows, ones, 0.5)
    update(weight, total, indices)
    with pytest.raises(IndexError, match=f"embedding_adagrad_: .*{message}"):
        embed_ext.check_indices()
    assert_close(weight, expected)
    assert_close(total, expected_total)
    update(weight, total, good)
    embed_ext.check_indices()


@pytest.mark.parametrize("name", BAD_INDICES)
@pytest.mark.parametrize("width", [0, 16])
def test_in_sync_mode_nothing_is_written(width: int, name: str) -> None:
    indices, good, message = BAD_INDICES[name]
    embed_ext.set_index_check("sync")
    weight, total = make_table(ROWS, width, device=DEVICE), torch.zeros(ROWS, device=DEVICE)
    before = weight.clone()
    with pytest.raises(IndexError, match=f"embedding_adagrad_: .*{message}"):
        update(weight, total, indices)
    assert_same_bits(weight, before)
    assert not total.any()
    update(weight, total, good)


def test_rows_that_are_met_again_in_sync_mode() -> None:
    """Each is above the one before it, but for one."""
    embed_ext.set_index_check("sync")
    weight, total = make_table(ROWS, 16, device=DEVICE), torch.zeros(ROWS, device=DEVICE)
    with pytest.raises(IndexError, match=r"indices\[2\] is 1 and the one before it 5"):
        update(weight, total, [1, 5, 1, 5])
    assert not total.any()


def test_indices_of_a_table_without_columns_are_checked() -> None:
    update(torch.zeros(ROWS, 0, device=DEVICE), torch.zeros(ROWS, device=DEVICE), [3, 3])
    with pytest.raises(IndexError, match="ascending"):
        embed_ext.check_indices()


# One width for each kind of team: parts of a warp, whole warps, a block once and several times.
WIDTHS = (1, 4, 12, 64, 128, 132, 300, 1024, 1028, 1500, 2048, 9000)


@pytest.mark.parametrize("count", [1, 5, 150])
@pytest.mark.parametrize("width", WIDTHS)
def test_row_wise_sums_of_every_width(width: int, count: int) -> None:
    if width * count > 100_000:
        count = 20
    weight = make_table(2 * count, width, torch.float64)
    values = make_table(count, width, torch.float64, seed=1)
    mean, squares = make_table(2 * count, width, torch.float64, seed=2), torch.ones(2 * count)
    indices = torch.arange(1, 2 * count, 2)
    rates: dict[str, float] = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    rates["weight_decay"] = 0.03
    exact = (weight.clone(), mean.clone(), squares.double())
    reference.embedding_adam_(*exact, indices, values, **rates, decoupled=False, step=2)
    for dtype in (torch.float64, torch.float32):
        actual = [table.to(DEVICE, dtype, copy=True) for table in (weight, mean, squares)]
        parts = (*actual, indices.to(DEVICE), values.to(DEVICE, dtype))
        ops.embedding_adam_(*parts, **rates, decoupled=False, step=2)
        for result, wanted in zip(actual, exact, strict=True):
            assert_close(result, wanted.to(result))
