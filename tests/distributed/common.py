"""Run a check in several processes that form a gloo group on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import forkserver

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch is built without gloo", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor


def _work(rank: int, check: Callable[..., None], world_size: int, path: str, args: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    try:
        check(*args)
    finally:
        dist.destroy_process_group()


def run_ranks(check: Callable[..., None], world_size: int, *args: Any) -> None:
    """Call check(*args) in each of `world_size` processes; the first error of one is raised here.

    The check is a function of a module, and its arguments can be pickled. All processes start from
    the same random numbers.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder) / "rendezvous")
        context = forkserver.start(_work, (check, world_size, rendezvous, args), world_size)
        while not context.join():
            pass


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh of the processes, in one dimension or more."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def place(tensor: Tensor, ranks: DeviceMesh, *placements: Placement) -> DTensor:
    """A tensor that every rank has, as a DTensor; the last placement is for all further dims."""
    placements += placements[-1:] * (ranks.ndim - len(placements))
    return distribute_tensor(tensor, ranks, placements)


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, on each rank; a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def my_share(batch: Tensor) -> Tensor:
    """This rank's part of a batch [B, ...], B a multiple of the number of ranks."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def train(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], lr: float = 0.5) -> None:
    """SGD on the mean square of what the model gives less what it should."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for inputs, target in batches:
        optimizer.zero_grad()
        (model(inputs) - target).square().mean().backward()
        optimizer.step()


def assert_same_parameters(actual: nn.Module, expected: nn.Module) -> None:
    """Compare name by name, all of what is sharded; DDP's prefix of the names does not count."""
    wanted = {name: parameter.detach() for name, parameter in expected.named_parameters()}
    for name, parameter in actual.named_parameters():
        name = name.removeprefix("module.")
        torch.testing.assert_close(whole(parameter.detach()), wanted.pop(name), msg=name)
    assert not wanted
