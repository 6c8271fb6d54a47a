"""Adagrad, and its form with one number of state a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from embed_ext.optim._row_step import RowOptimizer, RowStep
from embed_ext.optim._state import is_low_precision_table, lazy_zeros, step_of

__all__ = ["Adagrad", "RowwiseAdagrad"]


class Adagrad(RowOptimizer, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` that steps tables with sparse gradients by their rows in use.

    Parameters with a dense gradient go to torch's implementation, `foreach` and `fused` included.
    Sparse gradients (COO, one sparse and one dense dimension, coalesced or not) of tables of shape
    ``(V, D)`` and dtype float32, float64, bfloat16 or float16 are taken in one pass over the rows
    that they name.

    **Lazy.** A row that the gradient does not name stays as it is. Without `weight_decay` that is
    what torch's optimizer does too, for dense and for sparse gradients. With `weight_decay` (which
    torch refuses for sparse gradients) only rows in use decay. `lr_decay` counts the steps of the
    table.

    The state of a parameter is torch's, `step` and `sum`, but made at its first step and not by the
    constructor. `sum` is float32 for bfloat16 and float16 tables, of which rows are computed in
    float32 and rounded once. State dicts of torch's class load here, and those of this class load
    there.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps: as torch's.
        foreach, maximize, differentiable, fused: as torch's; tables with a sparse gradient are
            refused under `differentiable`.
        stochastic_rounding: round the new rows of bfloat16 and float16 tables with sparse gradients
            up or down at random, so that their mean is the number that is rounded and small updates
            are not lost.
        seed: of that; each table and each step draws other numbers, a resumed run the same ones.

    Raises:
        RuntimeError: at ``step()``, before anything is changed, for a sparse gradient that cannot
            be taken.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(10, 2, sparse=True, _weight=torch.ones(10, 2))
        >>> optimizer = embed_ext.optim.Adagrad(table.parameters(), lr=0.5)
        >>> table(torch.tensor([1, 4, 4])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[table.weight]["sum"][:5, 0].tolist()
        [0.0, 1.0, 0.0, 0.0, 4.0]
    """

    _row_states = ("sum",)
    _per_row = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        # torch's constructor makes the state of every parameter, so it is given an empty one. It
        # checks the options and makes the defaults, and its base then takes the parameters.
        super().__init__(
            [torch.empty(0)],
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        Optimizer.__init__(self, params, self.defaults)
        self._set_row_options(stochastic_rounding, seed)

    def _row_options(self, group: dict[str, Any]) -> dict[str, Any]:
        numbers = ("lr", "lr_decay", "weight_decay", "eps")
        return {**{name: float(group[name]) for name in numbers}, "maximize": group["maximize"]}

    def _step_rows(self, step: RowStep) -> dict[str, Any]:
        state, options = dict(self.state.get(step.table, {})), step.options
        count = step_of(state) + 1
        total = self._sum_of(step.table)
        options["lr"] /= 1 + (int(count) - 1) * options.pop("lr_decay")
        torch.ops.embed_ext.embedding_adagrad_(
            step.table,
            total,
            step.indices,
            step.values,
            **options,
            seed=step.seed(int(count)),
            coalesced=step.coalesced,
        )
        return {**state, "step": count, "sum": total}

    def _never_caught_up(self, group: dict[str, Any]) -> str | None:
        if group["weight_decay"] == 0:
            return None
        return (
            "rows cannot catch up on weight decay that passes through the sum; expected "
            f"weight_decay=0, but got {group['weight_decay']}"
        )

    def _step_dense(self) -> None:
        # Up to version 2.11 torch's step expects what torch's constructor has made.
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state.get(parameter):
                    self.state[parameter] = self._made_by_torch(parameter, group)
        super()._step_dense()

    def _made_by_torch(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        initial = self.defaults["initial_accumulator_value"]
        made = torch.optim.Adagrad(
            [parameter], initial_accumulator_value=initial, fused=group["fused"]
        )
        state: dict[str, Any] = made.state[parameter]
        return state

    def _sum_of(self, table: Tensor) -> Tensor:
        if "sum" in self.state.get(table, {}):
            return self._row_state(table, "sum")
        total = lazy_zeros(table, self._per_row)
        initial = self.defaults["initial_accumulator_value"]
        return total.fill_(initial) if initial != 0 else total

    def share_memory(self) -> None:
        """Move the sums to shared memory; parameters that had no step yet get theirs now."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state.get(parameter):
                    self.state[parameter] = self._first_state(parameter, group)
        super().share_memory()

    def _first_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        # Beside low precision one that serves both steps.
        state = self._made_by_torch(parameter, group)
        if is_low_precision_table(parameter):
            state["sum"] = self._sum_of(parameter)
        return state


class RowwiseAdagrad(Adagrad):
    """Adagrad with one number of state a row of a table, in place of one an element.

    The sum of a row is that of the means over the row of its squared gradients, and all of the row
    is divided by its root (EXACT_ROWWISE_ADAGRAD in FBGEMM's documentation): a table's state takes
    4 bytes a row (8 of a float64 table). It is for tables with sparse gradients; everything else,
    and all that is said of :class:`Adagrad`, is as there.

    **Lazy.** A row that the gradient does not name stays as it is. Without `weight_decay` a step
    with the dense gradient would not change such a row either.

    The state of a table is `step` and `sum`, shape ``(V)``, float32 or float64. Gradients of a
    table that has it may also be dense: then all rows are in use. A table whose first gradient was
    dense has torch's ``(V, D)``, and keeps it. State dicts that torch's class saved load here, with
    the sums that they have.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach: as Adagrad's.
        maximize, differentiable, fused, stochastic_rounding, seed: as Adagrad's.

    Raises:
        RuntimeError: as Adagrad; and at ``share_memory()``, while a parameter of two dimensions has
            had no step, for it may or may not be a table with sparse gradients.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(10, 2, sparse=True, _weight=torch.ones(10, 2))
        >>> optimizer = embed_ext.optim.RowwiseAdagrad(table.parameters(), lr=0.5)
        >>> table(torch.tensor([1, 4, 4])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[table.weight]["sum"][:5].tolist()
        [0.0, 1.0, 0.0, 0.0, 4.0]
    """

    _per_row = True

    def _first_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if parameter.dim() == 2:
            raise RuntimeError(
                "embed_ext.optim.RowwiseAdagrad: share_memory() expected all parameters of two "
                f"dimensions to have had a step, but one of shape {tuple(parameter.shape)} has not"
            )
        return super()._first_state(parameter, group)
