"""Subclasses of nn.Embedding in transformers whose forward is more than super().forward."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import embed_ext
from tests.models.common import lookups

TOKENS = torch.tensor([[1, 4], [4, 6]])


def make(transformers: Any, family: str, name: str, **options: int) -> Any:
    """A module of that class, from the file of that family."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name)(**options)


@pytest.mark.filterwarnings("ignore")  # what its file says when it is imported
def test_lookup_by_function(transformers: Any) -> None:
    table = make(
        transformers,
        "idefics",
        "IdeficsDecoupledEmbedding",
        num_embeddings=5,
        num_additional_embeddings=2,
        embedding_dim=3,
    )
    expected = table(TOKENS)
    report = embed_ext.convert(table)
    assert [entry.names for entry in report.swapped] == [("",), ("additional_embedding",)]
    assert report.swapped[0].served == "by the lookups in its forward"
    with lookups() as served:
        actual = table(TOKENS)
    assert torch.equal(actual, expected) and served == ["ours", "ours"]


def test_lookup_beside_a_product(transformers: Any) -> None:
    table = make(
        transformers, "ovis2", "Ovis2VisualEmbeddingTable", num_embeddings=7, embedding_dim=3
    )
    weights = torch.rand(2, 7)
    expected = table(TOKENS), table(weights)
    assert embed_ext.convert(table).swapped[0].served == "by its super().forward"
    with lookups() as served:
        actual = table(TOKENS), table(weights)
    assert all(map(torch.equal, actual, expected)) and served == ["ours"]
