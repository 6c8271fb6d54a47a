"""An optimizer's updates of some rows, as the tests make and run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from embed_ext import reference
from tests.common import generator, make_table


@dataclass(frozen=True)
class Method:
    """One of the ways in which the ops update a row."""

    op: str
    states: tuple[str, ...]  # "none", "signed" and "positive" [V, D], "per row" [V]
    options: tuple[Any, ...]


METHODS: dict[str, Method] = {
    "sgd": Method("embedding_sgd_", ("none",), (0.1,)),
    "sgd, decay": Method("embedding_sgd_", ("none",), (0.1, 0.03)),
    "sgd, momentum": Method("embedding_sgd_", ("signed",), (0.1, 0.03, 0.9, 0.2)),
    "sgd, nesterov": Method("embedding_sgd_", ("signed",), (0.1, 0.0, 0.9, 0.0, True)),
    "adagrad": Method("embedding_adagrad_", ("positive",), (0.1, 0.03)),
    "row-wise adagrad": Method("embedding_adagrad_", ("per row",), (0.1, 0.03, 1e-6)),
    "adam": Method(
        "embedding_adam_", ("signed", "positive"), (0.1, 0.9, 0.99, 1e-8, 0.03, False, 3)
    ),
    "adamw": Method(
        "embedding_adam_", ("signed", "positive"), (0.1, 0.9, 0.99, 1e-8, 0.03, True, 3)
    ),
    "row-wise adam": Method(
        "embedding_adam_", ("signed", "per row"), (0.1, 0.9, 0.99, 1e-8, 0.03, True, 1)
    ),
}


@dataclass(frozen=True)
class Update:
    """The arguments of one call."""

    method: Method
    weight: Tensor  # [V, D]
    states: tuple[Tensor | None, ...]  # [V, D] or [V]
    indices: Tensor  # [U]
    values: Tensor  # [U, D]

    @property
    def written(self) -> list[Tensor]:
        """What the call changes."""
        return [self.weight, *(state for state in self.states if state is not None)]

    def map(self, f: Callable[[Tensor], Tensor]) -> Update:
        """The same of other tensors of weight, states and values."""
        states = tuple(None if state is None else f(state) for state in self.states)
        return replace(self, weight=f(self.weight), states=states, values=f(self.values))

    def clone(self) -> Update:
        """One whose call leaves this one's tensors alone."""
        return self.map(Tensor.clone)

    def wide(self) -> Update:
        """One of the same numbers in float64."""
        return self.map(lambda tensor: tensor.to(torch.float64, copy=True))

    def run(self, **options: Any) -> list[Tensor]:
        """Call the op; returns what it has written to."""
        return self._call(torch.ops.embed_ext, **options)

    def run_reference(self, **options: Any) -> list[Tensor]:
        """Run the reference in float64, and round its result once."""
        written = self.wide()._call(reference, **options)
        return [
            result.to(original.dtype)
            for result, original in zip(written, self.written, strict=True)
        ]

    def _call(self, ops: Any, **options: Any) -> list[Tensor]:
        op = getattr(ops, self.method.op)
        parts = (self.weight, *self.states, self.indices, self.values)
        op(*parts, *self.method.options, **options)
        return self.written


def make_update(
    method: Method,
    num_rows: int,
    width: int,
    count: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Update:
    """An update of `count` random rows of a table [num_rows, width]."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def make_state(kind: str) -> Tensor | None:
        if kind == "none":
            return None
        signed = make_table(num_rows, width, state_dtype, seed=seed + 1)
        if kind == "signed":
            return signed.to(device)
        positive = signed.abs() + 0.1
        return (positive if kind == "positive" else positive.sum(1) + 0.1).to(device)

    indices = torch.randperm(num_rows, generator=generator(seed))[:count].sort().values
    return Update(
        method,
        make_table(num_rows, width, dtype, device, seed=seed + 2),
        tuple(make_state(kind) for kind in method.states),
        indices.to(device),
        make_table(count, width, dtype, device, seed=seed + 3),
    )
