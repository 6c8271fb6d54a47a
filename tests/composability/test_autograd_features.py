"""What autograd offers around an op: checkpoints, versions, double use, grad modes, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import embed_ext
from tests.common import assert_close, make_indices, make_table
from tests.composability.lookups import LOOKUPS, OPTIONS, Lookup, gradient, make_pair, stock

NUM_ROWS, WIDTH = 7, 3
each_lookup = pytest.mark.parametrize("lookup", LOOKUPS)


def some_indices() -> Tensor:
    return make_indices((4, 3), NUM_ROWS)


def leaf() -> Tensor:
    return make_table(NUM_ROWS, WIDTH).requires_grad_()


# What is saved, and what may change.


@each_lookup
def test_indices_changed_before_backward_raise(lookup: Lookup) -> None:
    indices = some_indices()
    out = lookup(leaf(), indices)
    indices.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_lookup
def test_table_changed_before_backward_is_legal(lookup: Lookup) -> None:
    weight = leaf()
    out = lookup(weight, some_indices())
    with torch.no_grad():
        weight.mul_(2)
    (actual,) = torch.autograd.grad(out.sum(), weight)
    assert_close(actual, torch.autograd.grad(stock(weight, some_indices()).sum(), weight)[0])


@each_lookup
def test_second_backward_needs_a_retained_graph(lookup: Lookup) -> None:
    weight = leaf()
    out = lookup(weight, some_indices()).sum()
    out.backward(retain_graph=True)
    first = weight.grad
    assert first is not None
    first = first.clone()
    out.backward()
    assert_close(weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_checkpoint(options: dict[str, Any], use_reentrant: bool) -> None:
    results = []
    for table in make_pair(**options):
        scale = torch.ones(WIDTH, requires_grad=True)  # reentrant asks for one input with a grad

        def segment(s: Tensor, i: Tensor, table: nn.Embedding = table) -> Tensor:
            return (table(i) * s).sin()

        out: Tensor = checkpoint(segment, scale, some_indices(), use_reentrant=use_reentrant)
        out.pow(2).sum().backward()
        results.append((out.detach(), gradient(table), scale.grad))
    torch.testing.assert_close(results[1], results[0])


# Differentiating more than once.


@each_lookup
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["padding"]])
def test_create_graph(options: dict[str, Any], lookup: Lookup) -> None:
    results = []
    for function in (stock, lookup):
        weight, upstream = leaf(), torch.ones(4, 3, WIDTH, requires_grad=True)
        out = function(weight, some_indices(), **options).pow(3)
        (first,) = torch.autograd.grad(out, weight, upstream, create_graph=True)
        results.append(torch.autograd.grad(first.pow(2).sum(), (weight, upstream)))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual, expected)


@each_lookup
def test_create_graph_of_a_sparse_gradient(lookup: Lookup) -> None:
    results = []
    for function in (stock, lookup):
        weight = leaf()
        out = function(weight, some_indices(), sparse=True).pow(3)
        (first,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.to_dense().pow(2).sum(), weight)
        results.append(second.to_dense())
    assert_close(results[1], results[0])


def test_batched_upstream_gradients() -> None:
    upstream = make_table(5 * 12, WIDTH).view(5, 4, 3, WIDTH)
    results = []
    for table in make_pair(padding_idx=1):
        out = table(some_indices())
        results += torch.autograd.grad(out, table.weight, upstream, is_grads_batched=True)
    assert_close(results[1], results[0])


# Where the table comes from, and how often it is used.


@each_lookup
def test_table_that_is_a_result(lookup: Lookup) -> None:
    results = []
    for function in (stock, lookup):
        source = leaf()
        out = function(source.exp() * 2, some_indices(), padding_idx=1)
        results += torch.autograd.grad(out.pow(2).sum(), source)
    assert_close(results[1], results[0])


@each_lookup
@pytest.mark.parametrize("sparse", [False, True])
def test_table_used_twice(sparse: bool, lookup: Lookup) -> None:
    results = []
    for function in (stock, lookup):
        weight = leaf()
        first = function(weight, some_indices(), sparse=sparse)
        second = function(weight, some_indices().flip(0), sparse=sparse)
        (first.pow(2).sum() + second.pow(3).sum()).backward()
        results.append(weight.grad)
    assert_close(results[1], results[0])


def test_table_shared_with_a_linear_layer() -> None:
    results = []
    for table in make_pair():
        head = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        head.weight = table.weight
        head(table(some_indices())).logsumexp(-1).sum().backward()
        results.append(gradient(table))
    assert_close(results[1], results[0])


@each_lookup
def test_unused_output_gives_no_gradient(lookup: Lookup) -> None:
    weight = leaf()
    lookup(weight, some_indices())
    other = torch.ones(2, requires_grad=True)
    loss = other.sum()
    grads = torch.autograd.grad(loss, (other, weight), allow_unused=True)
    assert grads[1] is None


class NoGradient(torch.autograd.Function):
    """Identity whose backward says that there is no gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


@each_lookup
def test_undefined_upstream_gradient(lookup: Lookup) -> None:
    grads = []
    for function in (stock, lookup):
        weight = leaf()
        NoGradient.apply(function(weight, some_indices())).sum().backward()
        grads.append(weight.grad)
    assert grads[0] is None
    assert grads[1] is None or not grads[1].any()  # a Python Function is handed zeros in its place


@pytest.mark.parametrize("sparse", [False, True])
def test_backwards_accumulate(sparse: bool) -> None:
    theirs, ours = make_pair(sparse=sparse)
    for table in (theirs, ours):
        for step in range(3):
            table(make_indices((4,), NUM_ROWS, seed=step)).pow(2).sum().backward()
    if sparse:
        assert gradient(ours)._nnz() == gradient(theirs)._nnz()
        assert torch.equal(gradient(ours)._indices(), gradient(theirs)._indices())
    assert_close(gradient(ours), gradient(theirs))


# Grad modes.


@each_lookup
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_under(mode: Any, lookup: Lookup) -> None:
    weight = leaf()
    with mode():
        out = lookup(weight, some_indices())
    assert not out.requires_grad and out.grad_fn is None
    assert out.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(out, stock(weight, some_indices()))


@each_lookup
def test_set_grad_enabled(lookup: Lookup) -> None:
    with torch.no_grad(), torch.set_grad_enabled(True):
        assert lookup(leaf(), some_indices()).requires_grad
    with torch.set_grad_enabled(False):
        assert not lookup(leaf(), some_indices()).requires_grad


@each_lookup
def test_frozen_table_has_no_graph(lookup: Lookup) -> None:
    assert lookup(leaf().detach(), some_indices()).grad_fn is None


@each_lookup
def test_inference_indices_cannot_be_saved(lookup: Lookup) -> None:
    with torch.inference_mode():
        indices = some_indices()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        lookup(leaf(), indices)


@each_lookup
def test_autocast_leaves_the_table_dtype(lookup: Lookup) -> None:
    results = []
    for function in (stock, lookup):
        weight, head = leaf(), torch.ones(WIDTH, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(weight, some_indices())
            scores = out @ head
        scores.float().sum().backward()
        assert weight.grad is not None
        results.append((out.dtype, scores.dtype, weight.grad.dtype))
    assert results[1] == results[0] == (torch.float32, torch.bfloat16, torch.float32)


# Copies.


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_module_with_gradient_is_copied(how: str, sparse: bool) -> None:
    theirs, ours = make_pair(padding_idx=1, sparse=sparse)
    clones = []
    for table in (theirs, ours):
        table(some_indices()).sum().backward()
        clones.append(
            copy.deepcopy(table) if how == "deepcopy" else pickle.loads(pickle.dumps(table))
        )
    clone = clones[1]
    assert type(clone) is embed_ext.Embedding
    assert repr(clone) == repr(ours)
    assert clone.weight.data_ptr() != ours.weight.data_ptr()
    assert clone.weight.grad is None and clones[0].weight.grad is None
    assert torch.equal(clone(some_indices()), ours(some_indices()))


def test_result_with_a_graph_is_not_copied() -> None:
    out = make_pair()[1](some_indices())
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(out)
    assert torch.equal(copy.deepcopy(out.detach()), out)
