"""Skip-gram with negative sampling over two tables, whatever module holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import embed_ext
from skipgram.batches import Batch

EmbeddingClass = Callable[..., nn.Embedding]


class SkipGram(nn.Module):
    """Scores a centre word against candidate contexts; only the embedding class varies.

    Args:
        embedding: ``nn.Embedding``, or what makes one of a subclass of it.
        vocab_size: rows of each table.
        dim: columns of each table.
        sparse: give the tables sparse gradients.
    """

    def __init__(self, embedding: EmbeddingClass, vocab_size: int, dim: int, sparse: bool) -> None:
        super().__init__()
        self.inputs = embedding(vocab_size, dim, sparse=sparse)
        self.outputs = embedding(vocab_size, dim, sparse=sparse)
        # word2vec's start: small centre vectors, zero context vectors.
        nn.init.uniform_(self.inputs.weight, -0.5 / dim, 0.5 / dim)
        nn.init.zeros_(self.outputs.weight)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch, averaged over its pairs."""
        centres = self.inputs(batch.centres)  # [batch, dim]
        candidates = self.outputs(batch.candidates)  # [batch, 1 + negatives, dim]
        scores = torch.bmm(candidates, centres.unsqueeze(2)).squeeze(2)  # [batch, 1 + negatives]
        positive = F.logsigmoid(scores[:, 0])
        negative = F.logsigmoid(-scores[:, 1:]).sum(dim=1)
        return -(positive + negative).mean()


@dataclass(frozen=True)
class OptimizerChoice:
    """How to build an optimizer, the gradient it wants and a rate that trains well here.

    Attributes:
        build: torch's class.
        by_rows: the class of ``embed_ext.optim`` in its place, which wants sparse gradients.
        sparse: whether torch's class is given sparse gradients.
        lr: the rate, for both.
        difference: how what `by_rows` computes differs from `build`, if by more than rounding.
    """

    build: Callable[..., torch.optim.Optimizer]
    by_rows: Callable[..., torch.optim.Optimizer]
    sparse: bool
    lr: float
    difference: str = ""


OPTIMIZERS = {
    "sgd": OptimizerChoice(torch.optim.SGD, embed_ext.optim.SGD, sparse=False, lr=100.0),
    "adagrad": OptimizerChoice(torch.optim.Adagrad, embed_ext.optim.Adagrad, sparse=False, lr=0.1),
    "adam": OptimizerChoice(
        torch.optim.Adam,
        embed_ext.optim.Adam,
        sparse=False,
        lr=0.002,
        difference="it is lazy: a word that a batch does not use is not moved by its moments",
    ),
    "sparse-sgd": OptimizerChoice(torch.optim.SGD, embed_ext.optim.SGD, sparse=True, lr=100.0),
    "sparse-adagrad": OptimizerChoice(
        torch.optim.Adagrad, embed_ext.optim.Adagrad, sparse=True, lr=0.1
    ),
    "sparse-adam": OptimizerChoice(
        torch.optim.SparseAdam,
        embed_ext.optim.Adam,
        sparse=True,
        lr=0.002,
        difference="it adds eps after the correction of the second moment, SparseAdam before it",
    ),
}
