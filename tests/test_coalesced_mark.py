"""A coalesced gradient's mark goes to the leaf that the lookup used, and to no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from embed_ext import Embedding, EmbeddingFunction
from embed_ext.functional import embedding
from tests.common import assert_close

NUM_ROWS, WIDTH = 6, 3
ROWS = torch.tensor([2, 2, 3])

# (weight [V, D], indices [...]) -> [..., D], with a gradient that is coalesced
LOOKUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "module": lambda weight, indices: module_of(weight)(indices),
    "functional": lambda weight, indices: embedding(indices, weight, sparse=True, coalesced=True),
    "Function": lambda weight, indices: EmbeddingFunction.apply(
        weight, indices, -1, False, True, True
    ),
}


def module_of(weight: Tensor) -> Embedding:
    module = Embedding(NUM_ROWS, WIDTH, sparse=True, coalesced=True)
    module.weight = weight
    return module


def leaf() -> nn.Parameter:
    return nn.Parameter(torch.ones(NUM_ROWS, WIDTH))


def entries(weight: nn.Parameter) -> list[int]:
    return weight.grad._indices()[0].tolist()


@pytest.mark.parametrize("stock_first", [False, True])
@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("rows", [[2, 2, 3], [1, 2, 3], [5, 0], []], ids=str)
def test_a_stock_table_of_the_same_shape_is_not_marked(
    rows: list[int], lookup: str, stock_first: bool
) -> None:
    ours, stock = leaf(), nn.Embedding(NUM_ROWS, WIDTH, sparse=True)
    indices = torch.tensor(rows, dtype=torch.int64)
    uses = [lambda: LOOKUPS[lookup](ours, ROWS).sum(), lambda: 2 * stock(indices).sum()]
    first, second = (use() for use in uses[:: -1 if stock_first else 1])
    (first + second).backward()
    assert ours.grad.is_coalesced() and entries(ours) == [2, 3]
    assert entries(stock.weight) == rows

    alone = nn.Embedding(NUM_ROWS, WIDTH, sparse=True)
    (2 * alone(indices).sum()).backward()
    assert stock.weight.grad.is_coalesced() == alone.weight.grad.is_coalesced()
    assert_close(stock.weight.grad.to_dense(), alone.weight.grad.to_dense())


@pytest.mark.parametrize("other", LOOKUPS)
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_two_tables_of_one_shape_are_each_marked(lookup: str, other: str) -> None:
    first, second = leaf(), leaf()
    indices = torch.tensor([4, 0, 4, 4])
    loss = LOOKUPS[lookup](first, ROWS).sum() + 5 * LOOKUPS[other](second, indices).sum()
    loss.backward()
    for weight, rows in ((first, [2, 3]), (second, [0, 4])):
        assert weight.grad.is_coalesced() and entries(weight) == rows
    assert second.grad.to_dense()[:, 0].tolist() == [5, 0, 0, 0, 15, 0]


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_without_coalesced_a_table_beside_it_is_not_marked(lookup: str) -> None:
    ours, plain = leaf(), leaf()
    (LOOKUPS[lookup](ours, ROWS).sum() + embedding(ROWS, plain, sparse=True).sum()).backward()
    assert ours.grad.is_coalesced() and not plain.grad.is_coalesced()
    assert entries(plain) == [2, 2, 3]


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_a_weight_that_is_also_used_without(lookup: str) -> None:
    weight = leaf()
    (LOOKUPS[lookup](weight, ROWS).sum() + embedding(ROWS, weight, sparse=True).sum()).backward()
    assert not weight.grad.is_coalesced() or entries(weight) == sorted(set(entries(weight)))
    assert weight.grad.to_dense()[:, 0].tolist() == [0, 0, 4, 2, 0, 0]


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_a_leaf_that_is_reached_through_another_node(lookup: str) -> None:
    """A view of the leaf is what the lookup used; nothing of the leaf's shape is marked for it."""
    weight, beside = leaf(), nn.Embedding(NUM_ROWS, WIDTH, sparse=True)
    out = LOOKUPS["Function" if lookup == "module" else lookup](weight * 1, ROWS)
    (out.sum() + beside(ROWS).sum()).backward()
    assert not beside.weight.grad.is_coalesced()
    assert weight.grad.to_dense()[:, 0].tolist() == [0, 0, 2, 1, 0, 0]


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_asked_for_by_name(lookup: str) -> None:
    """.grad stays as it is, whatever it says."""
    weight = leaf()
    weight.grad = torch.sparse_coo_tensor(
        ROWS[None], torch.ones(3, WIDTH), (NUM_ROWS, WIDTH), check_invariants=True
    )
    (grad,) = torch.autograd.grad(LOOKUPS[lookup](weight, ROWS).sum(), weight)
    assert grad.is_coalesced() and not weight.grad.is_coalesced()
