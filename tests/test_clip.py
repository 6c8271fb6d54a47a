"""Clipping of dense and sparse gradients, next to torch's functions on the same ones made dense.

Values are multiples of 1/4, zero among them, so that sums have no rounding and cancel at times.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import utils

import embed_ext
from tests.common import GRAD_DTYPES, REAL_DTYPES, assert_close, generator

NUM_ROWS, WIDTH = 6, 3
NORM_TYPES = (2.0, 1.0, math.inf, 0.0, 0.5, 3.0, -1.0, -2.0, -math.inf)
INF = math.inf
MAX_NORMS = (1e-3, 0.25, 3.0, 1e4, INF)


def quarters(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    parts = torch.randint(-8, 9, (*shape, 2), generator=generator(seed)) / 4
    return (torch.view_as_complex(parts) if dtype.is_complex else parts[..., 0]).to(dtype)


def sparse(rows: Iterable[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A gradient [NUM_ROWS, WIDTH] with an entry for each of the rows, in that order."""
    index = torch.tensor([[*rows]], dtype=torch.int64)
    values = quarters((index.size(1), WIDTH), dtype, seed)
    return torch.sparse_coo_tensor(index, values, (NUM_ROWS, WIDTH), check_invariants=False)


def dense(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return quarters((NUM_ROWS, WIDTH), dtype, seed)


def with_grads(grads: Iterable[Tensor | None]) -> list[nn.Parameter]:
    """Parameters whose gradients are copies of these."""
    parameters = []
    for grad in grads:
        like = torch.zeros(2) if grad is None else grad
        parameter = nn.Parameter(torch.zeros(like.shape, dtype=like.dtype, device=like.device))
        parameter.grad = None if grad is None else grad.clone()
        parameters.append(parameter)
    return parameters


def made_dense(grads: Iterable[Tensor | None]) -> list[nn.Parameter]:
    """The same with dense gradients."""
    return with_grads([grad if grad is None else grad.to_dense() for grad in grads])


def outcome(call: Callable[[], Tensor | None]) -> Tensor | None | tuple[type, str]:
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def assert_same_call(
    ours: Callable[..., Any], theirs: Callable[..., Any], grads: list[Tensor | None], *options: Any
) -> None:
    """Call both with parameters of these gradients; compare what they return, raise and leave."""
    parameters, expected_parameters = with_grads(grads), made_dense(grads)
    actual = outcome(lambda: ours(parameters, *options))
    expected = outcome(lambda: theirs(expected_parameters, *options))
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), actual
        assert_close(actual, expected)
    else:
        assert actual == expected
    for parameter, other in zip(parameters, expected_parameters, strict=True):
        if other.grad is not None and parameter.grad.is_sparse:
            assert parameter.grad.is_coalesced()
            assert_close(parameter.grad.to_dense(), other.grad)
        elif other.grad is not None:
            assert_close(parameter.grad, other.grad)
        else:
            assert parameter.grad is None


@st.composite
def make_grads(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = GRAD_DTYPES
) -> list[Tensor | None]:
    """Up to four gradients of up to two dtypes."""
    of_case = draw(st.lists(st.sampled_from(dtypes), min_size=1, max_size=2))
    grads: list[Tensor | None] = []
    for seed in draw(st.lists(st.integers(0, 1000), max_size=4)):
        dtype = draw(st.sampled_from(of_case))
        kind = draw(st.sampled_from(["sparse", "sparse", "every row", "coalesced", "dense", "no"]))
        rows = draw(st.lists(st.integers(0, NUM_ROWS - 1), max_size=12))
        if kind == "no":
            grads.append(None)
        elif kind == "dense":
            grads.append(dense(dtype, seed))
        else:
            grad = sparse([*range(NUM_ROWS), *rows] if kind == "every row" else rows, dtype, seed)
            grads.append(grad.coalesce() if kind == "coalesced" else grad)
    return grads


foreachs = st.sampled_from([None, True, False])


# Against torch's functions.


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_", "get_total_norm"])
def test_signature_is_torchs(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(of, name)) for of in (embed_ext, utils))
    assert [*ours.parameters] == [*theirs.parameters]
    for parameter, other in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert (parameter.default, parameter.kind) == (other.default, other.kind)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(make_grads(), st.sampled_from(MAX_NORMS), st.sampled_from(NORM_TYPES), foreachs)
def test_norm(
    grads: list[Tensor | None], max_norm: float, norm_type: float, foreach: bool | None
) -> None:
    options = max_norm, norm_type, False, foreach
    assert_same_call(embed_ext.clip_grad_norm_, utils.clip_grad_norm_, grads, *options)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(make_grads(REAL_DTYPES), st.sampled_from([0.0, 0.25, 1.0, 100.0, INF]), foreachs)
def test_value(grads: list[Tensor | None], clip_value: float, foreach: bool | None) -> None:
    options = clip_value, foreach
    assert_same_call(embed_ext.clip_grad_value_, utils.clip_grad_value_, grads, *options)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(make_grads(), st.sampled_from(NORM_TYPES), foreachs)
def test_total_norm_changes_nothing(
    drawn: list[Tensor | None], norm_type: float, foreach: bool | None
) -> None:
    grads = [grad for grad in drawn if grad is not None]
    before = [(grad.clone(), grad.is_coalesced()) for grad in grads if grad.is_sparse]
    actual = embed_ext.get_total_norm(iter(grads), norm_type, foreach=foreach)
    expected = utils.get_total_norm([grad.to_dense() for grad in grads], norm_type, foreach=foreach)
    assert_close(actual, expected)
    after = [grad for grad in grads if grad.is_sparse]
    for grad, (other, is_coalesced) in zip(after, before, strict=True):
        assert grad.is_coalesced() == is_coalesced
        assert torch.equal(grad._values(), other._values())


@pytest.mark.parametrize("rows", [[], [4], [1, 3, 1], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0, 0]])
def test_norm_of_one_gradient(rows: list[int], device: str) -> None:
    """Zeros of rows without an entry are the least elements, and the largest where none has one."""
    grad = sparse(rows, torch.float64).to(device)
    grad._values().abs_().add_(0.125)  # no zero, nor a sum that is
    for norm_type in (*NORM_TYPES, "inf", "-inf"):
        options = 1.0, norm_type
        assert_same_call(embed_ext.clip_grad_norm_, utils.clip_grad_norm_, [grad], *options)
    has_zeros = len({*rows}) < NUM_ROWS
    for norm_type in (-1.0, -INF):
        assert (embed_ext.get_total_norm(grad, norm_type).item() == 0) == has_zeros


def test_zeros_that_are_stored_count_as_zeros() -> None:
    grad = sparse(range(NUM_ROWS))
    grad._values().fill_(2)
    grad._values()[2, 1] = 0
    for norm_type in NORM_TYPES:
        assert_close(
            embed_ext.get_total_norm(grad, norm_type),
            utils.get_total_norm(grad.to_dense(), norm_type),
        )


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
@pytest.mark.parametrize("foreach", [True, False])
def test_tables_without_elements(shape: tuple[int, int], foreach: bool) -> None:
    """They have no infinity norm: torch's error, word for word."""
    index = torch.tensor([[1, 1]] if shape[0] else [[]], dtype=torch.int64)
    values = torch.empty(index.size(1), shape[1])
    grad = torch.sparse_coo_tensor(index, values, shape, check_invariants=False)
    for norm_type in NORM_TYPES:
        options = 1.0, norm_type, False, foreach
        assert_same_call(embed_ext.clip_grad_norm_, utils.clip_grad_norm_, [grad], *options)


@pytest.mark.parametrize("norm_type", [2.0, INF, -1.0])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_norm_that_is_not_finite(bad: float, norm_type: float) -> None:
    """torch's dense gradients get NaN in every row, sparse ones in those that have an entry."""
    grads = [sparse([1, 3, 1]), dense()]
    grads[0]._values()[1, 2] = bad
    parameters, expected = with_grads(grads), made_dense(grads)
    norm = embed_ext.clip_grad_norm_(parameters, 1.0, norm_type)
    expected_norm = utils.clip_grad_norm_(expected, 1.0, norm_type)
    torch.testing.assert_close(norm, expected_norm, equal_nan=True)
    rows = parameters[0].grad.indices()[0]
    for actual, wanted in (
        (parameters[0].grad.values(), expected[0].grad[rows]),
        (parameters[1].grad, expected[1].grad),
    ):
        torch.testing.assert_close(actual, wanted, equal_nan=True)


# Arguments, and what is raised.


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_error_if_nonfinite(bad: float) -> None:
    """Nothing is scaled then."""
    grads = [sparse([1, 3, 1]), dense()]
    grads[0]._values()[1, 2] = bad
    parameters = with_grads(grads)
    message = outcome(lambda: utils.clip_grad_norm_(made_dense(grads), 0.1, 2.0, True))
    assert isinstance(message, tuple) and "is non-finite" in message[1]
    for call in (
        lambda: embed_ext.clip_grad_norm_(parameters, 0.1, 2.0, True),
        lambda: embed_ext.get_total_norm(grads, 2.0, error_if_nonfinite=True),
    ):
        assert outcome(call) == message
    assert torch.equal(parameters[1].grad, grads[1])
    torch.testing.assert_close(
        parameters[0].grad.to_dense(), grads[0].to_dense(), rtol=0, atol=0, equal_nan=True
    )


def test_one_tensor_and_generators() -> None:
    grads = [sparse([1, 3, 1]), dense()]
    expected = with_grads(grads)
    embed_ext.clip_grad_norm_(expected[0], 0.5)
    embed_ext.clip_grad_value_(expected[1], 0.5)
    parameters = with_grads(grads)
    embed_ext.clip_grad_norm_((p for p in parameters if p.grad.is_sparse), 0.5)
    embed_ext.clip_grad_value_((p for p in parameters if not p.grad.is_sparse), 0.5)
    for parameter, other in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad.to_dense(), other.grad.to_dense())
    assert parameters[1].grad.abs().max() == 0.5 > parameters[0].grad.to_dense().norm() - 1e-5
    assert embed_ext.get_total_norm(sparse([1])) == embed_ext.get_total_norm([sparse([1])])


@pytest.mark.parametrize("grads", [[], [None], [None, None]])
def test_without_gradients(grads: list[None]) -> None:
    assert_same_call(embed_ext.clip_grad_norm_, utils.clip_grad_norm_, grads, 1.0)
    assert_same_call(embed_ext.clip_grad_value_, utils.clip_grad_value_, grads, 1.0)
    assert embed_ext.get_total_norm([]).item() == 0


def test_an_empty_generator_is_warned_of() -> None:
    seen = []
    for function in (embed_ext.clip_grad_norm_, utils.clip_grad_norm_):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert function((p for p in ()), 1.0) == 0
        seen.append([(str(warning.message), warning.filename) for warning in caught])
    assert seen[0] == seen[1]
    assert seen[0][0][1] == __file__


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_foreach_where_there_is_none(name: str, is_sparse: bool) -> None:
    dense_grads = [torch.ones(4, 3, device="meta")]
    (parameter,) = with_grads(dense_grads)
    if is_sparse:
        index = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        parameter.grad = torch.sparse_coo_tensor(
            index, torch.ones(2, 3, device="meta"), (4, 3), check_invariants=False
        )
    expected = outcome(lambda: getattr(utils, name)(made_dense(dense_grads), 1.0, foreach=True))
    assert isinstance(expected, tuple) and "can't use the foreach API" in expected[1]
    assert outcome(lambda: getattr(embed_ext, name)(parameter, 1.0, foreach=True)) == expected


@pytest.mark.parametrize("clip_value", [-1.0, math.nan])
def test_values_that_would_move_the_zeros(clip_value: float) -> None:
    """torch takes them, and so do we where nothing is sparse."""
    (parameter,) = with_grads([sparse([1, 3, 1])])
    before = parameter.grad
    with pytest.raises(ValueError, match=f"clip_value >= 0 for sparse .* got {clip_value}$"):
        embed_ext.clip_grad_value_(parameter, clip_value)
    assert parameter.grad is before and not before.is_coalesced()
    actual, expected = with_grads([dense()]), with_grads([dense()])
    embed_ext.clip_grad_value_(actual, clip_value)
    utils.clip_grad_value_(expected, clip_value)
    torch.testing.assert_close(actual[0].grad, expected[0].grad, equal_nan=True)


def test_complex_values_have_no_order() -> None:
    grads = [sparse([1, 3, 1], torch.complex64)]
    assert_same_call(embed_ext.clip_grad_value_, utils.clip_grad_value_, grads, 1.0)


def test_a_parameter_that_is_named_twice() -> None:
    """It counts twice and is scaled twice, as torch's is."""
    (ours,), (theirs,) = with_grads([sparse([1, 3, 1])]), made_dense([sparse([1, 3, 1])])
    assert_close(
        embed_ext.clip_grad_norm_([ours, ours], 0.5), utils.clip_grad_norm_([theirs, theirs], 0.5)
    )
    assert_close(ours.grad.to_dense(), theirs.grad)
