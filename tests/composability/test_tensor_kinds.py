"""Tensors that are fake, meta, overridden, wrapped or nested, and modes over plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

import embed_ext
from tests.common import INDEX_DTYPES, OpLog, assert_close, make_indices, make_table
from tests.composability.lookups import (
    LOOKUPS,
    OPTIONS,
    Lookup,
    functional,
    gradient,
    make_pair,
    module,
    stock,
)

NUM_ROWS, WIDTH = 7, 3
each_lookup = pytest.mark.parametrize("lookup", LOOKUPS)


def facts(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


# Without data.


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3)])
def test_fake_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    results = []
    with FakeTensorMode():
        for table, index_dtype in zip(make_pair(), (torch.int64, dtype), strict=True):
            out = table(torch.zeros(shape, dtype=index_dtype))
            out.sum().backward()
            assert isinstance(out, FakeTensor)
            results.append((facts(out), facts(gradient(table))))
    assert results[1] == results[0]


def test_fake_tensors_with_symbolic_sizes() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        weight = mode.from_tensor(make_table(NUM_ROWS, WIDTH).requires_grad_(), static_shapes=False)
        indices = mode.from_tensor(make_indices((4, 9), NUM_ROWS), static_shapes=False)
        out = embed_ext.functional.embedding(indices, weight)
        out.sum().backward()
    assert out.shape == (*indices.shape, weight.shape[1])
    assert weight.grad is not None and weight.grad.shape == weight.shape
    assert not mode.shape_env.guards  # type: ignore[union-attr]


@pytest.mark.parametrize("sparse", [False, True])
def test_meta_tensors(sparse: bool) -> None:
    results = []
    for table in make_pair(device="meta", sparse=sparse):
        out = table(torch.zeros((2, 4), dtype=torch.int64, device="meta"))
        out.sum().backward()
        grad = gradient(table)
        results.append((facts(out), grad.shape, grad.layout, grad.dtype, grad.device))
    assert results[1] == results[0]


def test_meta_module_becomes_real() -> None:
    tables = []
    for kind in (torch.nn.Embedding, embed_ext.Embedding):
        table = kind(NUM_ROWS, WIDTH, padding_idx=2, device="meta").to_empty(device="cpu")
        torch.manual_seed(0)
        table.reset_parameters()
        tables.append(table)
    indices = make_indices((4,), NUM_ROWS)
    assert torch.equal(tables[1].weight, tables[0].weight)
    assert torch.equal(tables[1](indices), tables[0](indices))


@pytest.mark.parametrize("mix", ["table", "indices"])
def test_meta_beside_real_is_refused(mix: str) -> None:
    weight, indices = make_table(NUM_ROWS, WIDTH), make_indices((4,), NUM_ROWS)
    weight = weight.to("meta") if mix == "table" else weight
    indices = indices.to("meta") if mix == "indices" else indices
    with pytest.raises(RuntimeError, match="(?s)same device.*cpu|same device.*meta"):
        embed_ext.functional.embedding(indices, weight)


# Modes that watch; test_overrides.py has the classes that do.


class FunctionLog(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_function_mode_sees_the_functional(max_norm: float | None) -> None:
    theirs, ours = make_pair(max_norm=max_norm)
    indices = make_indices((4,), NUM_ROWS)
    with FunctionLog() as log:
        actual = ours(indices)
    assert log.calls.count(embed_ext.functional.embedding) == 1
    assert_close(actual, theirs(indices))


@pytest.mark.parametrize("sparse", [False, True])
def test_dispatch_mode_sees_the_ops_that_torch_runs(sparse: bool) -> None:
    logs = []
    for table in make_pair(max_norm=0.5, sparse=sparse):
        with OpLog() as log:
            table(make_indices((4,), NUM_ROWS)).sum().backward()
        logs.append([call.split(".")[1] for call in log.calls if "embedding" in call])
    assert logs[1][:2] == ["embedding_renorm_", "embedding"] == logs[0][:2]
    assert logs[1][2:] == [f"embedding_{'sparse' if sparse else 'dense'}_backward"]


# Wrappers.


@each_lookup
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("wrapped", ["table", "indices", "both"])
def test_two_tensor(wrapped: str, options: dict[str, Any], lookup: Lookup) -> None:
    indices: Tensor = make_indices((4, 2), NUM_ROWS)
    if wrapped != "table":
        indices = TwoTensor(indices, indices.flip(0))  # type: ignore[no-untyped-call]
    results = []
    for function in (stock, lookup):
        weight: Tensor = make_table(NUM_ROWS, WIDTH)
        if wrapped != "indices":
            weight = TwoTensor(weight, weight.cos())  # type: ignore[no-untyped-call]
        weight.requires_grad_()
        out = function(weight, indices, **options)
        out.pow(3).sum().backward()
        results.append((out, weight.grad))
    for expected, actual in zip(*results, strict=True):
        assert type(actual) is type(expected) is TwoTensor
        assert_close(actual.a, expected.a)
        assert_close(actual.b, expected.b)


def test_two_tensor_with_max_norm() -> None:
    tables = []
    for function in (stock, functional):
        halves = make_table(NUM_ROWS, WIDTH), make_table(NUM_ROWS, WIDTH, seed=4)
        weight = TwoTensor(*halves)  # type: ignore[no-untyped-call]
        function(weight, make_indices((4,), NUM_ROWS), max_norm=0.5)
        tables.append(weight)
    assert_close(tables[1].a, tables[0].a)
    assert_close(tables[1].b, tables[0].b)


# Jagged nested indices.


def jagged_indices(dtype: torch.dtype = torch.int64) -> Tensor:
    sentences = [make_indices((n,), NUM_ROWS, dtype, seed=n) for n in (2, 5, 1)]
    return torch.nested.nested_tensor(sentences, layout=torch.jagged)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_jagged(options: dict[str, Any]) -> None:
    theirs, ours = make_pair(**options)
    jagged = jagged_indices()
    expected, actual = theirs(jagged), ours(jagged)
    assert actual.layout == torch.jagged and actual.shape == expected.shape
    assert_close(actual.values(), expected.values())
    (expected * expected).values().sum().backward()
    (actual * actual).values().sum().backward()
    assert_close(gradient(ours), gradient(theirs))


def test_jagged_with_sparse_gradient() -> None:
    theirs, ours = make_pair(sparse=True, padding_idx=1)  # torch: only for plain indices
    jagged = jagged_indices()
    theirs(jagged.values()).pow(3).sum().backward()
    (ours(jagged).values()).pow(3).sum().backward()
    assert torch.equal(gradient(ours)._indices(), gradient(theirs)._indices())
    assert_close(gradient(ours), gradient(theirs))


def test_jagged_int32() -> None:
    theirs, ours = make_pair()
    jagged = jagged_indices(torch.int32)
    assert_close(ours(jagged).values(), theirs(jagged).values())


def test_a_nested_table_is_refused() -> None:
    rows = [torch.randn(2, 3), torch.randn(4, 3)]
    table = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(RuntimeError, match="expected a dense weight, but it is a nested tensor"):
        torch.ops.embed_ext.embedding(table, torch.tensor([1]))


def test_nested_strided_indices_are_refused() -> None:
    """PyTorch's earlier nested layout, a prototype that it no longer develops, has no kernel."""
    _, ours = make_pair()
    nested = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3, 1, 1])])
    with pytest.raises(NotImplementedError, match="embed_ext::embedding"):
        ours(nested)


# Functionalization.


@pytest.mark.parametrize("lookup", [functional, module])
def test_functionalize(lookup: Lookup) -> None:
    weight, indices = make_table(NUM_ROWS, WIDTH), make_indices((4,), NUM_ROWS)
    assert_close(functionalize(lookup)(weight, indices), stock(weight, indices))


@pytest.mark.parametrize("lookup", [functional, module])
def test_functionalize_refuses_max_norm(lookup: Callable[..., Tensor]) -> None:
    """torch.func.functionalize takes no custom op that writes in place; torch.compile does."""
    table, indices = make_table(NUM_ROWS, WIDTH), make_indices((4,), NUM_ROWS)
    before = table.clone()
    with pytest.raises(RuntimeError, match="custom"):
        functionalize(lambda w: lookup(w, indices, max_norm=0.5))(table)
    assert_close(table, before)
