"""Tables and indices of classes that override torch functions: what these are handed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

import embed_ext
from tests.common import assert_close, make_indices, make_table
from tests.composability.lookups import Lookup, functional, make_pair, module, stock

NUM_ROWS, WIDTH = 7, 3
STOCK = F.embedding
OURS = embed_ext.functional.embedding
each_lookup = pytest.mark.parametrize("lookup", [functional, module])
each_routing = pytest.mark.parametrize("routed", [False, True])


class Watching(Tensor):
    """Notes what it is handed, and with what, and passes it on."""

    calls: list[tuple[Any, tuple[type, ...], dict[str, Any]]] = []

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        cls.calls.append((func, tuple(type(arg) for arg in args[:2]), dict(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs or {})


class Knowing(Tensor):
    """A table that has torch's lookup done in a way of its own, and turns down ours."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is OURS:
            raise RuntimeError("cannot handle function embedding")
        out: Any = super().__torch_function__(func, types, args, kwargs or {})
        return out * 2 if func is STOCK else out


class Inheriting(Tensor):
    """Overrides nothing."""


def plain(tensor: Tensor) -> Tensor:
    """The tensor without its class, which would have itself back."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


# Who is handed which function.


@each_lookup
def test_table_is_handed_torchs_function(lookup: Lookup) -> None:
    weight, indices = make_table(NUM_ROWS, WIDTH), make_indices((4,), NUM_ROWS)
    options = {"padding_idx": 1, "scale_grad_by_freq": True, "sparse": True}
    Watching.calls.clear()
    stock(weight.as_subclass(Watching), indices, **options)
    (expected,) = [call for call in Watching.calls if call[0] is STOCK]
    Watching.calls.clear()
    out = lookup(weight.as_subclass(Watching), indices, **options)
    assert [call for call in Watching.calls if call[0] in (STOCK, OURS)] == [expected]
    assert type(out) is Watching and torch.equal(plain(out), weight[indices])


def test_indices_are_handed_ours() -> None:
    weight, indices = make_table(NUM_ROWS, WIDTH), make_indices((4,), NUM_ROWS, torch.int16)
    Watching.calls.clear()
    out = OURS(indices.as_subclass(Watching), weight, padding_idx=1, sparse=True)
    func, seen, kwargs = Watching.calls[0]
    assert func is OURS and seen == (Watching, Tensor)
    assert kwargs["padding_idx"] == 1 and kwargs["sparse"] is True
    assert torch.equal(plain(out), weight[indices.long()])  # torch's lookup takes no int16


def test_module_over_a_watching_table() -> None:
    theirs, ours = make_pair(padding_idx=1, scale_grad_by_freq=True)
    ours.weight = nn.Parameter(ours.weight.detach().as_subclass(Watching))
    indices = make_indices((4,), NUM_ROWS)
    expected, actual = theirs(indices), ours(indices)
    assert torch.equal(plain(actual), expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert_close(plain(ours.weight.grad), theirs.weight.grad)


@each_routing
@each_lookup
@pytest.mark.parametrize("which", ["table", "indices", "both"])
def test_class_that_overrides_nothing_gets_our_lookup(
    which: str, lookup: Lookup, routed: bool
) -> None:
    weight, indices = make_table(NUM_ROWS, WIDTH), make_indices((4,), NUM_ROWS, torch.int16)
    expected = weight[indices.long()]
    if which != "indices":
        weight = weight.as_subclass(Inheriting)
    if which != "table":
        indices = indices.as_subclass(Inheriting)
    with embed_ext.routed(routed):
        out = lookup(weight, indices)
    assert type(out) is Inheriting and torch.equal(plain(out), expected)


# Tables that know torch's lookup.


@each_routing
@each_lookup
@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"max_norm": 0.5}], ids=str)
def test_table_that_knows_torchs_lookup(
    options: dict[str, Any], lookup: Lookup, routed: bool
) -> None:
    indices = make_indices((4, 2), NUM_ROWS)
    expected = stock(make_table(NUM_ROWS, WIDTH), indices, **options) * 2
    with embed_ext.routed(routed):
        out = lookup(make_table(NUM_ROWS, WIDTH).as_subclass(Knowing), indices, **options)
    assert type(out) is Knowing and torch.equal(plain(out), expected)


def test_converted_module_over_such_a_table() -> None:
    table = nn.Embedding(NUM_ROWS, WIDTH)
    embed_ext.convert(table)
    table.weight = nn.Parameter(table.weight.detach().as_subclass(Knowing))
    indices = make_indices((4,), NUM_ROWS)
    assert torch.equal(plain(table(indices)), plain(table.weight.detach())[indices] * 2)


class PassingOn(TorchFunctionMode):
    """A mode that does nothing, as torch.set_default_device's for a lookup."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        return func(*args, **(kwargs or {}))


@each_lookup
def test_under_a_mode(lookup: Lookup) -> None:
    weight, indices = make_table(NUM_ROWS, WIDTH), make_indices((4,), NUM_ROWS)
    with PassingOn():
        out = lookup(weight.as_subclass(Knowing), indices)
        ours = lookup(weight, indices.to(torch.int16))
    assert torch.equal(plain(out), weight[indices] * 2)
    assert torch.equal(ours, weight[indices])


@pytest.mark.parametrize("kind", [Knowing, Inheriting])
def test_compiled(kind: type) -> None:
    torch.compiler.reset()
    weight, indices = make_table(NUM_ROWS, WIDTH).as_subclass(kind), make_indices((4,), NUM_ROWS)
    # Beside PyTorch's, compiled as well: torch 2.11 asks a class that it has traced once more.
    expected = torch.compile(F.embedding, backend="eager", fullgraph=True)(indices, weight)
    actual = torch.compile(functional, backend="eager", fullgraph=True)(weight, indices)
    assert type(actual) is kind and torch.equal(plain(actual), plain(expected))


class KnowingWrapper(TwoTensor):
    """Two tables in one, with rules for torch's op and none for ours, as torchao's classes have."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is torch.ops.embed_ext.embedding.default:
            raise NotImplementedError(func)
        return super().__torch_dispatch__(func, types, args, kwargs)

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> Any:
        return KnowingWrapper(inner["a"], inner["b"])  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("compiled", [False, True])
def test_wrapper_that_knows_torchs_op(compiled: bool) -> None:
    torch.compiler.reset()
    halves = make_table(NUM_ROWS, WIDTH), make_table(NUM_ROWS, WIDTH, seed=3)
    weight: Any = KnowingWrapper(*halves)  # type: ignore[no-untyped-call]
    indices = make_indices((4,), NUM_ROWS)
    lookup = torch.compile(functional, backend="eager", fullgraph=True) if compiled else functional
    out: Any = lookup(weight, indices)
    assert torch.equal(out.a, halves[0][indices]) and torch.equal(out.b, halves[1][indices])


# torch's gradients of each sample (ExpandedWeight), whose handler calls F.embedding by name.


@each_routing
@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"max_norm": 0.5}], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_of_each_sample(reduction: str, options: dict[str, Any], routed: bool) -> None:
    theirs: Any
    ours: Any
    theirs, ours = make_pair(NUM_ROWS, WIDTH, **options)
    indices = make_indices((4, 3), NUM_ROWS)
    for table in (theirs, ours):
        with embed_ext.routed(routed) if table is ours else nullcontext():
            call = call_for_per_sample_grads(table, loss_reduction=reduction)
            out = call(indices)
        out.pow(2).sum().backward()
    assert_close(ours.weight.grad_sample, theirs.weight.grad_sample)
    assert ours.weight.grad_sample.shape == (4, NUM_ROWS, WIDTH)
    assert ours.weight.grad is None
