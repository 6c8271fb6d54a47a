"""Adding a gradient to a table that is there: the same sums, met by what the table holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embed_ext import reference
from tests.common import (
    GRAD_DTYPES,
    INDEX_DTYPES,
    REAL_DTYPES,
    assert_close,
    assert_same_bits,
    make_indices,
    make_table,
)

grad_add = torch.ops.embed_ext.embedding_grad_add_
LOW_PRECISION = (torch.bfloat16, torch.float16)
ROWS = 11


def make_grad(indices: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """indices [...] -> grad_output [..., width]."""
    table = make_table(indices.numel(), width, dtype, str(indices.device), seed=2)
    return table.view(*indices.shape, width)


def expected(table: Tensor, grad_output: Tensor, indices: Tensor, *options: object) -> Tensor:
    """table [V, D], grad_output [..., D], indices [...] -> [V, D], in double, rounded once."""
    wide = torch.complex128 if table.is_complex() else torch.float64
    total = table.to(wide, copy=True)
    reference.embedding_grad_add_(total, grad_output.to(wide), indices, *options)
    return total.to(table.dtype)


@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
def test_every_dtype_and_index_dtype(
    device: str, dtype: torch.dtype, index_dtype: torch.dtype, scale_grad_by_freq: bool
) -> None:
    indices = make_indices((4, 9), ROWS, index_dtype, device)
    grad = make_grad(indices, 5, dtype)
    for padding_idx in (-1, 3):
        table = make_table(ROWS, 5, dtype, device)
        wanted = expected(table, grad, indices, padding_idx, scale_grad_by_freq)
        grad_add(table, grad, indices, padding_idx, scale_grad_by_freq)
        assert_close(table, wanted)


@pytest.mark.parametrize("width", [1, 3, 8, 50, 64, 130])
@pytest.mark.parametrize("count", [0, 1, 40, 3000])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_meets_float32_unrounded(
    device: str, dtype: torch.dtype, count: int, width: int
) -> None:
    indices = make_indices((count,), ROWS, device=device)
    indices[: count // 2] = 4
    grad = make_grad(indices, width, dtype)
    table = make_table(ROWS, width, torch.float32, device)
    wanted = expected(table, grad, indices, 2)
    for _ in range(2):
        before = table.clone()
        grad_add(table, grad, indices, 2)
        assert_close(table, expected(before, grad, indices, 2))
        assert_same_bits(table[2], before[2])
    assert count == 0 or not torch.equal(table, wanted)


@pytest.mark.parametrize("count", [1023, 1024, 1025, 2048, 2049])
def test_a_row_of_whole_chunks_is_added_once(device: str, count: int) -> None:
    """Whole numbers, whose sums are exact."""
    indices = torch.full((count,), 4, device=device)
    indices[5] = 7
    grad = torch.arange(3 * count, dtype=torch.float64, device=device).view(count, 3)
    for some in (indices, torch.cat([indices, indices[6:7]])):  # one of 4 less, and as many
        more = torch.cat([grad, grad[: len(some) - count]])
        table = torch.ones(ROWS, 3, dtype=torch.float64, device=device)
        wanted = expected(table, more, some)
        grad_add(table, more, some)
        assert torch.equal(table, wanted)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_rows_of_a_wider_table(device: str, dtype: torch.dtype) -> None:
    """What lies beside the columns, and every row that is not named, keeps its bits."""
    indices = make_indices((6, 5), ROWS - 3, device=device)
    grad = make_grad(indices, 16, dtype)
    for start in (0, 1, 4):
        wide = make_table(ROWS, 21, dtype, device)
        before = wide.clone()
        grad_add(wide[:, start : start + 16], grad, indices)
        wanted = expected(before[:, start : start + 16], grad, indices)
        assert_close(wide[:, start : start + 16], wanted)
        assert_same_bits(wide[:, :start], before[:, :start])
        assert_same_bits(wide[:, start + 16 :], before[:, start + 16 :])
        assert_same_bits(wide[ROWS - 3 :], before[ROWS - 3 :])


@pytest.mark.parametrize(
    "layout",
    [
        lambda grad: grad.transpose(0, 1).contiguous().transpose(0, 1),
        lambda grad: grad.flip(-1).flip(-1),
        lambda grad: torch.cat([grad, grad], -1)[..., ::2],
        lambda grad: grad[:1].expand_as(grad),
    ],
    ids=["transposed", "flipped", "every other", "expanded"],
)
def test_layouts_of_the_gradient(device: str, layout: Callable[[Tensor], Tensor]) -> None:
    indices = make_indices((4, 9), ROWS, device=device)
    grad = layout(make_grad(indices, 6))
    table = make_table(ROWS, 6, device=device)
    wanted = expected(table, grad, indices)
    grad_add(table, grad, indices)
    assert_close(table, wanted)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("width", [0, 1, 4])
def test_edges(device: str, shape: tuple[int, ...], width: int) -> None:
    indices = make_indices(shape, ROWS, device=device)
    grad = make_grad(indices, width)
    table = make_table(ROWS, width, device=device)
    wanted = expected(table, grad, indices)
    grad_add(table, grad, indices)
    assert_close(table, wanted)


def test_the_version_is_raised(device: str) -> None:
    table = make_table(ROWS, 4, device=device)
    saved = make_table(ROWS, 4, device=device).requires_grad_()
    product = (saved * table).sum()
    indices = make_indices((5,), ROWS, device=device)
    grad_add(table, make_grad(indices, 4), indices)
    assert table._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("recorded", ["grad_output", "grad_weight"])
def test_it_has_no_derivative(device: str, recorded: str) -> None:
    indices = make_indices((5,), ROWS, device=device)
    grad, table = make_grad(indices, 4), make_table(ROWS, 4, device=device)
    wanted = expected(table, grad, indices)
    (grad if recorded == "grad_output" else table).requires_grad_()
    before = table.detach().clone()
    with pytest.raises(RuntimeError, match="no derivative|leaf Variable"):
        grad_add(table, grad, indices)
    assert torch.equal(table.detach(), before)
    with torch.no_grad():
        grad_add(table, grad, indices)
    assert_close(table.detach(), wanted)


def test_bad_indices_write_nothing() -> None:
    indices = torch.tensor([1, 2, ROWS])
    table = make_table(ROWS, 4)
    before = table.clone()
    with pytest.raises(IndexError, match=r"embedding_grad_add_: index out of range.*11 rows"):
        grad_add(table, make_grad(indices, 4), indices)
    assert torch.equal(table, before)


def column_major(table: Tensor) -> Tensor:
    return table.t().contiguous().t()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.double(), "grad_output's dtype, .*Float.*but got .*Double"),
        (lambda table: table.bfloat16(), "grad_output's dtype, .*Float.*but got .*BFloat16"),
        (lambda table: table[:, :3], "as many columns in grad_weight as in grad_output, 4, .*3"),
        (lambda table: table.repeat(1, 2), "as many columns in grad_weight .*, 4, but got 8"),
        (lambda table: table[0], "'grad_weight' must be 2-D, but it is 1-D"),
        (column_major, r"side by side, but its strides are \[1, 11\]"),
        (lambda table: table[:1].expand(ROWS, 4), r"location of their own.*strides are \[0, 1\]"),
        (lambda table: table.as_strided((5, 4), (2, 1)), r"not overlap, .*strides are \[2, 1\]"),
    ],
    ids=[
        "dtype",
        "lower dtype",
        "fewer columns",
        "more columns",
        "rank",
        "column-major",
        "expanded",
        "overlapping",
    ],
)
def test_tables_that_are_turned_down(
    device: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    table = change(make_table(ROWS, 4, device=device))
    before = table.clone()
    indices = make_indices((5,), ROWS, device=device)
    with pytest.raises(RuntimeError, match=f"(?s)embedding_grad_add_: .*{message}"):
        grad_add(table, make_grad(indices, 4), indices)
    assert torch.equal(table, before)


def test_a_gradient_that_lies_in_the_table(device: str) -> None:
    whole = make_table(ROWS, 8, device=device)
    before = whole.clone()
    indices = make_indices((5,), ROWS, device=device)
    for table in (whole[:, :4].contiguous(), whole[:, :4]):
        with pytest.raises(RuntimeError, match="embedding_grad_add_: .*share no memory with grad_"):
            grad_add(table, table[:5], indices)
    assert torch.equal(whole, before)


def test_indices_that_lie_in_the_table(device: str) -> None:
    table = make_table(ROWS, 4, device=device)
    indices = table.view(torch.int32).view(-1)[:5]
    with pytest.raises(RuntimeError, match="embedding_grad_add_: .*share no memory with indices"):
        grad_add(table, make_grad(indices, 4), indices)


def test_neighbours_in_one_flat_buffer(device: str) -> None:
    flat = make_table(2 * ROWS, 4, device=device)
    table, grad = flat[:ROWS], flat[ROWS : ROWS + 5]
    indices = make_indices((5,), ROWS, device=device)
    wanted = expected(table, grad, indices)
    grad_add(table, grad, indices)
    assert_close(table, wanted)


def test_tangents_are_refused() -> None:
    indices = make_indices((5,), ROWS)
    table, grad = make_table(ROWS, 4), make_grad(indices, 4)
    with torch.autograd.forward_ad.dual_level():
        moving_table = torch.autograd.forward_ad.make_dual(table, torch.ones(ROWS, 4))
        moving_grad = torch.autograd.forward_ad.make_dual(grad, torch.ones(5, 4))
        for arguments in ((table, moving_grad), (moving_table, grad)):
            with pytest.raises(RuntimeError, match="embedding_grad_add_: has no derivative"):
                grad_add(*arguments, indices)


def test_vmap(device: str) -> None:
    """A loop over the tables of a batch; a gradient that all share is not added to in a batch."""

    def added(table: Tensor, grad: Tensor, indices: Tensor) -> Tensor:
        grad_add(table, grad, indices)
        return table

    indices = make_indices((3, 5), ROWS, device=device)
    grads = make_grad(indices, 4)
    tables = torch.stack([make_table(ROWS, 4, device=device, seed=seed) for seed in range(3)])
    wanted = [expected(*case) for case in zip(tables, grads, indices, strict=True)]
    assert_close(torch.func.vmap(added)(tables, grads, indices), torch.stack(wanted))
    with pytest.raises(RuntimeError, match="embedding_grad_add_: vmap cannot"):
        torch.func.vmap(added, in_dims=(None, 0, 0))(tables[0], grads, indices)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device: str, dynamic: bool) -> None:
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def step(table: Tensor, grad: Tensor, indices: Tensor) -> Tensor:
        grad_add(table, grad * 2, indices)
        return table.sum()

    for count in (5, 7):
        indices = make_indices((count,), ROWS, device=device)
        grad, table = make_grad(indices, 4), make_table(ROWS, 4, device=device)
        wanted = expected(table, grad * 2, indices)
        total = step(table, grad, indices)
        assert_close(table, wanted)
        assert_close(total, wanted.sum())
