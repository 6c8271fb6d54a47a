"""What tests of training with sparse gradients share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import embed_ext
from tests.common import assert_close


def with_sparse_gradients(model: nn.Module) -> list[embed_ext.Embedding]:
    """Convert the model; its tables, whose gradients have the rows in use from here on."""
    embed_ext.convert(model)
    tables = [module for module in model.modules() if isinstance(module, embed_ext.Embedding)]
    for table in tables:
        table.sparse, table.coalesced = True, True
    assert tables
    return tables


@contextmanager
def steps() -> Iterator[list[Any]]:
    """Notes, of each step within, the optimizer's class and the layouts of its gradients."""
    seen: list[Any] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append((type(optimizer), tuple(p.grad.layout for p in parameters)))

    handle = register_optimizer_step_post_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def assert_same_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(actual.detach(), expected.detach())
