"""functional.embedding against torch.nn.functional.embedding: calls, options, shapes, errors."""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from embed_ext.functional import embedding
from tests.common import (
    INDEX_DTYPES,
    LAYOUTS,
    OPTIONS,
    assert_close,
    expand_scalar,
    generator,
    make_indices,
    make_table,
)

FUNCTIONS = (embedding, F.embedding)
TORCH_INDEX_DTYPES = (torch.int64, torch.int32)


def value_and_grad(
    function: Any, indices: Tensor, table: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Output and gradient of a table [V, D] for a fixed gradient of the output."""
    weight = table.detach().requires_grad_()
    out = function(indices, weight, **options)
    grad_output = torch.randn(out.shape, generator=generator(), dtype=torch.float64).to(out)
    (grad,) = torch.autograd.grad(out, weight, grad_output)
    return out.detach(), grad


def assert_same(indices: Tensor, table: Tensor, **options: Any) -> None:
    ours = value_and_grad(embedding, indices, table.clone(), **options)
    if indices.dtype not in TORCH_INDEX_DTYPES:
        indices = indices.long()
    theirs = value_and_grad(F.embedding, indices, table.clone(), **options)
    for actual, expected in zip(ours, theirs, strict=True):
        assert_close(actual, expected)


# Ways to call it.


def test_signature_is_the_same_before_the_keywords() -> None:
    def shape(function: Any) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY]

    assert shape(embedding) == shape(F.embedding)
    hints = typing.get_type_hints(embedding)
    assert hints.pop("coalesced") is bool
    assert hints == typing.get_type_hints(F.embedding)


def test_arguments_by_position_and_by_name(device: str) -> None:
    indices = make_indices((4,), 5, device=device)
    by_position = [
        function(indices, make_table(5, 3, device=device), -1, 1.0, 1.0, True, False)
        for function in FUNCTIONS
    ]
    by_name = embedding(
        sparse=False,
        scale_grad_by_freq=True,
        norm_type=1.0,
        max_norm=1.0,
        padding_idx=-1,
        weight=make_table(5, 3, device=device),
        input=indices,
    )
    assert_close(by_position[0], by_position[1])
    assert torch.equal(by_name, by_position[0])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(options: dict[str, Any], device: str) -> None:
    assert_same(make_indices((3, 5), 6, device=device), make_table(6, 4, device=device), **options)


@pytest.mark.parametrize("which", ["input", "weight"])
def test_torch_function_override_gets_the_call(which: str) -> None:
    calls = []

    class Recorder(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls.append((func, len(args), kwargs))
            return "overridden"

    arguments = {"input": torch.tensor([1]), "weight": torch.zeros(3, 2)}
    arguments[which] = arguments[which].as_subclass(Recorder)
    options = dict(
        padding_idx=1,
        max_norm=2.0,
        norm_type=3.0,
        scale_grad_by_freq=True,
        sparse=True,
        coalesced=True,
    )
    assert embedding(arguments["input"], arguments["weight"], **options) == "overridden"
    if which == "weight":  # its class may know torch's lookup, which has no such option
        del options["coalesced"]
    handed = F.embedding if which == "weight" else embedding
    assert calls == [(handed, 2, options)]


# padding_idx.


@pytest.mark.parametrize("padding_idx", [None, 0, 1, 4, -1, -5])
@pytest.mark.parametrize("sparse", [False, True])
def test_padding_row_gets_no_gradient(padding_idx: int | None, sparse: bool, device: str) -> None:
    indices = torch.tensor([[0, 1, 4], [4, 0, 0]], device=device)
    assert_same(indices, make_table(5, 3, device=device), padding_idx=padding_idx, sparse=sparse)


def test_padding_row_is_returned_as_it_is(device: str) -> None:
    table = make_table(5, 3, device=device)
    assert table[2].all()
    indices = torch.tensor([2, 1, 2], device=device)
    assert torch.equal(embedding(indices, table, padding_idx=2), table[indices])


@pytest.mark.parametrize("padding_idx", [np.int64(1), torch.tensor(1)], ids=["numpy", "tensor"])
def test_padding_idx_may_be_any_integer_object(padding_idx: Any) -> None:
    assert_same(torch.tensor([1, 2]), make_table(5, 3), padding_idx=padding_idx)


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("padding_idx", [5, -6, 100, 2**40, -(2**70)])
def test_padding_idx_out_of_range_is_refused(padding_idx: int, max_norm: float | None) -> None:
    table = 100 * make_table(5, 3)
    before = table.clone()
    for function in FUNCTIONS:
        with pytest.raises(AssertionError, match="Padding_idx must be within num_embeddings"):
            function(torch.tensor([1]), table, padding_idx=padding_idx, max_norm=max_norm)
        assert torch.equal(table, before)


@pytest.mark.parametrize("padding_idx", ["1", 1.0, [1], torch.tensor(1.0)], ids=repr)
def test_padding_idx_of_another_type_is_refused(padding_idx: Any) -> None:
    for function in FUNCTIONS:
        with pytest.raises(TypeError):
            function(torch.tensor([1]), make_table(5, 3), padding_idx=padding_idx)


def test_padding_idx_of_an_empty_table_may_be_zero() -> None:
    indices = torch.empty((2, 0), dtype=torch.int64)
    for function in FUNCTIONS:
        assert function(indices, torch.empty(0, 3), padding_idx=0).shape == (2, 0, 3)
        with pytest.raises(AssertionError, match="Padding_idx must be within"):
            function(indices, torch.empty(0, 3), padding_idx=1)


# Shapes, strides, index dtypes.


@pytest.mark.parametrize("width", [0, 1, 3])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (0, 5), (5, 0), (2, 3, 4), (1, 2, 1, 2)])
def test_shapes(shape: tuple[int, ...], width: int, device: str) -> None:
    indices = make_indices(shape, 6, device=device)
    table = make_table(6, width, device=device)
    assert embedding(indices, table).shape == (*shape, width)
    assert_same(indices, table)


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_index_dtypes(dtype: torch.dtype, device: str) -> None:
    indices = make_indices((40,), 600, dtype, device)
    table = make_table(600, 3, device=device)
    assert_same(indices, table, padding_idx=int(indices[3]))
    assert_same(indices, table, scale_grad_by_freq=True)
    assert_same(indices, table, max_norm=0.5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strided_tables(layout: Any, device: str) -> None:
    table = layout(make_table(7, 4, device=device))
    indices = make_indices((3, 5), 7, device=device)
    out, grad = value_and_grad(embedding, indices, table)
    expected_out, expected_grad = value_and_grad(F.embedding, indices, table)
    assert torch.equal(out, expected_out)
    assert_close(grad, expected_grad)


def test_expanded_table(device: str) -> None:
    table = expand_scalar(make_table(7, 4, device=device))
    indices = make_indices((3, 5), 7, device=device)
    assert torch.equal(embedding(indices, table), F.embedding(indices, table))


def test_strided_indices(device: str) -> None:
    base = make_indices((6, 4), 7, device=device)
    table = make_table(7, 3, device=device)
    for indices in (base.t(), base[::2, 1::2], base[:, :1].expand(6, 5), base[0, 0].expand(3, 3)):
        assert not indices.is_contiguous()
        assert_same(indices, table)
        assert_same(indices, table, max_norm=0.5)


# Errors.


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("value", [None, [1, 2], 3, "weight"], ids=repr)
def test_what_is_not_a_tensor_is_named(value: Any, max_norm: float | None) -> None:
    kind = type(value).__name__
    with pytest.raises(TypeError, match=f"'input'.* must be Tensor, not {kind}"):
        embedding(value, make_table(5, 3), max_norm=max_norm)
    with pytest.raises(TypeError, match=f"'weight'.* must be Tensor, not {kind}"):
        embedding(torch.tensor([1]), value, max_norm=max_norm)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"max_norm": 1.0}], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_weight_that_is_not_2d_is_refused(
    shape: tuple[int, ...], options: dict[str, Any], device: str
) -> None:
    with pytest.raises(RuntimeError, match=f"'weight' must be 2-D.*{len(shape)}-D"):
        embedding(torch.tensor([0], device=device), torch.zeros(shape, device=device), **options)


@pytest.mark.parametrize("shape", [(2,), (0,), ()])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex64, torch.uint64],
    ids=str,
)
def test_other_index_dtypes_are_refused(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    indices = torch.zeros(shape, dtype=dtype)
    for max_norm in (None, 1.0):
        with pytest.raises(RuntimeError) as caught:
            embedding(indices, make_table(5, 3), max_norm=max_norm)
        for accepted in INDEX_DTYPES:
            assert str(accepted).removeprefix("torch.") in str(caught.value)


@pytest.mark.parametrize(("weight_on", "indices_on"), [("cpu", "meta"), ("meta", "cpu")])
def test_tensors_on_two_devices_are_refused(weight_on: str, indices_on: str) -> None:
    weight = torch.zeros(5, 3, device=weight_on)
    indices = torch.zeros(2, dtype=torch.int64, device=indices_on)
    message = f"weight is on {weight_on} and indices is on {indices_on}"
    for max_norm in (None, 1.0):
        with pytest.raises(RuntimeError, match=message):
            embedding(indices, weight, max_norm=max_norm)


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**63)])
def test_bad_index_is_named_and_nothing_is_written(bad: int, max_norm: float | None) -> None:
    table = make_table(5, 3)
    before = table.clone()
    indices = torch.tensor([[0, 1], [4, bad]])
    message = re.escape(f"index out of range: indices[1, 1] is {bad}, but weight has 5 rows")
    with pytest.raises(IndexError, match=message):
        embedding(indices, table, max_norm=max_norm)
    assert torch.equal(table, before)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_lookup_in_an_empty_table_is_refused(max_norm: float | None) -> None:
    with pytest.raises(IndexError, match="index out of range: indices.*0 rows"):
        embedding(torch.tensor([0]), torch.empty(0, 3), max_norm=max_norm)
