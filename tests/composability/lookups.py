"""One lookup in torch's spelling and in the three of this library, all with one signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import embed_ext

# (weight [V, D], indices [...], **options of F.embedding) -> [..., D]
Lookup = Callable[..., Tensor]


def stock(weight: Tensor, indices: Tensor, **options: Any) -> Tensor:
    """torch's own, which every other one has to agree with."""
    return F.embedding(indices, weight, **options)


def functional(weight: Tensor, indices: Tensor, **options: Any) -> Tensor:
    return embed_ext.functional.embedding(indices, weight, **options)


def function(
    weight: Tensor, indices: Tensor, padding_idx: int | None = None, **options: Any
) -> Tensor:
    padding_row = -1 if padding_idx is None else padding_idx
    flags = [options.get(name, False) for name in ("scale_grad_by_freq", "sparse")]
    out: Tensor = embed_ext.EmbeddingFunction.apply(weight, indices, padding_row, *flags)
    return out


def module(weight: Tensor, indices: Tensor, **options: Any) -> Tensor:
    # Its own table is never read: any shape will do, and a given one draws no random numbers.
    table = embed_ext.Embedding(2, 1, _weight=torch.empty(2, 1, device="meta"), **options)
    out: Tensor = torch.func.functional_call(table, {"weight": weight}, (indices,))
    return out


# Dynamo traces no Function that has a jvp; it is to call this one as it is.
torch.compiler.allow_in_graph(embed_ext.EmbeddingFunction)

LOOKUPS = (functional, function, module)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "scaled": {"scale_grad_by_freq": True},
    "scaled_padding": {"padding_idx": 1, "scale_grad_by_freq": True},
}


def make_pair(
    num_embeddings: int = 7, embedding_dim: int = 3, **options: Any
) -> tuple[nn.Embedding, embed_ext.Embedding]:
    """nn.Embedding and embed_ext.Embedding over two tables with equal values."""
    theirs = nn.Embedding(num_embeddings, embedding_dim, **options)
    ours = embed_ext.Embedding(num_embeddings, embedding_dim, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradient(table: nn.Embedding) -> Tensor:
    """The gradient that a backward left on a table, [V, D]."""
    assert table.weight.grad is not None
    return table.weight.grad
