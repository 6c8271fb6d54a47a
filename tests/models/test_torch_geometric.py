"""PyG in a converted model: knowledge graphs, which look up, and LightGCN, which does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embed_ext
from tests.common import assert_close, generator
from tests.models.common import lookups

NODES, RELATIONS, TRIPLES = 30, 4, 60


def make_triples() -> tuple[Tensor, Tensor, Tensor]:
    """Heads, relations and tails, each [TRIPLES]."""
    source = generator(1)
    sizes = (NODES, RELATIONS, NODES)
    head, relation, tail = (torch.randint(n, (TRIPLES,), generator=source) for n in sizes)
    return head, relation, tail


def train(model: Any, triples: tuple[Tensor, Tensor, Tensor]) -> None:
    """Two epochs; what is drawn is the same for every call."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for batch in model.loader(*triples, batch_size=16, shuffle=True):
            optimizer.zero_grad()
            model.loss(*batch).backward()
            optimizer.step()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["TransE", "DistMult", "ComplEx", "RotatE"])
def test_knowledge_graph(torch_geometric: Any, name: str, sparse: bool) -> None:
    torch.manual_seed(0)
    theirs = getattr(torch_geometric.nn, name)(NODES, RELATIONS, hidden_channels=8, sparse=sparse)
    ours = copy.deepcopy(theirs)
    assert not embed_ext.convert(ours).left
    triples = make_triples()
    with lookups() as served:
        actual = ours(*triples)
    assert set(served) == {"ours"} and torch.equal(actual, theirs(*triples))
    for model in (ours, theirs):
        train(model, triples)
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(actual.detach(), expected.detach())
    ranks = [model.test(*triples, batch_size=10, log=False) for model in (ours, theirs)]
    assert ranks[0] == pytest.approx(ranks[1])


def test_light_gcn_looks_nothing_up(torch_geometric: Any) -> None:
    torch.manual_seed(0)
    model = torch_geometric.nn.LightGCN(NODES, embedding_dim=8, num_layers=2)
    head, _, tail = make_triples()
    edges = torch.stack([head, tail])
    expected = model(edges)
    assert len(embed_ext.convert(model).swapped) == 1
    assert isinstance(model.embedding, nn.Embedding)
    with lookups() as served, embed_ext.routed():
        assert torch.equal(model(edges), expected)
    assert served == []  # it takes the table whole
