"""What is done to a sparse gradient once it is made, next to ``Tensor.coalesce``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from embed_ext._row_gradients import coalesced
from tests.common import (
    COMPLEX_DTYPES,
    GRAD_DTYPES,
    LAYOUTS,
    OpLog,
    assert_close,
    assert_same_bits,
    expand_scalar,
    make_indices,
    make_table,
)

NUM_ROWS, WIDTH, NUM_ENTRIES = 20, 5, 30


SUM, COALESCE = "embed_ext.embedding_sparse_backward.default", "aten._coalesce.default"


def sparse(
    values: Tensor, rows: Tensor, num_rows: int = NUM_ROWS, is_coalesced: bool = False
) -> Tensor:
    """A COO tensor of values [nnz, ...] and rows [nnz] or [sparse_dim, nnz]."""
    rows = rows if rows.dim() == 2 else rows.unsqueeze(0)
    size = (num_rows,) * rows.size(0) + tuple(values.shape[1:])
    options: Any = {"is_coalesced": True} if is_coalesced else {}
    return torch.sparse_coo_tensor(rows, values, size, check_invariants=False, **options)


def some_gradient(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Entries of random rows, some of them several times."""
    values = make_table(NUM_ENTRIES, WIDTH, dtype, device)
    return sparse(values, make_indices((NUM_ENTRIES,), NUM_ROWS, device=device))


def wide(grad: Tensor) -> Tensor:
    return grad.to(torch.complex128 if grad.is_complex() else torch.float64)


def assert_coalesces(grad: Tensor) -> Tensor:
    """Compare with the exact sums, and say that nothing has happened to the gradient itself."""
    before = grad._values().clone()
    actual, expected = coalesced(grad), wide(grad).coalesce()
    assert actual.is_coalesced() and actual.shape == grad.shape
    assert torch.equal(actual.indices(), expected.indices())
    assert_close(actual.values(), expected.values().to(grad.dtype))
    assert not grad.is_coalesced()
    assert_same_bits(grad._values(), before)
    assert actual.values().untyped_storage().data_ptr() != before.untyped_storage().data_ptr()
    return actual


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, device: str) -> None:
    grad = some_gradient(dtype, device)
    with OpLog() as log:
        coalesced(grad)
    assert SUM in log.calls and COALESCE not in log.calls
    assert_coalesces(grad)


def test_what_is_coalesced_is_returned() -> None:
    grad = some_gradient().coalesce()
    with OpLog() as log:
        assert coalesced(grad) is grad
    assert log.calls == ["aten.is_coalesced.default"]


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), expand_scalar], ids=[*LAYOUTS, "expanded"])
def test_every_layout_of_values(layout: Callable[[Tensor], Tensor]) -> None:
    values = layout(make_table(NUM_ENTRIES, WIDTH))
    assert_coalesces(sparse(values, make_indices((NUM_ENTRIES,), NUM_ROWS)))


def test_bfloat16_is_rounded_once() -> None:
    rows = torch.zeros(257, dtype=torch.int64)
    values = torch.cat([torch.tensor([[256.0]]), torch.ones(256, 1)]).bfloat16()
    assert coalesced(sparse(values, rows)).values().item() == 512


def test_lazily_conjugated_values() -> None:
    values = make_table(NUM_ENTRIES, WIDTH, COMPLEX_DTYPES[0]).conj()
    assert_coalesces(sparse(values, make_indices((NUM_ENTRIES,), NUM_ROWS)))


@pytest.mark.parametrize("num_rows, width", [(NUM_ROWS, WIDTH), (NUM_ROWS, 0), (0, WIDTH), (0, 0)])
def test_without_entries(num_rows: int, width: int, device: str) -> None:
    rows = torch.empty(0, dtype=torch.int64, device=device)
    actual = coalesced(sparse(torch.empty(0, width, device=device), rows, num_rows))
    assert actual.is_coalesced() and actual.shape == (num_rows, width) and actual._nnz() == 0


def test_rows_without_columns(device: str) -> None:
    rows = torch.tensor([3, 1, 3], device=device)
    actual = coalesced(sparse(torch.empty(3, 0, device=device), rows))
    assert actual.is_coalesced() and actual.indices().tolist() == [[1, 3]]


OTHERS: dict[str, Callable[[], Tensor]] = {
    "one dimension": lambda: sparse(make_table(9, 1).flatten(), make_indices((9,), 4)),
    "three dimensions": lambda: sparse(make_table(9, 6).view(9, 2, 3), make_indices((9,), 4)),
    "all sparse": lambda: sparse(make_table(40, 1).flatten(), make_indices((2, 40), NUM_ROWS)),
    "integers": lambda: sparse(torch.ones(9, 2, dtype=torch.int64), make_indices((9,), 4)),
    "requires a gradient": lambda: some_gradient().requires_grad_(),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_torch_coalesces_what_the_op_does_not_take(make: Callable[[], Tensor]) -> None:
    with OpLog() as log:
        actual = coalesced(make())
    assert COALESCE in log.calls and SUM not in log.calls
    assert actual.is_coalesced()
    torch.testing.assert_close(actual.to_dense(), make().to_dense())


def test_a_gradient_of_the_sum() -> None:
    values = make_table(NUM_ENTRIES, WIDTH, torch.float64).requires_grad_()
    rows = make_indices((NUM_ENTRIES,), NUM_ROWS)
    grad = sparse(values, rows)
    weights = make_table(NUM_ROWS, WIDTH, torch.float64, seed=3)
    (coalesced(grad).to_dense() * weights).sum().backward()
    assert_close(values.grad, weights[rows])


@pytest.mark.usefixtures("reports_at_once")
def test_a_row_beyond_the_table(device: str) -> None:
    grad = sparse(make_table(2, WIDTH, device=device), torch.tensor([1, NUM_ROWS], device=device))
    with pytest.raises(IndexError, match=f"{NUM_ROWS}, but weight has {NUM_ROWS} rows"):
        coalesced(grad)
