"""Who is measured: each trainer has a table and an optimizer of its own, and takes whole steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import embed_ext
from benchmarks.lookup import needs

FBGEMM = "fbgemm_gpu"
EPS = 1e-8
# Adam moves a row alike whatever its gradient is multiplied by, unless that is small beside eps:
# only then does a table differ that was clipped otherwise.
EPS_CLIPPED = 1e-3
MOMENTUM, DECAY = 0.9, 1e-4
MAX_NORM = 1.0  # of a gradient that is far longer: it always scales


@dataclass(frozen=True)
class Step:
    """What is in a step beside `zero_grad()`, lookup, backward and update."""

    clip: bool = False  # to MAX_NORM, before the update
    uses: int = 1  # lookups, each of indices of its own; one backward has the gradients of all
    caught_up: bool = False  # rows that are not used end where a dense step takes them


PLAIN, CLIPPED, TWO_USES = Step(), Step(clip=True), Step(uses=2)
CAUGHT_UP = Step(caught_up=True)


@dataclass(frozen=True)
class Trained:
    """A table that is trained."""

    # The indices of each use [tokens], and what each gets as the gradient of its rows [tokens, D].
    step: Callable[[Sequence[Tensor], Tensor], None]
    weight: Callable[[], Tensor]  # [V, D]


Make = Callable[[Tensor, float, Step], Trained]  # of a table [V, D] and a learning rate


@dataclass(frozen=True)
class Trainer:
    """How to build one, and who it is measured beside: trainers of the same method."""

    name: str
    method: str
    make: Make
    passes_over_the_table: bool = False  # a step costs what the rows that there are cost
    step: Step = PLAIN  # of one method all have the same
    unavailable: Callable[[], str | None] = lambda: None

    @property
    def key(self) -> str:
        return f"{self.method}: {self.name}"

    def build(self, weight: Tensor, learning_rate: float) -> Trained:
        """Train this table, [V, D]."""
        return self.make(weight, learning_rate, self.step)


SUBJECT = "embed_ext"
OptimizerOf = Callable[..., torch.optim.Optimizer]


def _module(
    table: nn.Embedding,
    optimizer: torch.optim.Optimizer,
    step: Step,
    clip_grad_norm_: Callable[..., object],
    flush: Callable[[], object] = lambda: None,
) -> Trained:
    def train(uses: Sequence[Tensor], grad_output: Tensor) -> None:
        optimizer.zero_grad()
        outputs = [table(indices) for indices in uses]
        torch.autograd.backward(outputs, [grad_output] * len(outputs))
        if step.clip:
            clip_grad_norm_(table.parameters(), MAX_NORM)
        optimizer.step()

    def weight() -> Tensor:
        flush()
        return table.weight.detach()

    return Trained(train, weight)


def ours(optimizer_of: OptimizerOf) -> Make:
    def make(weight: Tensor, learning_rate: float, step: Step) -> Trained:
        rows, width = weight.shape
        table = embed_ext.Embedding(rows, width, _weight=weight, sparse=True, coalesced=True)
        optimizer = optimizer_of(table.parameters(), lr=learning_rate)
        clip = embed_ext.clip_grad_norm_
        if not step.caught_up:
            return _module(table, optimizer, step, clip)
        flush = embed_ext.optim.catch_up(optimizer, table).flush
        return _module(table, optimizer, step, clip, flush)

    return make


def theirs(optimizer_of: OptimizerOf, *, sparse: bool) -> Make:
    def make(weight: Tensor, learning_rate: float, step: Step) -> Trained:
        rows, width = weight.shape
        table = nn.Embedding(rows, width, _weight=weight, sparse=sparse)
        optimizer = optimizer_of(table.parameters(), lr=learning_rate)
        return _module(table, optimizer, step, nn.utils.clip_grad_norm_)

    return make


def fbgemm(optimizer: str) -> Make:
    """FBGEMM's table, whose backward updates it: it has no gradient to clip, or to add to."""

    def make(weight: Tensor, learning_rate: float, step: Step) -> Trained:
        assert step == PLAIN
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

        def train(uses: Sequence[Tensor], grad_output: Tensor) -> None:
            (indices,) = uses
            # One bag a token; a training loop has its offsets ready.
            count = indices.numel()
            if count not in offsets:
                offsets[count] = torch.arange(count + 1)
            table(indices, offsets[count]).backward(grad_output)

        return Trained(train, lambda: own.detach())

    return make


def _adagrad(of: Any) -> OptimizerOf:
    return partial(of, eps=EPS)


def _with_momentum(of: Any) -> OptimizerOf:
    return partial(of, momentum=MOMENTUM, weight_decay=DECAY)


def _adam_clipped(of: Any) -> OptimizerOf:
    return partial(of, eps=EPS_CLIPPED)


ROWWISE = "row-wise Adagrad"
ADAM_CLIPPED, SGD_TWO_USES = "Adam, clipped", "SGD, two uses"
SGD_CAUGHT_UP = "SGD with momentum and decay, caught up"

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
    # SparseAdam is not among these: it adds eps elsewhere, which shows where eps is not small.
    Trainer(SUBJECT, ADAM_CLIPPED, ours(_adam_clipped(embed_ext.optim.Adam)), step=CLIPPED),
    Trainer(
        "torch, dense",
        ADAM_CLIPPED,
        theirs(_adam_clipped(torch.optim.Adam), sparse=False),
        True,
        step=CLIPPED,
    ),
    Trainer(SUBJECT, SGD_TWO_USES, ours(embed_ext.optim.SGD), step=TWO_USES),
    Trainer("torch, sparse", SGD_TWO_USES, theirs(torch.optim.SGD, sparse=True), step=TWO_USES),
    Trainer(
        "torch, dense", SGD_TWO_USES, theirs(torch.optim.SGD, sparse=False), True, step=TWO_USES
    ),
    Trainer(SUBJECT, SGD_CAUGHT_UP, ours(_with_momentum(embed_ext.optim.SGD)), step=CAUGHT_UP),
    Trainer(
        "torch, dense",
        SGD_CAUGHT_UP,
        theirs(_with_momentum(torch.optim.SGD), sparse=False),
        True,
        step=CAUGHT_UP,
    ),
)
