"""Adam and AdamW, and their form with one second moment a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from embed_ext.optim._missed_steps import Matrix
from embed_ext.optim._row_step import RowOptimizer, RowStep
from embed_ext.optim._state import step_of

__all__ = ["Adam", "AdamW", "RowwiseAdam"]


class _AdamRows(RowOptimizer):
    """The step of rows that Adam, AdamW and RowwiseAdam have in common."""

    _row_states = ("exp_avg", "exp_avg_sq")
    _per_row = False

    def _row_options(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            **{name: float(group[name]) for name in ("lr", "eps", "weight_decay")},
            "beta1": float(beta1),
            "beta2": float(beta2),
            "decoupled": group["decoupled_weight_decay"],
            "maximize": group["maximize"],
        }

    def _step_rows(self, step: RowStep) -> dict[str, Any]:
        state = dict(self.state.get(step.table, {}))
        count = step_of(state) + 1
        exp_avg = self._row_state(step.table, "exp_avg")
        exp_avg_sq = self._row_state(step.table, "exp_avg_sq", self._per_row)
        torch.ops.embed_ext.embedding_adam_(
            step.table,
            exp_avg,
            exp_avg_sq,
            step.indices,
            step.values,
            **step.options,
            step=int(count),
            seed=step.seed(int(count)),
            coalesced=step.coalesced,
        )
        return {**state, "step": count, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def _step_of_unused_rows(self, step: RowStep) -> Matrix:
        # Moments stay what they are.
        return (1 - step.options["lr"] * step.options["weight_decay"], 0.0), (0.0, 1.0)

    def _never_caught_up(self, group: dict[str, Any]) -> str | None:
        if group["weight_decay"] == 0 or group["decoupled_weight_decay"]:
            return None
        return (
            "rows cannot catch up on weight decay that passes through moments; expected "
            f"decoupled_weight_decay=True or weight_decay=0, but got {group['weight_decay']}"
        )


class Adam(_AdamRows, torch.optim.Adam):
    """``torch.optim.Adam`` that steps tables with sparse gradients by their rows in use.

    torch's own Adam refuses sparse gradients, and its SparseAdam refuses dense ones; here a model
    has one optimizer. Parameters with a dense gradient go to torch's implementation, `foreach` and
    `fused` included. Sparse gradients (COO, one sparse and one dense dimension, coalesced or not)
    of tables of shape ``(V, D)`` and dtype float32, float64, bfloat16 or float16 are taken in one
    pass over the rows that they name.

    **Lazy.** A row that the gradient does not name stays as it is: it does not move by its moments,
    these do not fade, and it does not decay. torch's Adam, given the same gradient as a dense one,
    would do all three, so that it is the same where every step uses all rows, and for the first
    step of a row at the table's first step. `step`, by which moments are corrected, counts the
    steps of the table and not of the row. ``torch.optim.SparseAdam`` is lazy in the same way; it
    adds `eps` before it corrects the second moment, this class after it, as torch's Adam does.

    The state of a table is torch's, `step`, `exp_avg` and `exp_avg_sq`, made at its first step; the
    moments are float32 for bfloat16 and float16 tables, of which rows are computed in float32 and
    rounded once. State dicts of torch's class load here, and those of this class load there.

    Args:
        params, lr, betas, eps, weight_decay: as torch's.
        amsgrad, capturable, differentiable: as torch's; tables with a sparse gradient are refused.
        foreach, maximize, fused, decoupled_weight_decay: as torch's.
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
        >>> optimizer = embed_ext.optim.Adam(table.parameters(), lr=0.5)
        >>> table(torch.tensor([1, 4, 4])).sum().backward()
        >>> optimizer.step()
        >>> table.weight[:5, 0].detach()
        tensor([1.0000, 0.5000, 1.0000, 1.0000, 0.5000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._set_row_options(stochastic_rounding, seed)


class AdamW(_AdamRows, torch.optim.AdamW):
    """``torch.optim.AdamW`` that steps tables with sparse gradients by their rows in use.

    Adam whose weight decay shrinks a row by ``lr * weight_decay`` and does not pass through its
    moments (Loshchilov and Hutter, "Decoupled Weight Decay Regularization"). All that is said of
    :class:`Adam` holds.

    **Lazy.** A row that the gradient does not name stays as it is: its moments do not move it and
    do not fade, and it does not decay, which torch's AdamW would do to every row at every step.
    With the default `weight_decay` of 0.01 that is a difference from the first step on, for the
    rows that are not in use; it is the same where every step uses all rows. :func:`catch_up` makes
    up for the decay.

    Args:
        params, lr, betas, eps, weight_decay: as torch's.
        amsgrad, capturable, differentiable: as torch's; tables with a sparse gradient are refused.
        maximize, foreach, fused: as torch's.
        stochastic_rounding, seed: as Adam's.

    Raises:
        RuntimeError: at ``step()``, before anything is changed, for a sparse gradient that cannot
            be taken.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(10, 2, sparse=True, _weight=torch.ones(10, 2))
        >>> optimizer = embed_ext.optim.AdamW(table.parameters(), lr=0.5, weight_decay=0.5)
        >>> table(torch.tensor([1, 4, 4])).sum().backward()
        >>> optimizer.step()
        >>> table.weight[:5, 0].detach()
        tensor([1.0000, 0.2500, 1.0000, 1.0000, 0.2500])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_row_options(stochastic_rounding, seed)


class RowwiseAdam(Adam):
    """Adam with one second moment a row of a table, in place of one an element.

    The second moment of a row is that of the mean over the row of its squared gradient
    (PARTIAL_ROWWISE_ADAM in FBGEMM's documentation): a table's state takes little more than half
    the memory. It is for tables with sparse gradients; everything else, and all that is said of
    :class:`Adam`, is as there. ``decoupled_weight_decay=True`` makes it the row-wise AdamW.

    **Lazy.** A row that the gradient does not name stays as it is: its moments do not move it and
    do not fade, and it does not decay.

    The state of a table is `step`, `exp_avg`, shape ``(V, D)``, and `exp_avg_sq`, shape ``(V)``,
    float32 or float64. Gradients of a table that has it may also be dense: then all rows are in
    use. A table whose first gradient was dense has torch's ``(V, D)``, and keeps it. State dicts
    that torch's class saved load here, with the moments that they have.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable: as Adam's.
        differentiable, fused, decoupled_weight_decay, stochastic_rounding, seed: as Adam's.

    Raises:
        RuntimeError: as Adam.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(10, 2, sparse=True, _weight=torch.ones(10, 2))
        >>> optimizer = embed_ext.optim.RowwiseAdam(table.parameters(), lr=0.5)
        >>> table(torch.tensor([1, 4, 4])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[table.weight]["exp_avg_sq"].shape
        torch.Size([10])
    """

    _per_row = True
