"""Results first, for training steps: the table after two steps, against float64.

The same two steps are taken by nn.Embedding and torch's optimizer in float64. Under SGD a row that
no token names must not change by a bit, so there the reference has the named rows alone; under
weight decay or with a tied output layer it has all. The learning rate is 1, so that what a step
does to a row is as large as the row.

The norm that clipping divides by is torch's, of a dense gradient in the table's dtype: summing the
squares one by one it errs by as much as 1 in 1,000 in float32, which is no lookup's fault. So the
reference takes its norm in the same way, and all else in float64.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from benchmarks.cases import Case
from benchmarks.lookup import Lookup
from benchmarks.steps import POSITIONS, StepBatch, StepData, named_rows, training_step
from benchmarks.verify import BLOCK_ELEMENTS, WrongResult

LEARNING_RATE = 1.0
ROUNDINGS = 32  # of an optimizer's own arithmetic


@dataclass(frozen=True)
class StepReference:
    """The table after two steps in float64, of the rows that they may change."""

    original: Tensor  # [num_embeddings, embedding_dim], before the steps
    batches: list[StepBatch]  # one a step
    rows: Tensor  # [changed], ascending
    changed: Tensor  # [changed, embedding_dim] float64
    roundings: Tensor  # [changed], how many may separate a row from the reference


def make_step_reference(original: Tensor, data: StepData, case: Case) -> StepReference:
    """Take two steps from the table original [num_embeddings, embedding_dim] in float64."""
    batches = [data.batches[0], data.batches[1 % len(data.batches)]]
    named = torch.cat([indices.long() for indices in named_rows(batches)])
    hits = torch.bincount(named, minlength=case.num_embeddings)
    if case.padding_idx is not None:
        hits[case.padding_idx] += 1  # there, so that it has a place of its own below
    if data.step.trains_every_row:
        rows = torch.arange(case.num_embeddings, device=original.device)
    else:
        rows = hits.nonzero().squeeze(1)

    def placed(batch: StepBatch) -> StepBatch:
        return tuple(tuple(torch.searchsorted(rows, i.long()) for i in uses) for uses in batch)

    table = nn.Embedding(
        rows.numel(),
        case.embedding_dim,
        case.padding_idx,  # 0 or none: the first of the rows either way
        _weight=original[rows].double(),
    )
    double = dataclasses.replace(
        data,
        batches=[placed(batch) for batch in batches],
        grad_output=data.grad_output.double(),
        hidden=None if data.hidden is None else data.hidden.double(),
        grad_logits=None if data.grad_logits is None else data.grad_logits.double(),
    )

    def norm_of(grad: Tensor) -> Tensor:
        # grad: [changed, embedding_dim] float64
        whole = torch.zeros_like(original)
        whole[rows] = grad.to(original.dtype)
        return get_total_norm(whole, foreach=data.step.foreach).double()

    lookup = Lookup(table, table.weight)
    train = training_step(lookup, double, LEARNING_RATE, norm_of)
    for batch in double.batches:
        train(batch)
    return StepReference(
        original, batches, rows, table.weight.detach(), _roundings(data, hits, case)[rows]
    )


def _roundings(data: StepData, hits: Tensor, case: Case) -> Tensor:
    """How many roundings plain summation explains, for rows hit so often, [num_embeddings]."""
    roundings = hits + ROUNDINGS + (POSITIONS if data.step.tied else 0)
    if data.step.clip:
        # The norm is of all rows: it errs by the hottest row's error, and as other roundings of
        # the gradient shift its own.
        squares = case.embedding_dim * (
            case.num_embeddings if data.step.tied else int(hits.count_nonzero())
        )
        roundings = roundings + hits.max() + round(squares**0.5)
    return roundings


def verify_step(lookup: Lookup, data: StepData, reference: StepReference) -> None:
    """Take the steps with a lookup; raises WrongResult if its table differs afterwards.

    The table is left as the reference's original, and without a gradient.
    """
    try:
        train = training_step(lookup, data, LEARNING_RATE)
        for batch in reference.batches:
            train(batch)
        _check(lookup.weight.detach(), reference)
    finally:
        restore(lookup, reference.original)


def restore(lookup: Lookup, original: Tensor) -> None:
    """Give a lookup its table [num_embeddings, embedding_dim] back, and drop its gradient."""
    lookup.weight.grad = None
    lookup.weight.detach().copy_(original)


def _check(weight: Tensor, reference: StepReference) -> None:
    """Compare weight [num_embeddings, embedding_dim] with the reference, some rows at a time."""
    original, rows = reference.original, reference.rows
    size = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    if rows.numel() < weight.shape[0]:
        same = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
        for start in range(0, weight.shape[0], size):
            block = slice(start, start + size)
            same[block] = (weight[block] == original[block]).all(dim=1)
        same[rows] = True
        if stray := int(same.logical_not().sum()):
            raise WrongResult(f"step: {stray} rows that no index names have changed")
    rounding, worst = torch.finfo(weight.dtype).eps / 2, 0.0
    for start in range(0, rows.numel(), size):
        block = slice(start, start + size)
        before = original[rows[block]].double()
        expected = reference.changed[block]
        error = (weight[rows[block]].double() - expected).abs_()
        if not bool(error.isfinite().all()):
            raise WrongResult("step: the table is not finite")
        # Nothing cancels but the table and its change, so these two say how large a rounding is.
        scale = before.abs().add_((expected - before).abs_()).mul_(rounding)
        allowed = scale.mul_(reference.roundings[block].unsqueeze(1))
        worst = max(worst, float((error / allowed.clamp_(min=1e-300)).max()))
    if worst > 1:
        raise WrongResult(
            f"step: the table is {worst:.3g} times farther from the reference than summation in "
            "its own dtype explains"
        )
