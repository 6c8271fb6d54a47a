"""Updates of some rows against the reference in float64; what else they must and must not do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.common import REAL_DTYPES, assert_close, assert_same_bits, make_table
from tests.ops.updates import METHODS, make_update

every_method = pytest.mark.parametrize("name", METHODS)


@every_method
@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 64, 130])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_every_dtype_and_width(device: str, dtype: torch.dtype, width: int, name: str) -> None:
    update = make_update(METHODS[name], 29, width, 13, dtype, device)
    expected = update.run_reference()
    for actual, wanted in zip(update.run(), expected, strict=True):
        assert_close(actual, wanted)


@every_method
@pytest.mark.parametrize("count", [0, 1, 300])
def test_none_one_and_all_rows(device: str, name: str, count: int) -> None:
    update = make_update(METHODS[name], 300, 20, count, device=device)
    before, expected = update.clone(), update.run_reference()
    for actual, wanted in zip(update.run(), expected, strict=True):
        assert_close(actual, wanted)
    others = torch.ones(300, dtype=torch.bool, device=device)
    others[update.indices] = False
    for actual, old in zip(update.written, before.written, strict=True):
        assert_same_bits(actual[others], old[others])
        assert count == 0 or not torch.equal(actual[update.indices], old[update.indices])


@every_method
@pytest.mark.parametrize(("num_rows", "width"), [(0, 4), (7, 0), (0, 0)])
def test_empty_tables(device: str, name: str, num_rows: int, width: int) -> None:
    update = make_update(METHODS[name], num_rows, width, min(num_rows, 3), device=device)
    before = update.clone()
    for actual, old in zip(update.run(), before.written, strict=True):
        assert_same_bits(actual, old)


@every_method
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_many_rows(device: str, dtype: torch.dtype, name: str) -> None:
    """Enough for several threads, and for rows that are fetched ahead."""
    update = make_update(METHODS[name], 5000, 40, 3000, dtype, device)
    expected = update.run_reference()
    for actual, wanted in zip(update.run(), expected, strict=True):
        assert_close(actual, wanted)


def columns_apart(table: Tensor) -> Tensor:
    """The same numbers [...] in memory where those of a row are not side by side."""
    return torch.stack([table, torch.zeros_like(table)], -1)[..., 0]


def in_a_wider_table(table: Tensor) -> Tensor:
    """The same numbers [...] where a row's are followed by something else."""
    if table.dim() == 1:
        return columns_apart(table)
    return torch.cat([table, torch.ones_like(table[:, :3])], 1)[:, : table.size(1)]


def by_column(table: Tensor) -> Tensor:
    """The same numbers [...] one column after the other."""
    return table.t().contiguous().t()


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [columns_apart, in_a_wider_table, by_column])
def test_layouts(
    device: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, name: str
) -> None:
    update = make_update(METHODS[name], 50, 21, 30, dtype, device)
    expected = update.clone().run()
    for actual, wanted in zip(update.map(layout).run(), expected, strict=True):
        assert_same_bits(actual.contiguous(), wanted)


@every_method
def test_expanded_values_and_strided_indices(device: str, name: str) -> None:
    update = make_update(METHODS[name], 50, 21, 30, device=device)
    one = update.values[:1].expand(30, 21)
    strided = torch.stack([update.indices, update.indices], 1)[:, 0]
    expanded = type(update)(update.method, update.weight, update.states, strided, one)
    expected = expanded.run_reference()
    for actual, wanted in zip(expanded.run(), expected, strict=True):
        assert_close(actual, wanted)


@every_method
def test_maximize_follows_the_negative_gradient(device: str, name: str) -> None:
    update = make_update(METHODS[name], 30, 18, 12, device=device)
    negative = type(update)(
        update.method, update.weight, update.states, update.indices, -update.values
    ).clone()
    for actual, wanted in zip(update.run(maximize=True), negative.run(), strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("name", ["sgd", "sgd, nesterov"])
def test_no_decay_of_an_infinite_weight(device: str, name: str) -> None:
    """Infinity times a decay of 0 is no number, and nobody has asked for it."""
    update = make_update(METHODS[name], 5, 20, 5, device=device)
    update.weight[2] = math.inf
    update.run()
    assert torch.isinf(update.weight[2]).all()
    assert torch.isfinite(update.weight[[0, 1, 3, 4]]).all()


@every_method
def test_a_nan_stays_in_its_row(device: str, name: str) -> None:
    update = make_update(METHODS[name], 9, 20, 9, device=device)
    update.values[4] = math.nan
    update.run()
    others = torch.arange(9, device=device) != 4
    for written in update.written:
        assert written[4].isnan().all()
        assert written[others].isfinite().all()


def test_squares_beyond_the_largest_float16(device: str) -> None:
    """State and sums are float32."""
    for name in ("adagrad", "row-wise adagrad", "adam", "row-wise adam"):
        update = make_update(METHODS[name], 5, 20, 5, torch.float16, device)
        update.values.fill_(6e4)
        expected = update.run_reference()
        assert all(written.isfinite().all() for written in expected)
        for actual, wanted in zip(update.run(), expected, strict=True):
            assert_close(actual, wanted)


@every_method
def test_versions_tell_who_has_saved_a_tensor(device: str, name: str) -> None:
    update = make_update(METHODS[name], 9, 20, 4, device=device)
    before = [written._version for written in update.written]
    update.run()
    assert [written._version for written in update.written] == [v + 1 for v in before]
    assert (update.values._version, update.indices._version) == (0, 0)


def test_meta_writes_nothing_and_checks() -> None:
    update = make_update(METHODS["adam"], 9, 20, 4)
    on_meta = update.map(lambda tensor: tensor.to("meta"))
    on_meta = type(update)(
        on_meta.method, on_meta.weight, on_meta.states, update.indices.to("meta"), on_meta.values
    )
    on_meta.run()
    wrong = type(update)(
        on_meta.method, on_meta.weight, on_meta.states, on_meta.indices, on_meta.values[:, 1:]
    )
    with pytest.raises(RuntimeError, match="embedding_adam_: expected values of shape"):
        wrong.run()


@pytest.mark.large
def test_more_than_2_31_elements(device: str) -> None:
    """Of a table of which only what is touched exists."""
    rows, width = 2**25, 65
    weight = torch.empty(rows, width, dtype=torch.bfloat16, device=device)
    indices = torch.tensor([3, rows - 1], device=device)
    weight[indices] = 1.0
    total = torch.zeros(rows, device=device)
    values = make_table(2, width, torch.bfloat16, device)
    torch.ops.embed_ext.embedding_adagrad_(weight, total, indices, values, 0.5)
    spread = values.float().square().mean(1, keepdim=True).sqrt()
    assert_close(weight[indices], (1 - 0.5 * values.float() / spread).bfloat16())
