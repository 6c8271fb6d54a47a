"""torch.compile: one graph, no breaks, and the eager results of nn.Embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch.func import grad, vmap
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import embed_ext
from tests.common import INDEX_DTYPES, assert_close, make_indices, make_table
from tests.composability.lookups import (
    OPTIONS,
    Lookup,
    function,
    functional,
    gradient,
    make_pair,
    stock,
)

NUM_ROWS, WIDTH = 23, 6
MODULE_OPTIONS: dict[str, dict[str, Any]] = {
    **OPTIONS,
    "negative_padding": {"padding_idx": -1},
    "max_norm": {"max_norm": 0.5},
    "max_norm_of_another_p": {"max_norm": 0.5, "norm_type": 1.0},
    "sparse": {"sparse": True},
    "sparse_padding": {"sparse": True, "padding_idx": 1},
    "sparse_max_norm": {"sparse": True, "max_norm": 0.5},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No test sees the graphs, the guards or the marked dimensions of the one before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any, backend: Any = "aot_eager", dynamic: bool | None = None) -> Any:
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def assert_same_gradient(actual: Tensor, expected: Tensor) -> None:
    """Compare two gradients [V, D]; entries of a sparse one count in their order."""
    assert actual.layout == expected.layout
    if actual.is_sparse:
        assert actual._nnz() == expected._nnz()
        assert torch.equal(actual._indices(), expected._indices())
    assert_close(actual.to_dense(), expected.to_dense())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", MODULE_OPTIONS.values(), ids=MODULE_OPTIONS)
def test_module(options: dict[str, Any], dynamic: bool) -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, **options)
    run = compiled(ours, dynamic=dynamic)
    for shape in ((4, 9), (5, 11)):
        indices = make_indices(shape, NUM_ROWS)
        expected, actual = theirs(indices), run(indices)
        assert_close(actual, expected)
        assert_close(ours.weight, theirs.weight)  # max_norm has changed both
        expected.square().sum().backward()
        actual.square().sum().backward()
        assert_same_gradient(gradient(ours), gradient(theirs))


@pytest.mark.parametrize("lookup", [functional, function])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_spelling(options: dict[str, Any], lookup: Lookup) -> None:
    weight, indices = make_table(NUM_ROWS, WIDTH).requires_grad_(), make_indices((9,), NUM_ROWS)
    gradients = [
        torch.autograd.grad(each(weight, indices, **options).square().sum(), weight)[0]
        for each in (stock, compiled(lookup))
    ]
    assert_close(gradients[1], gradients[0])


def test_functional_resolves_a_negative_padding_row() -> None:
    weight, indices = make_table(NUM_ROWS, WIDTH).requires_grad_(), torch.tensor([1, 22, 22, 3])
    run = compiled(lambda w, i: embed_ext.functional.embedding(i, w, padding_idx=-1))
    gradients = [
        torch.autograd.grad(out.square().sum(), weight)[0]
        for out in (stock(weight, indices, padding_idx=-1), run(weight, indices))
    ]
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_index_dtype(dtype: torch.dtype) -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, padding_idx=2)
    indices = make_indices((3, 8), NUM_ROWS, dtype)
    expected, actual = theirs(indices.long()), compiled(ours)(indices)
    assert_close(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert_close(gradient(ours), gradient(theirs))


def test_one_graph_serves_every_batch_size() -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, padding_idx=2)
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(ours, counter, dynamic=True)
    for batch in (7, 12, 9, 31, 64):
        indices = make_indices((batch, 10), NUM_ROWS)
        theirs(indices).square().sum().backward()
        run(indices).square().sum().backward()
    assert counter.frame_count == 1
    assert_close(gradient(ours), gradient(theirs))


def test_graph_holds_the_op_whole() -> None:
    counter = CompileCounterWithBackend("eager")
    compiled(make_pair(NUM_ROWS, WIDTH)[1], counter)(make_indices((4,), NUM_ROWS))
    calls = [n.target for n in counter.graphs[0].graph.nodes if n.op == "call_function"]
    assert calls == [torch.ops.embed_ext.embedding]


@pytest.mark.parametrize("lookup", [functional, function])
def test_vmap_of_grad(lookup: Lookup) -> None:
    def per_sample(each: Lookup) -> Any:
        loss = grad(lambda w, i: each(w, i, padding_idx=1).pow(3).sum())
        return vmap(loss, in_dims=(None, 0))

    weight, indices = make_table(NUM_ROWS, WIDTH), make_indices((4, 9), NUM_ROWS)
    expected = per_sample(stock)(weight, indices)
    assert expected.abs().sum() > 0
    assert_close(compiled(per_sample(lookup))(weight, indices), expected)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard: Any) -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH)
    indices = make_indices((4, 5), NUM_ROWS)
    with guard():
        actual = compiled(ours)(indices)
    assert not actual.requires_grad
    assert torch.equal(actual, theirs(indices))


def test_bad_index_raises() -> None:
    run = compiled(make_pair(NUM_ROWS, WIDTH)[1])
    run(make_indices((4,), NUM_ROWS))
    with pytest.raises(IndexError, match="index out of range"):
        run(torch.tensor([0, 1, NUM_ROWS, 2]))


def test_checkpoint_inside_the_graph() -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH)
    indices = make_indices((4, 5), NUM_ROWS)

    def step(table: nn.Embedding) -> Tensor:
        out: Tensor = checkpoint(lambda i: table(i).sin(), indices, use_reentrant=False)
        return out.square().sum()

    step(theirs).backward()
    compiled(step)(ours).backward()
    assert_close(gradient(ours), gradient(theirs))


def test_wrapper_subclass_as_table() -> None:
    indices = make_indices((9,), NUM_ROWS)
    gradients = []
    for each in (stock, compiled(functional)):
        halves = make_table(NUM_ROWS, WIDTH), make_table(NUM_ROWS, WIDTH, seed=3)
        weight = TwoTensor(*halves).requires_grad_()  # type: ignore[no-untyped-call]
        gradients += torch.autograd.grad(each(weight, indices).square().sum(), weight)
    assert type(gradients[1]) is TwoTensor
    assert_close(gradients[1].a, gradients[0].a)
    assert_close(gradients[1].b, gradients[0].b)


def test_jagged_indices() -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH)
    sentences = [make_indices((n,), NUM_ROWS, seed=n) for n in (4, 1, 6)]
    jagged = torch.nested.nested_tensor(sentences, layout=torch.jagged)
    expected, actual = theirs(jagged).values(), compiled(ours)(jagged).values()
    assert_close(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert_close(gradient(ours), gradient(theirs))


@pytest.fixture(scope="module")
def empty_cache() -> Iterator[None]:
    """Nothing that an earlier build of the extension compiled to is used."""
    with fresh_cache():
        yield


@pytest.mark.slow
def test_inductor(empty_cache: None) -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, padding_idx=-1, max_norm=0.9)

    def loss(table: nn.Embedding, indices: Tensor) -> Tensor:
        return table(indices).square().sum()  # type: ignore[no-any-return]

    run = compiled(loss, "inductor")  # static at first, dynamic from the second shape on
    for shape, dtype in (((4, 9), torch.int32), ((5, 11), torch.uint8)):
        indices = make_indices(shape, NUM_ROWS, dtype)
        expected, actual = loss(theirs, indices.long()), run(ours, indices)
        assert_close(actual, expected)
        expected.backward()
        actual.backward()
        assert_close(gradient(ours), gradient(theirs))


@pytest.mark.slow
def test_inductor_with_sparse_gradient(empty_cache: None) -> None:
    theirs, ours = make_pair(NUM_ROWS, WIDTH, sparse=True)
    indices = make_indices((4, 9), NUM_ROWS)
    theirs(indices).square().sum().backward()
    compiled(lambda i: ours(i).square().sum(), "inductor")(indices).backward()
    assert_same_gradient(gradient(ours), gradient(theirs))


@pytest.mark.slow
def test_inductor_with_transposed_table(empty_cache: None) -> None:
    indices = make_indices((4, 9), NUM_ROWS)
    weight = make_table(WIDTH, NUM_ROWS).t().requires_grad_()
    results = [
        torch.autograd.grad(each(weight, indices).square().sum(), weight)[0]
        for each in (stock, compiled(functional, "inductor"))
    ]
    assert_close(results[1], results[0])
