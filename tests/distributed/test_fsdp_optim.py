"""embed_ext.optim beside fully_shard: dense tables that are sharded, sparse ones that are not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import embed_ext
from embed_ext import optim
from tests.common import assert_close, assert_same_bits
from tests.distributed.common import mesh, my_share, run_ranks, whole
from tests.distributed.test_fsdp import NUM_ROWS, batches, make_model

from torch.distributed.fsdp import fully_shard  # isort: skip
from torch.distributed.tensor import DTensor  # isort: skip

DENSE: list[tuple[Any, Any, dict[str, Any]]] = [
    (optim.AdamW, torch.optim.AdamW, {"lr": 0.1}),
    (optim.AdamW, torch.optim.AdamW, {"lr": 0.1, "foreach": False}),
    (optim.AdamW, torch.optim.AdamW, {"lr": 0.1, "fused": True}),
    (optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (optim.RowwiseAdagrad, torch.optim.Adagrad, {"lr": 0.1}),
    (optim.RowwiseAdam, torch.optim.Adam, {"lr": 0.1}),
]


def train_sharded(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """A sharded model, and what its optimizer keeps, which is a new one after the first step."""
    torch.manual_seed(0)
    model = make_model(embed_ext.Embedding).to(dtype)
    for part in (model[0], model):
        fully_shard(part, mesh=mesh(2))
    optimizer = kind(model.parameters(), **options)
    for step, (indices, target) in enumerate(batches()):
        optimizer.zero_grad()
        (model(my_share(indices)) - my_share(target)).square().mean().backward()
        embed_ext.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if step == 0:
            saved = copy.deepcopy(optimizer.state_dict())
            for state in saved["state"].values():  # torch makes them what the parameter is
                state.update({key: value.float() for key, value in state.items()})
            optimizer = kind(model.parameters(), **options)
            optimizer.load_state_dict(saved)
    return model, optimizer.state


def check_dense_tables() -> None:
    for kind, torchs, options in DENSE:
        for dtype in (torch.float32, torch.bfloat16):
            ours, states = train_sharded(kind, options, dtype)
            theirs, expected = train_sharded(torchs, options, dtype)
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert isinstance(mine, DTensor)
                assert_same_bits(whole(mine), whole(other))
                assert states[mine].keys() == expected[other].keys()
                for key, state in states[mine].items():
                    assert_same_bits(whole(state), whole(expected[other][key]))


def test_dense_tables_are_torchs_bit_by_bit() -> None:
    run_ranks(check_dense_tables, 2)


def check_state_of_rows() -> None:
    """As of one process, which trained with sparse gradients, and whose state is loaded."""
    model = make_model(embed_ext.Embedding)
    fully_shard(model, mesh=mesh(2))
    optimizer = optim.RowwiseAdagrad(model.parameters())
    saved = optimizer.state_dict()
    saved["state"] = {0: {"step": torch.tensor(3.0), "sum": torch.ones(NUM_ROWS)}}
    optimizer.load_state_dict(saved)
    (indices, _), *_ = batches()
    model(indices).sum().backward()
    before = [whole(parameter.detach()).clone() for parameter in model.parameters()]
    message = r"RowwiseAdagrad: its weight is of type DTensor.*\(the gradient of parameter 0 of"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(whole(parameter), old)


def test_a_state_of_rows_is_refused_for_a_table_that_is_shared_out() -> None:
    run_ranks(check_state_of_rows, 2)


def check_sparse_gradient(kind: type[nn.Embedding]) -> None:
    model = make_model(kind, sparse=True)
    fully_shard(model, mesh=mesh(2))
    (indices, target), *_ = batches()
    with pytest.raises(NotImplementedError, match="fsdp::chunk_cat.*'SparseCPU' backend"):
        (model(indices) - target).square().mean().backward()


def test_torch_refuses_to_share_out_a_sparse_gradient() -> None:
    for kind in (nn.Embedding, embed_ext.Embedding):
        run_ranks(check_sparse_gradient, 2, kind)


def check_a_table_that_is_left_out(coalesced: bool) -> None:
    """Its processes have one each, and the gradients of these are averaged by hand."""
    single = make_model(embed_ext.Embedding, sparse=True, coalesced=coalesced)
    model = copy.deepcopy(single)
    table: Any = model[0].weight
    fully_shard(model, mesh=mesh(2), ignored_params={table})
    assert not isinstance(table, DTensor) and isinstance(model[1].weight, DTensor)
    optimizers = [optim.AdamW(each.parameters(), lr=0.1) for each in (model, single)]
    for indices, target in batches():
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(my_share(indices)) - my_share(target)).square().mean().backward()
        dist.all_reduce(table.grad)
        table.grad /= dist.get_world_size()
        (single(indices) - target).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        for mine, other in zip(model.parameters(), single.parameters(), strict=True):
            assert_close(whole(mine.detach()), other.detach())
        everybodys = [torch.empty_like(table) for _ in range(2)]
        dist.all_gather(everybodys, table.detach())
        assert_same_bits(*everybodys)


@pytest.mark.parametrize("coalesced", [True, False])
def test_a_sparse_table_that_is_left_out(coalesced: bool) -> None:
    run_ranks(check_a_table_that_is_left_out, 2, coalesced)
