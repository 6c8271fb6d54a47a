"""DistributedDataParallel: the same parameters as one process that sees the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import embed_ext
from tests.common import make_indices, make_table
from tests.distributed.common import assert_same_parameters, my_share, run_ranks, train

NUM_ROWS, WIDTH = 12, 4
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the table, of DDP
    "plain": ({}, {}),
    "static_graph": ({}, {"static_graph": True}),
    "bucket_view": ({}, {"gradient_as_bucket_view": True}),
    "padding": ({"padding_idx": 0}, {}),
    "sparse": ({"sparse": True}, {}),
    "unused": ({}, {"find_unused_parameters": True}),
    "kept": ({}, {}),
    "kept bucket_view": ({}, {"gradient_as_bucket_view": True}),
}


class TwoTables(nn.Module):
    """The sum of two lookups; what the second is asked for may be nothing."""

    def __init__(self, kind: type[nn.Embedding], **options: Any) -> None:
        super().__init__()
        self.first = kind(NUM_ROWS, WIDTH, **options)
        self.second = kind(NUM_ROWS, WIDTH, **options)
        self.use_second = True

    def forward(self, indices: Tensor) -> Tensor:
        """indices [B] -> [B, D]"""
        out: Tensor = self.first(indices)
        return out + self.second(indices) if self.use_second else out


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (make_indices((8,), NUM_ROWS, seed=step), make_table(8, WIDTH, seed=step))
        for step in range(count)
    ]


def check_ddp(way: str) -> None:
    table_options, options = WAYS[way]
    theirs = TwoTables(nn.Embedding, **table_options)
    ours = TwoTables(embed_ext.Embedding, **table_options)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    ours.use_second = theirs.use_second = way != "unused"
    for table in (ours.first, ours.second):
        assert isinstance(table, embed_ext.Embedding)
        table.keep_grad_buffer = way.startswith("kept")
    # What the other processes add to the gradient must not be there in the next step.
    embed_ext.set_verify_kept_gradients(True)
    train(theirs, batches(3))
    parallel = DistributedDataParallel(ours, **options)
    train(parallel, [(my_share(indices), my_share(target)) for indices, target in batches(3)])
    assert_same_parameters(parallel, theirs)
    if table_options.get("sparse"):
        assert ours.first.weight.grad.is_sparse
    if way == "unused":
        assert ours.second.weight.grad is None


@pytest.mark.parametrize("way", WAYS)
def test_ddp(way: str) -> None:
    run_ranks(check_ddp, 2, way)


def test_ddp_on_four_ranks() -> None:
    run_ranks(check_ddp, 4, "plain")


def check_many_reductions() -> None:
    table = embed_ext.Embedding(50, WIDTH, sparse=True, coalesced=True)
    parallel = DistributedDataParallel(table)
    for step in range(3000):
        parallel.zero_grad()
        parallel(make_indices((30,), 50, seed=step)).square().sum().backward()
    assert table.weight.grad is not None


def test_a_gradient_is_not_marked_while_it_is_reduced() -> None:
    """The thread that reduces coalesces it, and dies of a mark that comes meanwhile."""
    run_ranks(check_many_reductions, 1)


def check_compiled() -> None:
    theirs, ours = nn.Embedding(NUM_ROWS, WIDTH), embed_ext.Embedding(NUM_ROWS, WIDTH)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(theirs, batches(3))
    parallel = torch.compile(DistributedDataParallel(ours), backend="aot_eager")
    train(parallel, [(my_share(indices), my_share(target)) for indices, target in batches(3)])
    assert_same_parameters(ours, theirs)


@pytest.mark.slow
def test_compiled_ddp() -> None:
    run_ranks(check_compiled, 2)
