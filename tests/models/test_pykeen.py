"""pykeen in a converted model: scores and a training loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import embed_ext
from tests.common import assert_close, generator
from tests.models.common import lookups

ENTITIES, RELATIONS, TRIPLES = 20, 3, 60
pytestmark = pytest.mark.filterwarnings("ignore")


def make_factory(pykeen: Any) -> Any:
    """Random triples."""
    source = generator(1)
    sizes = (ENTITIES, RELATIONS, ENTITIES)
    columns = [torch.randint(n, (TRIPLES,), generator=source) for n in sizes]
    return pykeen.triples.CoreTriplesFactory(torch.stack(columns, dim=1), ENTITIES, RELATIONS)


def train(pykeen: Any, model: Any, factory: Any, kind: str) -> Any:
    """Two epochs; the losses. What is drawn is the same for every call."""
    torch.manual_seed(2)
    loop = getattr(pykeen.training, kind)(
        model=model,
        triples_factory=factory,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    return loop.train(
        triples_factory=factory, num_epochs=2, batch_size=16, use_tqdm=False, pin_memory=False
    )


@pytest.mark.parametrize("kind", ["SLCWATrainingLoop", "LCWATrainingLoop"])
@pytest.mark.parametrize("name", ["TransE", "DistMult", "ComplEx"])
def test_scores_and_training(pykeen: Any, name: str, kind: str) -> None:
    factory = make_factory(pykeen)
    theirs = getattr(pykeen.models, name)(triples_factory=factory, embedding_dim=8, random_seed=0)
    ours = copy.deepcopy(theirs)
    report = embed_ext.convert(ours)
    assert report.swapped and not report.left
    with lookups() as served:
        actual = ours.score_hrt(factory.mapped_triples)
    assert set(served) == {"ours"}
    assert torch.equal(actual, theirs.score_hrt(factory.mapped_triples))
    losses = [train(pykeen, model, factory, kind) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(actual.detach(), expected.detach())
    tables = [module for module in ours.modules() if isinstance(module, nn.Embedding)]
    assert tables and all(type(table) is embed_ext.Embedding for table in tables)
