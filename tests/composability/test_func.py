"""torch.func transforms: each agrees with the same transform of F.embedding, or with a loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

import embed_ext
from tests.common import assert_close, make_indices, make_table
from tests.composability.lookups import (
    LOOKUPS,
    OPTIONS,
    Lookup,
    function,
    functional,
    make_pair,
    module,
    stock,
)

NUM_ROWS, WIDTH, BATCH = 5, 3, 4
PADDING_ROW = OPTIONS["padding"]["padding_idx"]
each_lookup = pytest.mark.parametrize("lookup", LOOKUPS)
# A Function's backward runs under the vmap of its forward, an op's does not.
of_the_op = pytest.mark.parametrize("lookup", [functional, module])
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)

# One per-sample call takes weight [V, D] and indices [2, 3]. A batch dimension goes in where
# in_dims says.
IN_DIMS = [(None, 0), (0, None), (0, 0), (1, 0), (2, 2), (None, 1), (-1, None)]


def cube(out: Tensor) -> Tensor:
    """A loss [...] -> [] with a second derivative that depends on the input."""
    return out.pow(3).sum()


def tables() -> Tensor:
    return make_table(BATCH * NUM_ROWS, WIDTH, torch.float64).view(BATCH, NUM_ROWS, WIDTH)


def batches() -> Tensor:
    indices = make_indices((BATCH, 2, 3), NUM_ROWS)
    indices[:, 1, 0] = PADDING_ROW  # of each sample, also of one that all tables share
    return indices


def placed(stacked: Tensor, dim: int | None) -> Tensor:
    """The stack [B, ...] with its batch at `dim`, or only its first entry."""
    return stacked[0] if dim is None else stacked.movedim(0, dim).contiguous()


def in_a_loop(
    sample: Callable[[Tensor, Tensor], Any], dims: tuple[int | None, ...], *stacks: Tensor
) -> list[Any]:
    """What vmap of `sample` has to give, one call after another."""
    return [
        sample(*(stack[0 if dim is None else b] for stack, dim in zip(stacks, dims, strict=True)))
        for b in range(BATCH)
    ]


Function = Callable[[Tensor], Tensor]
TRANSFORMS: dict[str, Callable[[Function, Tensor], Any]] = {
    "grad": lambda f, w: grad(lambda x: cube(f(x)))(w),
    "vjp": lambda f, w: vjp(f, w)[1](f(w).cos()),
    "jvp": lambda f, w: jvp(f, (w,), (w.cos(),)),
    "jacrev": lambda f, w: jacrev(f)(w),
    "jacfwd": lambda f, w: jacfwd(f)(w),
    "hessian": lambda f, w: hessian(lambda x: cube(f(x)))(w),
    "linearize": lambda f, w: linearize(f, w)[1](w.cos()),
}


@each_lookup
@each_option
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform(
    transform: Callable[[Function, Tensor], Any], options: dict[str, Any], lookup: Lookup
) -> None:
    weight, indices = tables()[0], batches()[0]
    expected = transform(lambda w: stock(w, indices, **options), weight)
    actual = transform(lambda w: lookup(w, indices, **options), weight)
    torch.testing.assert_close(actual, expected)


@each_lookup
@each_option
def test_grad_of_grad(options: dict[str, Any], lookup: Lookup) -> None:
    indices = batches()[0]

    def penalty(each: Lookup, weight: Tensor) -> Tensor:
        first = grad(lambda w: cube(each(w, indices, **options)))
        return grad(lambda w: cube(first(w)))(weight)  # type: ignore[no-any-return]

    assert_close(penalty(lookup, tables()[0]), penalty(stock, tables()[0]))


def vmap_cases() -> list[Any]:
    """Every spelling with every option over every choice of dimensions, but for one: over indices
    alone torch counts occurrences in the whole batch, as the next test shows."""
    return [
        pytest.param(
            dims, OPTIONS[name], lookup, id=f"{lookup.__name__}-{name}-{dims[0]}-{dims[1]}"
        )
        for lookup, dims, name in itertools.product(LOOKUPS, IN_DIMS, OPTIONS)
        if dims[0] is not None or lookup is function or "scaled" not in name
    ]


@pytest.mark.parametrize(("dims", "options", "lookup"), vmap_cases())
def test_vmap(dims: tuple[int | None, int | None], options: dict[str, Any], lookup: Lookup) -> None:
    expected_leaf, leaf = tables().requires_grad_(), tables().requires_grad_()
    samples = in_a_loop(lambda w, i: stock(w, i, **options), dims, expected_leaf, batches())
    expected = torch.stack(samples)
    inputs = placed(leaf, dims[0]), placed(batches(), dims[1])
    actual = vmap(lambda w, i: lookup(w, i, **options), in_dims=dims)(*inputs)
    assert_close(actual, expected)
    cube(expected).backward()
    cube(actual).backward()
    assert_close(leaf.grad, expected_leaf.grad)


@of_the_op
def test_vmap_over_indices_counts_the_whole_batch_as_torch_does(lookup: Lookup) -> None:
    gradients = []
    for each in (stock, lookup):
        weight = tables()[0].requires_grad_()
        out = vmap(lambda i, f=each, w=weight: f(w, i, scale_grad_by_freq=True))(batches())
        gradients += torch.autograd.grad(cube(out), weight)
    assert_close(gradients[1], gradients[0])


@each_lookup
@pytest.mark.parametrize("outer", [(None, 0), (0, None), (0, 0)])
@pytest.mark.parametrize("inner", [(None, 0), (0, None), (0, 0)])
def test_nested_vmap(
    inner: tuple[int | None, int | None], outer: tuple[int | None, int | None], lookup: Lookup
) -> None:
    weights = make_table(4 * NUM_ROWS, WIDTH).view(2, 2, NUM_ROWS, WIDTH)
    indices = make_indices((2, 2, 6), NUM_ROWS)
    dims = list(zip(inner, outer, strict=True))
    inputs = [
        stack[0 if out is None else slice(None), 0 if in_ is None else slice(None)]
        for stack, (in_, out) in zip((weights, indices), dims, strict=True)
    ]
    actual = vmap(vmap(lookup, in_dims=inner), in_dims=outer)(*inputs)
    for b in range(2):
        for c in range(2):
            weight, index = (
                stack[0 if out is None else b, 0 if in_ is None else c]
                for stack, (in_, out) in zip((weights, indices), dims, strict=True)
            )
            assert_close(actual[b, c], stock(weight, index))


@each_lookup
@each_option
@pytest.mark.parametrize("dims", [(None, 0), (0, None), (0, 0), (1, 2)])
def test_vmap_of_grad(
    dims: tuple[int | None, int | None], options: dict[str, Any], lookup: Lookup
) -> None:
    def gradient(each: Lookup) -> Callable[[Tensor, Tensor], Tensor]:
        return grad(lambda w, i: cube(each(w, i, **options)))  # type: ignore[no-any-return]

    expected = torch.stack(in_a_loop(gradient(stock), dims, tables(), batches()))
    inputs = placed(tables(), dims[0]), placed(batches(), dims[1])
    assert_close(vmap(gradient(lookup), in_dims=dims)(*inputs), expected)


@each_lookup
def test_grad_of_vmap(lookup: Lookup) -> None:
    def loss(each: Lookup, weight: Tensor) -> Tensor:
        return cube(vmap(lambda i: each(weight, i, padding_idx=1))(batches()))

    expected = grad(lambda w: loss(stock, w))(tables()[0])
    assert_close(grad(lambda w: loss(lookup, w))(tables()[0]), expected)


@each_lookup
@pytest.mark.parametrize("dims", [(0, 0), (None, 0), (0, None)])
@pytest.mark.parametrize("bad", [NUM_ROWS, 2 * NUM_ROWS - 1, -1, -NUM_ROWS, 10**12])
def test_vmap_turns_a_bad_index_down_in_every_table(
    bad: int, dims: tuple[int | None, int | None], lookup: Lookup
) -> None:
    for sample in range(1 if dims[1] is None else BATCH):
        indices = batches()
        indices[sample, 1, 2] = bad  # the row of a neighbour, were the tables one behind another
        inputs = placed(tables(), dims[0]), placed(indices, dims[1])
        with pytest.raises(IndexError, match="index out of range"):
            vmap(lookup, in_dims=dims)(*inputs)


@each_lookup
def test_vmap_of_byte_indices_reaches_past_row_255(lookup: Lookup) -> None:
    weights = make_table(3 * 200, WIDTH).view(3, 200, WIDTH)
    indices = make_indices((3, 50), 200, torch.uint8)
    expected = torch.stack([stock(w, i.long()) for w, i in zip(weights, indices, strict=True)])
    assert_close(vmap(lookup)(weights, indices), expected)


@each_lookup
def test_vmap_turns_a_byte_down_that_would_wrap(lookup: Lookup) -> None:
    weights = torch.zeros(3, 100, WIDTH)
    indices = torch.zeros(3, 50, dtype=torch.uint8)
    indices[0, 7] = 200  # and 200 behind the last table is 144, were it a byte
    with pytest.raises(IndexError, match="index out of range"):
        vmap(lookup)(weights, indices)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("width", [0, 2])
def test_vmap_of_the_dense_backward_over_gradients(width: int, dim: int) -> None:
    op = torch.ops.embed_ext.embedding_dense_backward
    grads, indices = make_table(3 * 4, width).view(3, 4, width), torch.tensor([1, 4, 1, 0])
    actual = vmap(lambda grad: op(grad, indices, 5), in_dims=dim)(grads.movedim(0, dim))
    assert_close(actual, torch.stack([op(grad, indices, 5) for grad in grads]))


@of_the_op
def test_vmap_keeps_sparse_gradients_of_one_table(lookup: Lookup) -> None:
    weight = tables()[0].requires_grad_()
    out = vmap(lambda i: lookup(weight, i, sparse=True))(batches())
    (actual,) = torch.autograd.grad(cube(out), weight)
    (expected,) = torch.autograd.grad(cube(stock(weight, batches(), sparse=True)), weight)
    assert_close(actual, expected)


@each_lookup
def test_vmap_of_a_sparse_gradient_is_refused_in_words(lookup: Lookup) -> None:
    gradient = grad(lambda i, w: cube(lookup(w, i, sparse=True)), argnums=1)
    with pytest.raises(RuntimeError, match="use sparse=False under vmap"):
        vmap(gradient, in_dims=(0, None))(batches(), tables()[0])


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (1, 1)])
def test_vmap_with_max_norm_changes_each_table(dims: tuple[int, int | None]) -> None:
    expected_tables, actual_tables = tables(), tables()
    expected = torch.stack(
        in_a_loop(lambda w, i: stock(w, i, max_norm=0.5), dims, expected_tables, batches())
    )
    inputs = actual_tables.movedim(0, dims[0]), placed(batches(), dims[1])
    actual = vmap(lambda w, i: embed_ext.functional.embedding(i, w, max_norm=0.5), in_dims=dims)(
        *inputs
    )
    assert_close(actual, expected)
    assert_close(actual_tables, expected_tables)


def test_vmap_over_indices_with_max_norm_changes_the_one_table() -> None:
    expected_table, table = tables()[0], tables()[0]
    expected = stock(expected_table, batches(), max_norm=0.5)
    actual = vmap(lambda i: embed_ext.functional.embedding(i, table, max_norm=0.5))(batches())
    assert_close(actual, expected)
    assert_close(table, expected_table)


def test_functional_call_uses_the_table_it_is_given() -> None:
    theirs, ours = make_pair(padding_idx=2)
    other = {"weight": make_table(7, 3, seed=5)}
    indices = make_indices((2, 4), 7)
    results = [
        grad(lambda p, m=m: cube(functional_call(m, p, (indices,))))(other) for m in (theirs, ours)
    ]
    assert_close(results[1]["weight"], results[0]["weight"])


def test_ensemble_of_modules() -> None:
    pairs = [make_pair() for _ in range(3)]
    indices = make_indices((3, 4), 7)
    results = []
    for models in zip(*pairs, strict=True):
        parameters, buffers = stack_module_state(list(models))
        base = type(models[0])(7, 3, device="meta")
        results.append(
            vmap(lambda p, b, i, m=base: functional_call(m, (p, b), (i,)))(
                parameters, buffers, indices
            )
        )
    assert_close(results[1], results[0])


def test_per_sample_gradients_of_a_model() -> None:
    head = nn.Linear(3, 1)
    results = []
    for table in make_pair(padding_idx=0):
        model = nn.Sequential(table, head)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(p: dict[str, Tensor], i: Tensor, model: nn.Module = model) -> Tensor:
            return functional_call(model, p, (i,)).sigmoid().sum()  # type: ignore[no-any-return]

        results.append(vmap(grad(loss), in_dims=(None, 0))(parameters, make_indices((4, 6), 7)))
    torch.testing.assert_close(results[1], results[0])
