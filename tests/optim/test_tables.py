"""What tables go through between two steps: max_norm, several uses and several backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embed_ext
from embed_ext import optim
from embed_ext.functional import embedding
from tests.common import assert_close, assert_same_bits, make_indices
from tests.optim.common import ALL_CASES, CASES, TORCHS, Case, Reference, make_parameter
from tests.optim.test_together import Model, assert_same_parameters, train

ROWS, WIDTH, STEPS = 30, 5, 4
BASES: dict[Any, Any] = {optim.RowwiseAdagrad: optim.Adagrad, optim.RowwiseAdam: optim.Adam}
each_case = pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
either_gradient = pytest.mark.parametrize("coalesced", [False, True])


def make_table(**options: Any) -> embed_ext.Embedding:
    torch.manual_seed(0)
    return embed_ext.Embedding(ROWS, WIDTH, sparse=True, **options)


def batch(step: int) -> Tensor:
    """Some rows, of which some come several times."""
    return make_indices((12,), ROWS, seed=step)


@either_gradient
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_max_norm_where_all_rows_are_in_use(case: Case, coalesced: bool) -> None:
    kind, options = case
    ours, theirs = Model(max_norm=0.5), Model(sparse=False, max_norm=0.5)
    ours.words.coalesced = coalesced
    actual = train(ours, kind(ours.parameters(), **options), everything=True)
    expected = train(theirs, TORCHS[kind](theirs.parameters(), **options), everything=True)
    assert_same_parameters(actual, expected)


@either_gradient
@each_case
def test_max_norm_beside_padding(case: Case, coalesced: bool) -> None:
    """Rows are scaled when they are looked up, which their states do not notice."""
    kind, options = case
    table = make_table(max_norm=0.8, padding_idx=3, coalesced=coalesced)
    optimizer = kind(table.parameters(), **options)
    expected = Reference(kind, table.weight.detach(), options)
    for step in range(STEPS):
        optimizer.zero_grad()
        indices = torch.cat([batch(step), torch.tensor([3])])
        torch.embedding_renorm_(expected.weight, indices, 0.8, 2.0)
        table(indices).square().sum().backward()
        assert 3 not in table.weight.grad._indices()
        expected.step(table.weight.grad)
        optimizer.step()
        assert_close(table.weight.detach(), expected.weight)


@each_case
def test_lookups_of_one_table_with_options_of_their_own(case: Case) -> None:
    kind, options = case
    weight = make_table().weight
    optimizer, expected = kind([weight], **options), Reference(kind, weight.detach(), options)

    def loss_of(weight: Tensor, step: int, sparse: bool) -> Tensor:
        first, second, third = (batch(10 * step + use) for use in range(3))
        hidden = embedding(first, weight, sparse=sparse, padding_idx=first[0].item())
        hidden = hidden * embedding(second, weight, sparse=sparse, coalesced=True)
        last = embedding(third, weight, sparse=sparse)
        return (hidden + last).square().sum()

    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(weight, step, sparse=True).backward()
        whole = expected.weight.clone().requires_grad_()
        loss_of(whole, step, sparse=False).backward()
        rows = weight.grad.coalesce().indices()[0]
        others = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, rows, False)
        assert not whole.grad[others].any()
        expected.steps += 1
        expected.update(rows, whole.grad[rows])
        optimizer.step()
        assert_close(weight.detach(), expected.weight)


@either_gradient
@each_case
def test_two_modules_that_share_a_table(case: Case, coalesced: bool) -> None:
    kind, options = case
    one = make_table(coalesced=coalesced)
    pair: Any = nn.ModuleList([make_table(coalesced=which) for which in (coalesced, not coalesced)])
    pair[1].weight = pair[0].weight
    optimizers = [kind(each.parameters(), **options) for each in (one, pair)]
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        first, second = batch(2 * step), batch(2 * step + 1)
        (one(first) * one(second)).sum().backward()
        (pair[0](first) * pair[1](second)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_close(pair[1].weight.detach(), one.weight.detach())


@either_gradient
@each_case
def test_backwards_before_a_step_are_one_batch(case: Case, coalesced: bool) -> None:
    kind, options = case
    results = []
    for parts in (1, 3):
        model = nn.Sequential(make_table(coalesced=coalesced), nn.Linear(WIDTH, 3))
        optimizer = kind(model.parameters(), **options)
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in batch(step).chunk(parts):
                model(part).square().sum().div(20).backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    assert_same_parameters(*results)


@either_gradient
@each_case
def test_a_graph_that_is_gone_through_twice(case: Case, coalesced: bool) -> None:
    kind, options = case
    results = []
    for times in (1, 2):
        table = make_table(coalesced=coalesced)
        optimizer = kind(table.parameters(), **options)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = table(batch(step)).square().sum() * (2 / times)
            for _ in range(times):
                loss.backward(retain_graph=True)
            optimizer.step()
        results.append(table.weight.detach())
    assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_case
def test_a_table_that_is_always_tied_is_torchs_bit_by_bit(case: Case, dtype: torch.dtype) -> None:
    """Its gradient is dense at each step."""
    kind, options = case
    results = []
    for make in (kind, TORCHS[BASES.get(kind, kind)]):
        weight = make_parameter(dtype)
        table = embed_ext.Embedding(*weight.shape, sparse=True, _weight=weight.detach().clone())
        optimizer = make(table.parameters(), **options)
        for step in range(STEPS):
            optimizer.zero_grad()
            hidden = table(make_indices((8,), len(weight), seed=step)).tanh()
            (hidden @ table.weight.t()).square().mean().backward()
            assert not table.weight.grad.is_sparse
            optimizer.step()
        results.append(table.weight)
    assert_same_bits(*results)
