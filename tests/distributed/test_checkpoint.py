"""torch.distributed.checkpoint: four ranks save a sharded table, two ranks or one load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import embed_ext
from tests.common import make_indices, make_table
from tests.distributed.common import mesh, place, run_ranks, whole

from torch.distributed.checkpoint.state_dict_loader import load  # isort: skip
from torch.distributed.checkpoint.state_dict_saver import save  # isort: skip
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard  # isort: skip

NUM_ROWS, WIDTH = 10, 5


def make_trained(of_weight: Placement, steps: int) -> dict[str, Any]:
    """A sharded table and its optimizer after some steps."""
    ranks = mesh(dist.get_world_size())
    table = embed_ext.Embedding(NUM_ROWS, WIDTH, device="meta")
    table.weight = nn.Parameter(place(make_table(NUM_ROWS, WIDTH), ranks, of_weight))
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
    for seed in range(steps):
        optimizer.zero_grad()
        out: Any = table(place(make_indices((6,), NUM_ROWS, seed=seed), ranks, Replicate()))
        whole(out.square().sum()).backward()
        optimizer.step()
    return {"table": table, "optimizer": optimizer}


def contents(parts: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": parts["table"].state_dict(),
        "sums": parts["optimizer"].state[parts["table"].weight]["sum"],
    }


def save_trained(path: str) -> None:
    save(contents(make_trained(Shard(0), steps=3)), checkpoint_id=path)


def check_load(path: str, of_weight: Placement) -> None:
    expected = contents(make_trained(Shard(0), steps=3))
    state = contents(make_trained(of_weight, steps=1))
    weight = state["model"]["weight"]
    assert not torch.equal(whole(weight), whole(expected["model"]["weight"]))
    load(state, checkpoint_id=path)
    assert isinstance(weight, DTensor) and weight.placements == (of_weight,)
    torch.testing.assert_close(whole(weight), whole(expected["model"]["weight"]))
    torch.testing.assert_close(whole(state["sums"]), whole(expected["sums"]))


def check_load_into_one_table(path: str) -> None:
    expected = whole(make_trained(Shard(0), steps=3)["table"].weight.detach())
    for kind in (nn.Embedding, embed_ext.Embedding):
        table = kind(NUM_ROWS, WIDTH)
        load({"model": table.state_dict()}, checkpoint_id=path)
        torch.testing.assert_close(table.weight.detach(), expected)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks saved, each the rows that it has."""
    path: Path = tmp_path_factory.mktemp("checkpoint")
    run_ranks(save_trained, 4, str(path))
    return path


@pytest.mark.parametrize("of_weight", [Shard(0), Shard(1), Replicate()], ids=str)
def test_two_ranks_load_what_four_saved(checkpoint: Path, of_weight: Placement) -> None:
    run_ranks(check_load, 2, str(checkpoint), of_weight)


def test_one_rank_loads_what_four_saved(checkpoint: Path) -> None:
    run_ranks(check_load_into_one_table, 1, str(checkpoint))
