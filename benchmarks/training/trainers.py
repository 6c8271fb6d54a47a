"""Who is measured: each trainer has a table and an optimizer of its own, and takes whole steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import embed_ext
from benchmarks.lookup import needs

FBGEMM = "fbgemm_gpu"
EPS = 1e-8


@dataclass(frozen=True)
class Trained:
    """A table that is trained."""

    step: Callable[[Tensor, Tensor], None]  # indices [tokens], gradient of its rows [tokens, D]
    weight: Callable[[], Tensor]  # [V, D]


Build = Callable[[Tensor, float], Trained]  # of a table [V, D] and a learning rate


@dataclass(frozen=True)
class Trainer:
    """How to build one, and who it is measured beside: trainers of the same method."""

    name: str
    method: str
    build: Build
    passes_over_the_table: bool = False  # a step costs what the rows that there are cost
    unavailable: Callable[[], str | None] = lambda: None

    @property
    def key(self) -> str:
        return f"{self.method}: {self.name}"


SUBJECT = "embed_ext"


def _module(
    table: nn.Embedding, make: Callable[..., torch.optim.Optimizer], learning_rate: float
) -> Trained:
    optimizer = make(list(table.parameters()), lr=learning_rate)

    def step(indices: Tensor, grad_output: Tensor) -> None:
        optimizer.zero_grad()
        table(indices).backward(grad_output)
        optimizer.step()

    return Trained(step, lambda: table.weight.detach())


def ours(make: Callable[..., torch.optim.Optimizer]) -> Build:
    def build(weight: Tensor, learning_rate: float) -> Trained:
        rows, width = weight.shape
        table = embed_ext.Embedding(rows, width, _weight=weight, sparse=True, coalesced=True)
        return _module(table, make, learning_rate)

    return build


def theirs(make: Callable[..., torch.optim.Optimizer], *, sparse: bool) -> Build:
    def build(weight: Tensor, learning_rate: float) -> Trained:
        rows, width = weight.shape
        table = nn.Embedding(rows, width, _weight=weight, sparse=sparse)
        return _module(table, make, learning_rate)

    return build


def fbgemm(optimizer: str) -> Build:
    """FBGEMM's table, whose backward updates it."""

    def build(weight: Tensor, learning_rate: float) -> Trained:
        training = importlib.import_module(f"{FBGEMM}.split_table_batched_embeddings_ops_training")
        common = importlib.import_module(f"{FBGEMM}.split_table_batched_embeddings_ops_common")
        configs = importlib.import_module(f"{FBGEMM}.split_embedding_configs")
        table: Any = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(*weight.shape, common.EmbeddingLocation.HOST, training.ComputeDevice.CPU)],
            optimizer=getattr(configs.EmbOptimType, optimizer),
            pooling_mode=common.PoolingMode.NONE,
            learning_rate=learning_rate,
            eps=EPS,
        )
        (own,) = table.split_embedding_weights()
        own.copy_(weight)
        offsets: dict[int, Tensor] = {}

        def step(indices: Tensor, grad_output: Tensor) -> None:
            # One bag a token; a training loop has its offsets ready.
            count = indices.numel()
            if count not in offsets:
                offsets[count] = torch.arange(count + 1)
            table(indices, offsets[count]).backward(grad_output)

        return Trained(step, lambda: own.detach())

    return build


def _adagrad(of: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters, lr: of(parameters, lr=lr, eps=EPS)


ROWWISE = "row-wise Adagrad"

TRAINERS = (
    Trainer(SUBJECT, "SGD", ours(embed_ext.optim.SGD)),
    Trainer("torch, sparse", "SGD", theirs(torch.optim.SGD, sparse=True)),
    Trainer("torch, dense", "SGD", theirs(torch.optim.SGD, sparse=False), True),
    Trainer("FBGEMM, fused", "SGD", fbgemm("EXACT_SGD"), unavailable=needs(FBGEMM)),
    Trainer(SUBJECT, "Adagrad", ours(_adagrad(embed_ext.optim.Adagrad))),
    Trainer("torch, sparse", "Adagrad", theirs(_adagrad(torch.optim.Adagrad), sparse=True)),
    Trainer("torch, dense", "Adagrad", theirs(_adagrad(torch.optim.Adagrad), sparse=False), True),
    Trainer(SUBJECT, ROWWISE, ours(_adagrad(embed_ext.optim.RowwiseAdagrad))),
    Trainer("FBGEMM, fused", ROWWISE, fbgemm("EXACT_ROWWISE_ADAGRAD"), unavailable=needs(FBGEMM)),
    Trainer(SUBJECT, "Adam", ours(embed_ext.optim.Adam)),
    Trainer("torch, SparseAdam", "Adam", theirs(torch.optim.SparseAdam, sparse=True)),
    Trainer("torch, dense", "Adam", theirs(torch.optim.Adam, sparse=False), True),
)
