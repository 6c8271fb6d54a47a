"""parallelize_module: the styles of tensor parallelism, eager and compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import embed_ext
from tests.common import make_indices, make_table
from tests.distributed.common import assert_same_parameters, mesh, run_ranks, whole

from torch.distributed.tensor import DTensor, Replicate, Shard  # isort: skip
from torch.distributed.tensor.parallel import (  # isort: skip
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

NUM_ROWS, WIDTH = 10, 8

# The layout of the batch [B, T] that a rank passes, of the result [B, T, D] that it gets, and the
# style between them.
STYLES: dict[str, tuple[Replicate | Shard, Replicate | Shard, ParallelStyle]] = {}
for _into, _out_of in (
    (Replicate(), Replicate()),
    (Replicate(), Shard(-1)),
    (Replicate(), Shard(1)),  # sequence parallelism
    (Shard(1), Shard(1)),
    (Shard(0), Shard(0)),
    (Shard(0), Replicate()),
):
    for _style in (RowwiseParallel, ColwiseParallel):
        STYLES[f"{_style.__name__} {_into} {_out_of}"] = (
            _into,
            _out_of,
            _style(input_layouts=_into, output_layouts=_out_of),
        )


def part(tensor: torch.Tensor, layout: Replicate | Shard) -> torch.Tensor:
    if isinstance(layout, Replicate):
        return tensor
    ranks = torch.distributed.get_world_size()
    return tensor.chunk(ranks, layout.dim)[torch.distributed.get_rank()]


def check_styles(names: list[str], backend: str | None) -> None:
    for name in names:
        into, out_of, style = STYLES[name]
        theirs = nn.Embedding(NUM_ROWS, WIDTH, padding_idx=1)
        ours = embed_ext.Embedding(NUM_ROWS, WIDTH, padding_idx=1)
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        parallelize_module(ours, mesh(torch.distributed.get_world_size()), style)
        model: Any = ours
        if backend is not None:
            torch._dynamo.reset()
            model = torch.compile(nn.Sequential(ours), backend=backend, fullgraph=True)
        for seed, length in enumerate((12, 16, 20)):  # the second compilation has symbolic sizes
            indices = make_indices((4, length), NUM_ROWS, seed=seed)
            expected = theirs(indices)
            out = model(part(indices, into))
            assert torch.equal(out, part(expected, out_of)), name
            grad = make_table(4 * length, WIDTH, seed=seed).view(4, length, WIDTH)
            expected.backward(grad)
            out.backward(part(grad, out_of))
        grad_weight = ours.weight.grad
        assert isinstance(grad_weight, DTensor) and isinstance(ours.weight, DTensor)
        assert grad_weight.placements == ours.weight.placements, name
        torch.testing.assert_close(whole(grad_weight), theirs.weight.grad, msg=name)


@pytest.mark.parametrize("world_size", [2, 4])
def test_styles(world_size: int) -> None:
    run_ranks(check_styles, world_size, list(STYLES), None)


@pytest.mark.slow
def test_styles_compiled() -> None:
    run_ranks(check_styles, 2, list(STYLES)[4:10], "aot_eager")


@pytest.mark.slow
def test_styles_compiled_by_inductor() -> None:
    run_ranks(check_styles, 2, list(STYLES)[:2], "inductor")


class Block(nn.Module):
    """Tokens to scores, as a language model begins and ends: [B, T] -> [B, T, V]."""

    def __init__(self, kind: type[nn.Embedding]) -> None:
        super().__init__()
        self.table = kind(NUM_ROWS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, NUM_ROWS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, T] -> scores [B, T, V]"""
        scores: torch.Tensor = self.down(torch.relu(self.up(self.norm(self.table(tokens)))))
        return scores


def check_block() -> None:
    theirs, ours = Block(nn.Embedding), Block(embed_ext.Embedding)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    plan = {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(),
    }
    parallelize_module(ours, mesh(2), plan)
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for seed in range(3):
            tokens = make_indices((4, 6), NUM_ROWS, seed=seed)
            optimizer.zero_grad()
            scores = model(tokens)
            nn.functional.cross_entropy(scores.flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
    assert_same_parameters(ours, theirs)


def test_a_block_with_sequence_parallelism() -> None:
    run_ranks(check_block, 2)


def check_tied() -> None:
    """One table sharded by rows for both ends of a model."""
    ranks = mesh(2)
    theirs, ours = nn.Embedding(NUM_ROWS, WIDTH), embed_ext.Embedding(NUM_ROWS, WIDTH)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    parallelize_module(
        ours, ranks, RowwiseParallel(input_layouts=Replicate(), use_local_output=False)
    )
    tokens = make_indices((4, 6), NUM_ROWS)
    for table in (theirs, ours):
        scores = nn.functional.linear(table(tokens), table.weight)
        whole(scores).square().mean().backward()
    torch.testing.assert_close(whole(ours.weight.grad), theirs.weight.grad)


def test_tied_weights() -> None:
    run_ranks(check_tied, 2)


def check_converted() -> None:
    table = nn.Embedding(NUM_ROWS, WIDTH)
    expected = copy.deepcopy(table)
    style = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(table, mesh(torch.distributed.get_world_size()), style)
    indices = make_indices((4, 6), NUM_ROWS, seed=0)
    with embed_ext.routed():
        assert torch.equal(table(indices), expected(indices))
    report = embed_ext.convert(table)
    assert len(report.swapped) == 1, report
    out = table(indices)
    assert torch.equal(out, expected(indices))
    out.sum().backward()
    expected(indices).sum().backward()
    torch.testing.assert_close(whole(table.weight.grad), expected.weight.grad)


def test_a_sharded_table_can_be_converted() -> None:
    run_ranks(check_converted, 2)
