"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from embed_ext.optim._missed_steps import Matrix
from embed_ext.optim._row_step import RowOptimizer, RowStep
from embed_ext.optim._state import step_of

__all__ = ["SGD"]


class SGD(RowOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` that steps tables with sparse gradients by their rows in use.

    Parameters with a dense gradient go to torch's implementation, `foreach` and `fused` included.
    Sparse gradients (COO, one sparse and one dense dimension, coalesced or not) of tables of shape
    ``(V, D)`` and dtype float32, float64, bfloat16 or float16 are taken in one pass over the rows
    that they name.

    **Lazy.** A row that the gradient does not name stays as it is, and so does its momentum.
    Without `momentum` and `weight_decay` that is what torch's optimizer does too. With
    `weight_decay` (which torch refuses for sparse gradients) only rows in use decay; with
    `momentum`, torch moves every row by its momentum at each step, here a row moves, and its
    momentum fades, when it is used. In both cases the steps are the same where every step uses all
    rows, and with :func:`catch_up` always.

    The state of a table is torch's, `momentum_buffer`, made at its first step with momentum. It is
    float32 for bfloat16 and float16 tables, of which rows are computed in float32 and rounded once.
    State dicts of torch's class load here, and those of this class load there.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov: as torch's.
        maximize, foreach, differentiable, fused: as torch's; tables with a sparse gradient are
            refused under `differentiable`.
        stochastic_rounding: round the new rows of bfloat16 and float16 tables with sparse gradients
            up or down at random, so that their mean is the number that is rounded and small updates
            are not lost. The
            state of such a table counts its steps in `step`.
        seed: of that; each table and each step draws other numbers, a resumed run the same ones.

    Raises:
        RuntimeError: at ``step()``, before anything is changed, for a sparse gradient that cannot
            be taken.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(10, 2, sparse=True, _weight=torch.ones(10, 2))
        >>> optimizer = embed_ext.optim.SGD(table.parameters(), lr=0.5, momentum=0.9)
        >>> table(torch.tensor([1, 4, 4])).sum().backward()
        >>> optimizer.step()
        >>> table.weight[:5, 0].tolist()
        [1.0, 0.5, 1.0, 1.0, 0.0]
    """

    _row_states = ("momentum_buffer",)
    _carried_state = "momentum_buffer"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_row_options(stochastic_rounding, seed)

    def _row_options(self, group: dict[str, Any]) -> dict[str, Any]:
        numbers = ("lr", "weight_decay", "momentum", "dampening")
        return {
            **{name: float(group[name]) for name in numbers},
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
        }

    def _step_rows(self, step: RowStep) -> dict[str, Any]:
        state, options = dict(self.state.get(step.table, {})), step.options
        buffer = None
        if options["momentum"] != 0:
            buffer = self._row_state(step.table, "momentum_buffer")
            if state.get("momentum_buffer") is None:
                options["dampening"] = 0.0
        count = step_of(state) + 1
        torch.ops.embed_ext.embedding_sgd_(
            step.table,
            buffer,
            step.indices,
            step.values,
            **options,
            seed=step.seed(int(count)),
            coalesced=step.coalesced,
        )
        if buffer is not None:
            state["momentum_buffer"] = buffer
        if step.stochastic:
            state["step"] = count
        return state

    def _step_of_unused_rows(self, step: RowStep) -> Matrix:
        options = step.options
        lr, decay, momentum = options["lr"], options["weight_decay"], options["momentum"]
        if momentum == 0:
            return (1 - lr * decay, 0.0), (0.0, 1.0)
        first = self.state.get(step.table, {}).get("momentum_buffer") is None
        undamped = 1.0 if first else 1 - options["dampening"]
        buffer = undamped * decay, momentum
        moved = buffer
        if options["nesterov"]:
            moved = decay + momentum * buffer[0], momentum * buffer[1]
        return (1 - lr * moved[0], -lr * moved[1]), buffer
