"""Random calls of the module and of the function, compared with torch's own.

A case is drawn from every dtype, index dtype, layout, shape and option; torch gets the same call
with int64 indices. Either both raise the same type of exception, or values, gradient, strides and
the table afterwards agree: bit for bit where both compute in the same order, else within the
dtype's tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import embed_ext
from tests.common import (
    FROZEN_DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    TOLERANCES,
    expand_scalar,
    make_indices,
    make_table,
)

SHAPES = ((), (0,), (0, 5), (3, 0), (1,), (4,), (3, 4), (2, 1, 3), (60,))
INDEX_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda indices: indices,
    "transposed": lambda indices: indices.t() if indices.dim() == 2 else indices,
    "expanded": lambda indices: indices.expand(2, *indices.shape),
    "sliced": lambda indices: torch.stack([indices, indices], -1)[..., 0],
}


@dataclass
class Case:
    """One call."""

    weight: Tensor  # [V, D]
    indices: Tensor  # [...]
    options: dict[str, Any]
    dense_grad: bool  # of grad_output; else expanded from one number
    trains: bool

    def __repr__(self) -> str:
        weight, indices = self.weight, self.indices
        return (
            f"Case(weight {tuple(weight.shape)} {weight.dtype} strides {weight.stride()}, indices "
            f"{indices.dtype} {indices.tolist()}, {self.options}, trains={self.trains})"
        )


@dataclass
class Outcome:
    """What a call did: raised, or returned and left behind."""

    error: type[Exception] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    grad_strides: tuple[int, ...] | None = None


@st.composite
def make_options(draw: st.DrawFn, num_rows: int, width: int, trains: bool) -> dict[str, Any]:
    """Keyword arguments that both functions take; some paddings are no row of the table.

    Left out is what torch refuses and embed_ext does: scaled sparse gradients, sparse gradients
    of 0-D indices with padding, maximum norms of rows without columns; and sparse gradients of
    such rows, whose entries torch leaves out.
    """
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["padding_idx"] = draw(st.integers(-num_rows - 1, num_rows))
    if trains and width > 0 and draw(st.integers(0, 3)) == 0:
        options["max_norm"] = draw(st.sampled_from([0.0, 0.5, 2.0, 100.0]))
        options["norm_type"] = draw(st.sampled_from([1.0, 2.0, 3.0, float("inf")]))
    which = draw(st.sampled_from(["dense", "dense", "scale_grad_by_freq", "sparse"]))
    if which == "scale_grad_by_freq" or (which == "sparse" and width > 0):
        options[which] = True
    return options


@st.composite
def make_cases(draw: st.DrawFn) -> Case:
    """About one case in ten has a bad index; empty tables make all but empty calls bad."""
    num_rows = draw(st.sampled_from([1, 2, 7, 40, 300, 0]))
    width = draw(st.sampled_from([3, 1, 8, 33, 0]))
    dtype = draw(st.sampled_from(REAL_DTYPES * 4 + FROZEN_DTYPES))
    trains = dtype.is_floating_point and dtype.itemsize > 1
    layout = draw(st.sampled_from([*LAYOUTS.values()] * 2 + [expand_scalar]))
    options = draw(make_options(num_rows, width, trains))
    if num_rows == 0 or width == 0 or "max_norm" in options:
        layout = LAYOUTS["contiguous"]  # the others need elements, and a table that can be written
    seed = draw(st.integers(0, 1000))
    index_dtype = draw(st.sampled_from(INDEX_DTYPES))
    shape = draw(st.sampled_from(SHAPES[1:] if "sparse" in options else SHAPES))
    indices = make_indices(shape, max(num_rows, 1), index_dtype, seed=seed)
    if indices.numel() > 0 and draw(st.integers(0, 9)) == 0:
        bad = draw(st.sampled_from([num_rows, -1, num_rows + 5]))
        values = indices.long()
        values.view(-1)[-1] = bad
        if torch.iinfo(index_dtype).min <= bad <= torch.iinfo(index_dtype).max:
            indices = values.to(index_dtype)
    view = INDEX_VIEWS[draw(st.sampled_from([*INDEX_VIEWS]))]
    weight = layout(make_table(num_rows, width, dtype, seed=seed))
    return Case(weight, view(indices), options, draw(st.booleans()), trains)


def copy_of(weight: Tensor) -> Tensor:
    """The same values and strides [V, D] in memory of its own."""
    storage = weight.untyped_storage().clone()
    empty = torch.empty(0, dtype=weight.dtype)
    return empty.set_(storage, weight.storage_offset(), weight.shape, weight.stride())


def run(call: Callable[..., Tensor], case: Case, indices: Tensor) -> Outcome:
    """call(weight, indices, options) -> out, then its backward."""
    weight = copy_of(case.weight).requires_grad_(case.trains)
    try:
        out = call(weight, indices, case.options)
        outcome = Outcome(tensors={"out": out.detach(), "weight": weight.detach()})
        if case.trains:
            grad = make_table(1, out.numel(), torch.float64, seed=3).to(out.dtype).view(out.shape)
            expanded = torch.full((), 0.5, dtype=out.dtype).expand_as(out)
            out.backward(grad if case.dense_grad else expanded)
            assert weight.grad is not None
            outcome.grad_strides = None if weight.grad.is_sparse else weight.grad.stride()
            outcome.tensors["grad"] = weight.grad
            if weight.grad.is_sparse:
                outcome.tensors |= {
                    "grad": weight.grad._values(),
                    "rows": weight.grad._indices(),
                }
        return outcome
    except AssertionError as error:  # a padding that is no row: nothing may have been renormed
        return Outcome(error=type(error), tensors={"weight": weight.detach()})
    except Exception as error:
        return Outcome(error=type(error))


def through_function(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with the arguments in run's order."""
    return lambda weight, indices, options: function(indices, weight, **options)


def through_module(kind: type[nn.Embedding]) -> Callable[..., Tensor]:
    """A module around the table."""

    def call(weight: Tensor, indices: Tensor, options: dict[str, Any]) -> Tensor:
        frozen = not weight.requires_grad
        module = kind(*weight.shape, **options, _weight=weight, _freeze=frozen)
        if not frozen:
            # nn.Parameter is another leaf: the gradient is to arrive at `weight`.
            del module.weight
            module.weight = weight  # type: ignore[assignment]
        return module(indices)

    return call


PAIRS = {
    "function": (through_function(embed_ext.functional.embedding), through_function(F.embedding)),
    "module": (through_module(embed_ext.Embedding), through_module(nn.Embedding)),
}


def tolerance(name: str, case: Case) -> tuple[float, float]:
    """What rounding may differ by: nothing, except where torch computes in another way."""
    narrow = case.weight.dtype in (torch.bfloat16, torch.float16)
    summed_elsewise = name == "grad" and (narrow or "scale_grad_by_freq" in case.options)
    if summed_elsewise and narrow and not case.options.get("sparse"):
        # torch adds, and rounds, in the narrow dtype: an error for each of up to 120 tokens.
        return 0.1, 0.1 * case.indices.numel() ** 0.5
    if summed_elsewise or "max_norm" in case.options:
        return TOLERANCES[case.weight.dtype]
    return 0, 0


@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(case=make_cases())
def test_as_torch(pair: str, case: Case) -> None:
    ours, theirs = PAIRS[pair]
    actual = run(ours, case, case.indices)
    expected = run(theirs, case, case.indices.long())
    if expected.error is RuntimeError and case.weight.numel() == 0:
        # Into a table without rows or columns torch reports a bad index by another name.
        assert actual.error is IndexError
        return
    assert actual.error == expected.error
    assert actual.tensors.keys() == expected.tensors.keys()
    assert actual.grad_strides == expected.grad_strides
    for name, tensor in actual.tensors.items():
        rtol, atol = tolerance(name, case)
        wanted = expected.tensors[name]
        torch.testing.assert_close(tensor, wanted, rtol=rtol, atol=atol, equal_nan=True, msg=name)
