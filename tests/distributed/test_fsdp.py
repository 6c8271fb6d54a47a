"""fully_shard (FSDP2), alone and over tensor parallelism, next to one process without either."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embed_ext
from tests.common import make_indices, make_table
from tests.distributed.common import (
    assert_same_parameters,
    mesh,
    run_ranks,
    train,
    whole,
)

from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # isort: skip
from torch.distributed.tensor import DTensor, Replicate, Shard  # isort: skip
from torch.distributed.tensor.parallel import (  # isort: skip
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

# 10 rows do not divide evenly among 4 ranks.
NUM_ROWS, WIDTH = 10, 6
STYLES: dict[str, ParallelStyle] = {
    "rows": RowwiseParallel(input_layouts=Replicate()),
    "columns": ColwiseParallel(output_layouts=Replicate()),
}


def make_model(kind: type[nn.Embedding], **options: Any) -> nn.Sequential:
    return nn.Sequential(kind(NUM_ROWS, WIDTH, **options), nn.Linear(WIDTH, WIDTH))


def make_models(**options: Any) -> tuple[nn.Sequential, nn.Sequential]:
    theirs = make_model(nn.Embedding, **options)
    ours = make_model(embed_ext.Embedding, **options)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    return ours, theirs


def batches(part: int = 0, parts: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Three steps with batches of 8, or part of each."""
    steps = []
    for seed in range(3):
        indices = make_indices((8, 2), NUM_ROWS, seed=seed)
        target = make_table(16, WIDTH, seed=seed).view(8, 2, WIDTH)
        steps.append((indices.chunk(parts)[part], target.chunk(parts)[part]))
    return steps


def check_fsdp(options: dict[str, Any], compiled: bool) -> None:
    ours, theirs = make_models(**options)
    ranks = mesh(torch.distributed.get_world_size())
    train(theirs, batches())
    for part in (ours[0], ours):
        fully_shard(part, mesh=ranks)
    model: Any = torch.compile(ours, backend="aot_eager") if compiled else ours
    train(model, batches(ranks.get_local_rank(), ranks.size()))
    assert isinstance(ours[0].weight, DTensor)
    assert_same_parameters(ours, theirs)


@pytest.mark.parametrize("world_size", [2, 4])
def test_fsdp(world_size: int) -> None:
    run_ranks(check_fsdp, world_size, {"padding_idx": 1}, False)


@pytest.mark.slow
def test_fsdp_compiled() -> None:
    run_ranks(check_fsdp, 2, {}, True)


def check_mixed_precision() -> None:
    ours, theirs = make_models()
    fully_shard(ours, mesh=mesh(2), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    indices = make_indices((8,), NUM_ROWS)
    out = ours(indices)
    out.float().sum().backward()
    half = theirs.bfloat16()
    expected = half(indices)
    expected.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    assert ours[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(
        whole(ours[0].weight.grad), half[0].weight.grad.float(), rtol=1e-2, atol=1e-2
    )


def test_fsdp_in_bfloat16() -> None:
    run_ranks(check_mixed_precision, 2)


def check_tensor_parallel_inside(style: str) -> None:
    ours, theirs = make_models(padding_idx=1)
    train(theirs, batches())
    ranks = mesh(2, 2, names=("data", "model"))
    parallelize_module(ours, ranks["model"], {"0": STYLES[style]})
    for part in (ours[0], ours):
        fully_shard(part, mesh=ranks["data"])
    train(ours, batches(ranks["data"].get_local_rank(), 2))
    assert_same_parameters(ours, theirs)
    weight: Any = ours[0].weight
    assert weight.device_mesh.ndim == 2
    assert weight.grad.placements == weight.placements
    # Outside forward the table lies in parts of parts.
    indices = make_indices((8,), NUM_ROWS)
    placed = DTensor.from_local(indices, ranks, [Replicate(), Shard(0)])
    expected = theirs[0](torch.cat([indices, indices]))
    out = embed_ext.functional.embedding(placed, weight, padding_idx=1)
    torch.testing.assert_close(whole(out), expected)


@pytest.mark.parametrize("style", STYLES)
def test_tensor_parallel_inside_fsdp(style: str) -> None:
    run_ranks(check_tensor_parallel_inside, 4, style)
