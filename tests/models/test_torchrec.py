"""TorchRec's unsharded collections in a converted model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embed_ext
from tests.common import assert_close
from tests.models.common import gradients, lookups

pytestmark = pytest.mark.filterwarnings("ignore")


def make_features(torchrec: Any) -> Any:
    """Two features of a batch of two, as TorchRec passes them."""
    return torchrec.KeyedJaggedTensor(
        keys=["user", "item"],
        values=torch.tensor([1, 2, 3, 0, 5, 5]),
        lengths=torch.tensor([2, 1, 1, 2]),
    )


def make_sequences(torchrec: Any) -> nn.Module:
    """An EmbeddingCollection of two tables, one of them for both features."""
    configs = [
        torchrec.EmbeddingConfig(
            name="all", embedding_dim=4, num_embeddings=9, feature_names=["user", "item"]
        ),
        torchrec.EmbeddingConfig(
            name="few", embedding_dim=4, num_embeddings=7, feature_names=["item"]
        ),
    ]
    return torchrec.EmbeddingCollection(tables=configs, device=torch.device("cpu"))  # type: ignore[no-any-return]


def make_bags(torchrec: Any) -> nn.Module:
    """An EmbeddingBagCollection of one table."""
    config = torchrec.EmbeddingBagConfig(
        name="all", embedding_dim=4, num_embeddings=9, feature_names=["user", "item"]
    )
    return torchrec.EmbeddingBagCollection(tables=[config], device=torch.device("cpu"))  # type: ignore[no-any-return]


def values(result: Any) -> Tensor:
    """What a collection returns, in one tensor."""
    if hasattr(result, "values") and not isinstance(result, dict):
        return result.values()  # type: ignore[no-any-return]
    return torch.cat([jagged.values() for jagged in result.values()])


def test_embedding_collection(torchrec: Any) -> None:
    theirs = make_sequences(torchrec)
    ours = copy.deepcopy(theirs)
    report = embed_ext.convert(ours)
    assert [entry.names for entry in report.swapped] == [("embeddings.all",), ("embeddings.few",)]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with lookups() as served:
        actual = values(ours(make_features(torchrec)))
    expected = values(theirs(make_features(torchrec)))
    assert set(served) == {"ours"}
    assert torch.equal(actual, expected)
    for out in (actual, expected):
        out.square().sum().backward()
    found = gradients(ours)
    assert found
    for key, grad in gradients(theirs).items():
        assert_close(found[key], grad)


def test_embedding_bags_are_no_embeddings(torchrec: Any) -> None:
    collection = make_bags(torchrec)
    expected = values(collection(make_features(torchrec)))
    report = embed_ext.convert(collection)
    assert not report.swapped and not report.left
    with embed_ext.routed():
        assert torch.equal(values(collection(make_features(torchrec))), expected)
