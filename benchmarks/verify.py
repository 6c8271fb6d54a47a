"""Results first: a lookup that is wrong is reported, and not timed.

Three things are asked of every provider, on two successive batches so that rows left over from
the first would show in the second:

1. forward equals the table's rows bit for bit;
2. the gradient of small integers, whose sums are exact in every dtype and in any order, equals
   the float64 reference exactly: nothing is lost, doubled or misplaced;
3. the gradient of ordinary numbers is within the error bound of plain summation in the table's
   dtype. The error is recorded in units of one rounding: a provider that accumulates in higher
   precision and rounds once scores about 1, one that accumulates in bfloat16 far more.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import CaseData
from benchmarks.providers import Lookup

# 64 addends of at most 3 sum to 192: bfloat16 holds every integer up to 256.
EXACT_ADDENDS = 64
EXACT_LARGEST = 3
BLOCK_ELEMENTS = 2**23


class WrongResult(Exception):
    """A provider's result differs from the reference; the message says how."""


@dataclass(frozen=True)
class GradientReference:
    """The gradient in float64, kept for touched rows alone."""

    indices: Tensor  # [tokens]
    grad_output: Tensor  # [tokens, embedding_dim]
    rows: Tensor  # [distinct], the rows that get a gradient, ascending
    total: Tensor  # [distinct, embedding_dim] float64
    magnitude: Tensor  # [distinct, embedding_dim] float64, the sum of absolute values
    hits: Tensor  # [distinct], tokens for each row
    exact: bool


@dataclass(frozen=True)
class References:
    """What the providers of one case are checked against."""

    weight: Tensor  # [num_embeddings, embedding_dim]
    gradients: tuple[GradientReference, ...]


def integer_grad_output(indices: Tensor, grad_output: Tensor, seed: int) -> Tensor:
    """Integers like grad_output [tokens, embedding_dim], nonzero for few tokens of each row."""
    device, shape = grad_output.device, grad_output.shape
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randint(1, EXACT_LARGEST + 1, shape, generator=generator, device=device)
    order = torch.randperm(indices.numel(), generator=generator, device=device)
    grouped, position = indices.long()[order].sort(stable=True)
    places = torch.arange(grouped.numel(), device=device)
    occurrence = places - torch.searchsorted(grouped, grouped)
    keep = torch.empty_like(grouped)
    keep[order[position]] = (occurrence < EXACT_ADDENDS).long()
    return (values * keep.unsqueeze(1)).to(grad_output)


def reference_gradient(
    indices: Tensor, grad_output: Tensor, padding_idx: int | None, *, exact: bool
) -> GradientReference:
    """Sum grad_output [tokens, embedding_dim] by indices [tokens] in float64."""
    flat = indices.long()
    trained = (
        torch.ones_like(flat, dtype=torch.bool) if padding_idx is None else flat != padding_idx
    )
    rows, inverse, hits = flat[trained].unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    kept = grad_output[trained]
    total = torch.zeros(rows.numel(), kept.shape[1], dtype=torch.float64, device=kept.device)
    magnitude = torch.zeros_like(total)
    block = max(1, BLOCK_ELEMENTS // max(1, kept.shape[1]))
    for target, values in zip(inverse.split(block), kept.split(block), strict=True):  # type: ignore[no-untyped-call]
        total.index_add_(0, target, values.double())
        magnitude.index_add_(0, target, values.double().abs_())
    return GradientReference(indices, grad_output, rows, total, magnitude, hits, exact)


def make_references(data: CaseData, seed: int) -> References:
    first, second = data.batches[0], data.batches[1 % len(data.batches)]
    padding_idx = data.case.padding_idx
    integers = integer_grad_output(first, data.grad_output, seed)
    return References(
        weight=data.weight,
        gradients=(
            reference_gradient(first, integers, padding_idx, exact=True),
            reference_gradient(second, data.grad_output, padding_idx, exact=False),
        ),
    )


def check_forward(output: Tensor, indices: Tensor, weight: Tensor) -> None:
    """Output [tokens, embedding_dim] must be rows of weight [num_embeddings, embedding_dim]."""
    expected = weight.index_select(0, indices.long())
    if output.shape != expected.shape or output.dtype != expected.dtype:
        raise WrongResult(
            f"forward gave {tuple(output.shape)} {output.dtype}, "
            f"expected {tuple(expected.shape)} {expected.dtype}"
        )
    if not torch.equal(output.detach(), expected):
        wrong = int((output.detach() != expected).any(dim=1).sum())
        raise WrongResult(f"forward: {wrong} of {indices.numel()} rows differ from the table")


def check_gradient(grad: Tensor | None, weight: Tensor, reference: GradientReference) -> float:
    """The largest error of grad [num_embeddings, embedding_dim], in roundings of its dtype."""
    if grad is None:
        raise WrongResult("backward left no gradient")
    dense = grad.to_dense() if grad.layout != torch.strided else grad
    if dense.shape != weight.shape or dense.dtype != weight.dtype:
        raise WrongResult(
            f"gradient is {tuple(dense.shape)} {dense.dtype}, "
            f"expected {tuple(weight.shape)} {weight.dtype}"
        )
    _check_untouched(dense, reference.rows)
    error = (dense[reference.rows].double() - reference.total).abs_()
    if not bool(error.isfinite().all()):
        raise WrongResult("gradient is not finite")
    if reference.exact and bool((error > 0).any()):
        wrong = int((error > 0).any(dim=1).sum())
        raise WrongResult(f"gradient: {wrong} rows of sums of small integers are not exact")
    if error.numel() == 0:
        return 0.0
    roundings = error / (reference.magnitude * (torch.finfo(dense.dtype).eps / 2))
    worst_of_row = roundings.amax(dim=1)
    if bool((worst_of_row > 1.1 * reference.hits).any()):
        raise WrongResult(
            f"gradient is {float(worst_of_row.max()):.3g} roundings away from the reference, "
            "more than summation in its own dtype explains"
        )
    return 0.0 if reference.exact else float(worst_of_row.max())


def _check_untouched(grad: Tensor, touched: Tensor) -> None:
    nonzero_rows = torch.ones(grad.shape[0], dtype=torch.bool, device=grad.device)
    block = max(1, BLOCK_ELEMENTS // max(1, grad.shape[1]))
    for start in range(0, grad.shape[0], block):
        # A NaN is unequal to zero, so it counts as a stray value as well.
        nonzero_rows[start : start + block] = (grad[start : start + block] != 0).any(dim=1)
    nonzero_rows[touched] = False
    if stray := int(nonzero_rows.sum()):
        raise WrongResult(f"gradient: {stray} rows that no index names are not zero")


def verify(lookup: Lookup, references: References) -> float:
    """Check a lookup; returns its gradient's largest error in roundings, or raises WrongResult."""
    with torch.no_grad():
        indices = references.gradients[0].indices
        check_forward(lookup.call(indices), indices, references.weight)
    worst = 0.0
    for reference in references.gradients:
        output = lookup.call(reference.indices)
        check_forward(output, reference.indices, references.weight)
        if not output.requires_grad:
            raise WrongResult("forward recorded no graph")
        output.backward(reference.grad_output)  # type: ignore[no-untyped-call]
        worst = max(worst, check_gradient(lookup.weight.grad, lookup.weight, reference))
        lookup.weight.grad = None
    check_accumulation(lookup, references.gradients[0])
    return worst


def check_accumulation(lookup: Lookup, reference: GradientReference) -> None:
    """Two backwards without zero_grad() between them must leave twice the gradient."""
    for _ in range(2):
        lookup.call(reference.indices).backward(reference.grad_output)  # type: ignore[no-untyped-call]
        if lookup.weight.grad is None or lookup.weight.grad.is_sparse:
            lookup.weight.grad = None
            return  # sparse entries are appended, and the mode is not measured for them
    doubled = dataclasses.replace(reference, total=2 * reference.total)
    try:
        check_gradient(lookup.weight.grad, lookup.weight, doubled)
    except WrongResult as error:
        raise WrongResult(f"accumulated {error}") from None
    finally:
        lookup.weight.grad = None
