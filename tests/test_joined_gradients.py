"""Several uses of a table in one graph add to one gradient, which is the one of nn.Embedding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import embed_ext
from tests.backward_ways import WAYS
from tests.common import LAYOUTS, TOLERANCES, make_indices
from tests.joined_gradients import (
    PROGRAMS,
    ROWS,
    WIDTH,
    Uses,
    assert_same,
    gradient,
    gradients_made,
    integers,
    make_tables,
)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_equals_torch(program: str, way: str, keep: bool) -> None:
    ours, theirs = (
        WAYS[way](table, lambda table=table: PROGRAMS[program](Uses(table)))
        for table in make_tables(keep)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("program", PROGRAMS)
def test_differentiated_twice(program: str, keep: bool) -> None:
    grads = []
    for table in make_tables(keep):
        loss = PROGRAMS[program](Uses(table)).square() / 1000
        (grad,) = torch.autograd.grad(loss, table.weight, create_graph=True)
        (grad.square().mean() + PROGRAMS[program](Uses(table))).backward()
        grads.append(gradient(table))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


MIXTURES = [
    ("module", "sibling"),
    ("functional", "module", "stock"),
    ("Function", "module"),
    ("sibling", "Function", "stock", "module", "functional"),
    ("stock", "module", "module"),
    ("module", "sparse"),
    ("sparse", "module", "stock sparse", "functional"),
]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("way", ["backward", "steps", "autograd.grad", "retained", "inputs"])
@pytest.mark.parametrize("program", ["4 lookups", "7 lookups", "tied before", "tied between"])
@pytest.mark.parametrize("spellings", MIXTURES, ids="-".join)
def test_mixed_with_other_lookups(
    spellings: tuple[str, ...], program: str, way: str, keep: bool
) -> None:
    ours, theirs = make_tables(keep)
    actual = WAYS[way](ours, lambda: PROGRAMS[program](Uses(ours, spellings)))
    # As many seeds are used up as above.
    expected = WAYS[way](
        theirs, lambda: PROGRAMS[program](Uses(theirs, ["module"] * len(spellings)))
    )
    assert_same(actual.to_dense(), expected)


@pytest.mark.parametrize("options", [{"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
@pytest.mark.parametrize("spellings", [("module",), ("functional", "module", "Function")])
def test_options(spellings: tuple[str, ...], options: dict[str, object]) -> None:
    for keep in (False, True):
        ours, theirs = make_tables(keep, **options)
        for table, spelled in ((ours, spellings), (theirs, ["module"] * len(spellings))):
            for program in ("7 lookups", "tied between"):
                PROGRAMS[program](Uses(table, spelled)).backward()
        torch.testing.assert_close(gradient(ours), gradient(theirs), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("way", ["backward", "retained", "autograd.grad"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype: torch.dtype, way: str, keep: bool) -> None:
    # In bfloat16 and float16 sums of integers are exact as long as they are small.
    programs = ["2 lookups", "7 lookups", "elementwise"]
    programs += [] if dtype.itemsize == 2 else ["tied before", "tied between", "summed"]
    for program in programs:
        ours, theirs = (
            WAYS[way](table, lambda table=table, run=PROGRAMS[program]: run(Uses(table)))
            for table in make_tables(keep, dtype)
        )
        assert ours.dtype == dtype
        assert_same(ours.to(theirs.dtype), theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_any_strides(layout: str) -> None:
    grads: list[Tensor] = []
    lookups = (embed_ext.functional.embedding, torch.nn.functional.embedding)
    for lookup in lookups:
        weight = LAYOUTS[layout](integers(ROWS, WIDTH)).detach().requires_grad_()
        out = torch.stack([lookup(make_indices((9,), ROWS, seed=s), weight) for s in range(3)])
        (out * integers(*out.shape) @ weight.t()).sum().backward()
        grads.append(weight.grad)
    assert grads[0].stride() == grads[1].stride()
    assert_same(*grads)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, None])
def test_gradients_of_another_dtype_than_the_weight(grad_dtype: torch.dtype | None) -> None:
    for keep in (False, True):
        grads = []
        for table in make_tables(keep, torch.float32):
            table.float().weight.grad_dtype = grad_dtype
            for _ in range(2):
                PROGRAMS["tied before"](Uses(table)).backward()
            grads.append(gradient(table))
        assert_same(*grads)


# Where torch's engine keeps its sums is found out from its headers. A torch that moved them still
# gets the right gradients, one for each use: these tests alone tell.


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("rows", [ROWS, 40_000])  # in malloc's memory, and in recycled memory
@pytest.mark.parametrize("lookups", [1, 2, 4, 7])
def test_canary_lookups_make_one_gradient(lookups: int, rows: int, keep: bool) -> None:
    table = embed_ext.Embedding(rows, WIDTH, keep_grad_buffer=keep)
    loss = Uses(table).weighed_lookups(lookups)
    assert gradients_made(table, loss.backward) == 1


@pytest.mark.parametrize("keep", [False, True])
def test_canary_a_lookup_adds_to_an_output_layers_gradient(keep: bool) -> None:
    ours, _ = make_tables(keep)
    assert gradients_made(ours, PROGRAMS["tied around"](Uses(ours)).backward) == 1


def test_canary_an_output_layer_between_lookups_makes_one_more() -> None:
    ours, _ = make_tables()
    assert gradients_made(ours, PROGRAMS["tied between"](Uses(ours)).backward) == 2


def test_canary_uses_of_a_table_with_a_gradient_make_one_more() -> None:
    ours, _ = make_tables()
    ours.weight.grad = there = integers(ROWS, WIDTH)
    assert gradients_made(ours, PROGRAMS["one lookup"](Uses(ours)).backward) == 0
    assert gradients_made(ours, PROGRAMS["4 lookups"](Uses(ours)).backward) == 1
    assert gradient(ours) is there


def test_canary_autograd_grad_makes_one_gradient() -> None:
    ours, _ = make_tables()
    loss = PROGRAMS["4 lookups"](Uses(ours))
    assert gradients_made(ours, lambda: torch.autograd.grad(loss, ours.weight)) == 1
