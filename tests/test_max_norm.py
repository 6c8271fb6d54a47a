"""max_norm shrinks, in place, the rows that are looked up, exactly as torch does."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from embed_ext.functional import embedding
from tests.common import REAL_DTYPES, assert_close, make_indices, make_table

FUNCTIONS = (embedding, F.embedding)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 0.0, 0.5, 3.0, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [*REAL_DTYPES, torch.complex64, torch.complex128], ids=str)
def test_table_and_output_equal_torch(dtype: torch.dtype, norm_type: float, device: str) -> None:
    indices = make_indices((4, 5), 12, device=device)
    tables = [3 * make_table(12, 6, dtype, device) for _ in FUNCTIONS]
    outputs = [
        function(indices, table, max_norm=1.0, norm_type=norm_type)
        for function, table in zip(FUNCTIONS, tables, strict=True)
    ]
    assert_close(tables[0], tables[1])
    assert_close(outputs[0], outputs[1])
    assert torch.equal(outputs[0], tables[0][indices])


def test_only_long_rows_that_are_looked_up_change(device: str) -> None:
    table = torch.full((6, 4), 2.0, device=device)
    table[3] = 0.1
    before = table.clone()
    embedding(torch.tensor([[1, 3], [4, 1]], device=device), table, max_norm=1.0)
    changed = (table != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [1, 4]


def test_scale_is_max_norm_by_norm_plus_epsilon(device: str) -> None:
    table = torch.tensor([[3.0, 4.0]], dtype=torch.float64, device=device)
    embedding(torch.tensor([0, 0], device=device), table, max_norm=1.0)
    scale = 1.0 / (5.0 + 1e-7)
    assert table.tolist() == [[3.0 * scale, 4.0 * scale]]


def test_row_at_the_limit_is_left_alone(device: str) -> None:
    table = torch.tensor([[3.0, 4.0]], device=device)
    embedding(torch.tensor([0], device=device), table, max_norm=5.0)
    assert table.tolist() == [[3.0, 4.0]]


def test_padding_row_is_shrunk_like_any_other() -> None:
    tables = [torch.full((3, 4), 2.0) for _ in FUNCTIONS]
    for function, table in zip(FUNCTIONS, tables, strict=True):
        function(torch.tensor([1]), table, padding_idx=1, max_norm=1.0)
    assert_close(tables[0], tables[1])
    assert tables[0][1].norm() < 1.01


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
@pytest.mark.parametrize("shape", [(3,), (0,)])
def test_version_counter_is_raised_as_in_torch(shape: tuple[int, ...], max_norm: float) -> None:
    indices = make_indices(shape, 5)
    tables = [make_table(5, 3) for _ in FUNCTIONS]
    for function, table in zip(FUNCTIONS, tables, strict=True):
        version = table._version
        function(indices, table, max_norm=max_norm)
        assert table._version == version + 1


@pytest.mark.parametrize("requires_grad", [False, True])
def test_leaf_is_changed_whether_frozen_or_not(requires_grad: bool, device: str) -> None:
    weight = torch.full((3, 4), 2.0, device=device).requires_grad_(requires_grad)
    out = embedding(torch.tensor([1], device=device), weight, max_norm=1.0)
    assert out.requires_grad == requires_grad and weight.is_leaf
    assert_close(weight.detach().norm(dim=1), torch.tensor([4.0, 1.0, 4.0], device=device))


def test_gradient_is_that_of_the_lookup_alone(device: str) -> None:
    indices = make_indices((9,), 5, device=device)
    grads = []
    for function in FUNCTIONS:
        weight = make_table(5, 3, device=device).requires_grad_()
        function(indices, weight, max_norm=0.5).square().sum().backward()
        assert weight.grad is not None
        grads.append(weight.grad)
    assert_close(grads[0], grads[1])


def test_table_that_backward_needs_is_not_changed_unnoticed() -> None:
    for function in FUNCTIONS:
        weight = make_table(5, 3).requires_grad_()
        saved = weight.square()
        looked_up = function(torch.tensor([1]), weight, max_norm=0.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (saved.sum() + looked_up.sum()).backward()


def test_shrinking_a_computed_table_shrinks_it_in_place() -> None:
    results = []
    for function in FUNCTIONS:
        weight = make_table(5, 3).requires_grad_()
        computed = 4 * weight
        out = function(torch.tensor([1, 1, 2]), computed, max_norm=0.5)
        out.square().sum().backward()
        assert weight.grad is not None
        results.append((computed.detach(), out.detach(), weight.grad))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_table_without_norms_is_refused(dtype: torch.dtype) -> None:
    for function in FUNCTIONS:
        with pytest.raises(RuntimeError, match="floating (point )?or complex"):
            function(torch.tensor([1]), make_table(5, 3, dtype), max_norm=1.0)


def test_strided_table_is_changed_in_place(device: str) -> None:
    base = 5 * make_table(4, 10, device=device)
    before = base.clone()
    table = base.t()[::2]  # [5, 4]
    expected = table.clone()
    indices = torch.tensor([0, 3], device=device)
    embedding(indices, table, max_norm=1.0)
    F.embedding(indices, expected, max_norm=1.0)
    assert_close(table.contiguous(), expected)
    assert torch.equal(base.t()[1::2], before.t()[1::2])
