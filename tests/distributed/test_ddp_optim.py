"""embed_ext.optim under DistributedDataParallel: sparse gradients that the processes average."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import embed_ext
from embed_ext import optim
from tests.common import assert_close, assert_same_bits, make_indices, make_table
from tests.distributed.common import my_share, run_ranks

NUM_ROWS, WIDTH, STEPS = 50, 4, 4
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.5, "momentum": 0.9}),
    "SGD, catching up": (optim.SGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}),
    "RowwiseAdagrad": (optim.RowwiseAdagrad, {"lr": 0.1}),
    "AdamW": (optim.AdamW, {"lr": 0.1}),
}


class Model(nn.Module):
    """Two lookups of a table, of which one is weighted by a layer; indices [B] -> [B, D]."""

    def __init__(self, coalesced: bool) -> None:
        super().__init__()
        self.table = embed_ext.Embedding(NUM_ROWS, WIDTH, sparse=True, coalesced=coalesced)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, indices: Tensor) -> Tensor:
        gate: Tensor = self.layer(self.table(indices)).sigmoid()
        return gate * self.table((indices + 1) % NUM_ROWS)


def loss_of(model: nn.Module, indices: Tensor, target: Tensor) -> Tensor:
    """indices [B], target [B, D]"""
    loss: Tensor = (model(indices) - target).square().mean()
    return loss


def clipped_step(model: nn.Module, optimizer: Optimizer) -> Tensor:
    """Return the norm before clipping."""
    norm = embed_ext.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    return norm


def everybodys(tensor: Tensor) -> list[Tensor]:
    """What each process has of a tensor of one shape."""
    all_of_them = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, tensor.detach())
    return all_of_them


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Indices [B] of some rows, of which few are in more than one share, and a target [B, D]."""
    return make_indices((16,), NUM_ROWS, seed=step), make_table(16, WIDTH, seed=step)


def check_steps(name: str, coalesced: bool, micro_batches: int) -> None:
    kind, options = OPTIMIZERS[name]
    single = Model(coalesced)
    ours = copy.deepcopy(single)
    parallel = DistributedDataParallel(ours)
    optimizers = [kind(model.parameters(), **options) for model in (parallel, single)]
    if name == "SGD, catching up":
        for each, model in zip(optimizers, (parallel, single), strict=True):
            optim.catch_up(each, model)
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        indices, target = batch(step)
        parts = [my_share(whole).chunk(micro_batches) for whole in (indices, target)]
        for i, part in enumerate(zip(*parts, strict=True)):
            with nullcontext() if i + 1 == micro_batches else parallel.no_sync():
                loss_of(parallel, *part).div(micro_batches).backward()
        loss_of(single, indices, target).backward()
        norm, wanted = clipped_step(parallel, optimizers[0]), clipped_step(single, optimizers[1])
        assert wanted > 0.05
        assert_close(norm, wanted)
        assert ours.table.weight.grad.is_sparse and ours.table.weight.grad.is_coalesced()
        for mine, expected in zip(ours.parameters(), single.parameters(), strict=True):
            for theirs in everybodys(mine):
                assert_same_bits(theirs, mine)
            assert_close(mine.detach(), expected.detach())


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tables_of_all_processes_are_one(name: str, coalesced: bool) -> None:
    run_ranks(check_steps, 2, name, coalesced, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_micro_batches_of_which_the_last_is_averaged(name: str) -> None:
    run_ranks(check_steps, 2, name, True, 2)


def check_step_in_backward() -> None:
    parallel = DistributedDataParallel(Model(coalesced=True))
    optim.step_in_backward(optim.SGD(parallel.parameters(), lr=0.1))
    indices, target = batch(0)
    with pytest.raises(RuntimeError, match="Expected sparse gradient to be defined"):
        loss_of(parallel, my_share(indices), my_share(target)).backward()


def test_a_gradient_that_step_in_backward_has_taken_is_missed() -> None:
    run_ranks(check_step_in_backward, 2)
