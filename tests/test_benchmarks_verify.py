"""The benchmark harness finds wrong lookups, so that none is timed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks import verify
from benchmarks.cases import DISTRIBUTIONS, Case, make_data
from benchmarks.providers import Lookup

DTYPES = ("float32", "float64", "bfloat16", "float16")


def lookup_of(call: nn.Embedding) -> Lookup:
    return Lookup(call, call.weight)


def references_of(case: Case) -> tuple[Tensor, verify.References]:
    data = make_data(case, batches=2, device="cpu", seed=0)
    return data.weight, verify.make_references(data, seed=0)


class GradientFault(torch.autograd.Function):
    """A lookup whose gradient [num_embeddings, embedding_dim] goes wrong as ``fault`` says."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, indices: Tensor, fault: str) -> Tensor:
        ctx.state = weight, indices, fault  # type: ignore[attr-defined]
        return weight.index_select(0, indices)

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        weight, indices, fault = ctx.state  # type: ignore[attr-defined]
        grad = torch.zeros_like(weight)
        if fault == "lost":
            grad[indices] = grad_outputs[0]
        else:
            grad.index_add_(0, indices, grad_outputs[0])
        if fault == "stray":
            grad += (grad == 0).all(dim=1, keepdim=True)
        if fault == "nan":
            grad[indices[0], 0] = math.nan
        if fault == "shifted":
            grad = grad.roll(1, dims=1)
        return grad, None, None


def faulty_lookup(weight: Tensor, fault: str) -> Lookup:
    parameter = nn.Parameter(weight)

    def call(indices: Tensor) -> Tensor:
        output: Tensor = GradientFault.apply(parameter, indices, fault)  # type: ignore[no-untyped-call]
        return output

    return Lookup(call, parameter)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("sparse", [False, True])
def test_nn_embedding_is_found_right(dtype: str, distribution: str, sparse: bool) -> None:
    case = Case(50, 6, 400, distribution, dtype)
    weight, references = references_of(case)
    module = nn.Embedding(50, 6, padding_idx=case.padding_idx, sparse=sparse, _weight=weight)
    verify.verify(lookup_of(module), references)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["lost", "stray", "nan", "shifted"])
def test_a_faulty_gradient_is_found(fault: str, dtype: str) -> None:
    weight, references = references_of(Case(50, 6, 40, "zipf", dtype))
    with pytest.raises(verify.WrongResult, match="gradient"):
        verify.verify(faulty_lookup(weight, fault), references)


def test_a_lost_gradient_is_found_where_low_precision_hides_it() -> None:
    # The error bound of 4000 additions in bfloat16 is the sum itself; exact integers have none.
    weight, references = references_of(Case(50, 6, 4000, "all-same", "bfloat16"))
    with pytest.raises(verify.WrongResult, match="not exact"):
        verify.verify(faulty_lookup(weight, "lost"), references)


def test_a_wrong_accumulation_is_found() -> None:
    weight, references = references_of(Case(50, 6, 40))
    module = nn.Embedding(50, 6, _weight=weight)

    calls = []

    def call(indices: Tensor) -> Tensor:
        if module.weight.grad is not None:
            calls.append(1)
            module.weight.grad = torch.zeros_like(module.weight)  # what was there is lost
        return module(indices)

    with pytest.raises(verify.WrongResult, match="accumulated gradient"):
        verify.verify(Lookup(call, module.weight), references)
    assert calls


def test_a_faulty_forward_is_found() -> None:
    weight, references = references_of(Case(50, 6, 40))
    module = nn.Embedding(50, 6, _weight=weight.clone())
    with torch.no_grad():
        module.weight[references.gradients[0].indices[7], 2] += 1e-6
    with pytest.raises(verify.WrongResult, match="forward"):
        verify.verify(lookup_of(module), references)


def test_trained_padding_is_found() -> None:
    weight, references = references_of(Case(50, 6, 40, "half-padding"))
    with pytest.raises(verify.WrongResult, match="no index names"):
        verify.verify(lookup_of(nn.Embedding(50, 6, _weight=weight)), references)


def test_low_precision_accumulation_shows_in_the_error() -> None:
    weight, references = references_of(Case(50, 6, 4000, "all-same", "bfloat16"))
    parameter = nn.Parameter(weight)
    # Autograd sums in float32 here, and rounds when it goes back through the first cast.
    rounds_once = Lookup(lambda indices: parameter.float()[indices].bfloat16(), parameter)
    assert verify.verify(rounds_once, references) <= 1.01
    module = nn.Embedding(50, 6, _weight=weight)
    assert verify.verify(lookup_of(module), references) > 10
