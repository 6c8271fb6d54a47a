"""Rows in use are stepped by this library's ops; everything else is torch's optimizer's.

An optimizer of this package is torch's with :class:`RowOptimizer` in front of it. `step()` takes
the gradients of tables away, lets torch's step see what is left, updates the rows in use, and puts
the gradients back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from embed_ext._row_gradients import coalesced
from embed_ext._support import why_not
from embed_ext.optim._missed_steps import Matrix
from embed_ext.optim._state import (
    LOW_PRECISION,
    dtype_beside,
    is_low_precision_table,
    lazy_zeros,
    step_seed,
    why_not_by_rows,
)

if TYPE_CHECKING:
    from embed_ext.optim.catching_up import CatchUp

    _Mixin = Optimizer
else:
    # No subclass of Optimizer beside torch's: libraries that look up optimizers by name among all
    # subclasses then meet each of this package below torch's of its name alone.
    _Mixin = object

_DTYPES = (torch.float32, torch.float64, *LOW_PRECISION)
_OWN_OPTIONS = {"stochastic_rounding": False, "seed": 0}  # of a group, and what an old one has
_NOT_FOR_ROWS = ("amsgrad", "capturable", "differentiable")


def _parts_of(grad: Tensor) -> tuple[Tensor, Tensor, bool]:
    # indices [N], values [N, D], and whether these are coalesced
    if not grad.is_sparse:
        return torch.arange(len(grad), device=grad.device), grad, True
    if not grad.is_coalesced() and _is_summed_by_the_op(grad):
        return grad._indices()[0], grad._values(), False
    rows = coalesced(grad)
    return rows._indices()[0], rows._values(), True


def _is_summed_by_the_op(grad: Tensor) -> bool:
    # On the CPU, while it updates. A bad index is left to coalesced(), to raise before any table is
    # changed.
    indices = grad._indices()
    if indices.device.type != "cpu" or why_not(grad._values()) is not None:
        return False
    if indices.numel() == 0:
        return True
    lowest, highest = indices.aminmax()
    return 0 <= int(lowest) and int(highest) < grad.size(0)


@dataclass
class RowStep:
    """What one step does to one table.

    Attributes:
        table: shape ``(V, D)``.
        grad: what ``table.grad`` was and will be.
        position: of the table among the optimizer's parameters, as in its ``state_dict()``.
        group: its group.
        options: of the op, as numbers; see ``RowOptimizer._row_options``.
        indices: shape ``(N)``.
        values: shape ``(N, D)``.
        coalesced: whether `indices` ascend and differ; else the op adds up the entries of a row.
    """

    table: Tensor
    grad: Tensor
    position: int
    group: dict[str, Any]
    options: dict[str, Any]
    indices: Tensor
    values: Tensor
    coalesced: bool

    @property
    def stochastic(self) -> bool:
        """Whether rows are rounded at random."""
        return bool(self.group["stochastic_rounding"]) and is_low_precision_table(self.table)

    def seed(self, step: int) -> int | None:
        """Return the seed of the table's step of that number, None to round to nearest."""
        return step_seed(self.group["seed"], self.position, step) if self.stochastic else None


class RowOptimizer(_Mixin):
    """What is put before a class of ``torch.optim`` so that it steps rows of tables.

    A subclass names the states of a table and says which op is called with what.
    """

    # By torch's names; each has the shape of the table, except where `_per_row` says otherwise.
    _row_states: ClassVar[tuple[str, ...]]
    # The one of them that moves a row also in the steps that do not use it, linearly.
    _carried_state: ClassVar[str | None] = None

    _catch_up: CatchUp | None = None  # catching_up.py sets it

    def _row_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return what a group says, as the numbers that the op takes, or raise."""
        raise NotImplementedError

    def _step_rows(self, step: RowStep) -> dict[str, Any]:
        """Update the rows in use; return the state of the table that is to be kept."""
        raise NotImplementedError

    def _step_of_unused_rows(self, step: RowStep) -> Matrix:
        """Return what torch's dense step does to (weight, carried state) of a row not in use."""
        return (1.0, 0.0), (0.0, 1.0)

    def _never_caught_up(self, group: dict[str, Any]) -> str | None:
        """Say why no matrix does what torch's dense step does, as far as it is made up for."""
        return None

    def _set_row_options(self, stochastic_rounding: bool, seed: int) -> None:
        # After torch's constructor, which has no room for more options; a group's own stay.
        self.defaults.update(stochastic_rounding=stochastic_rounding, seed=seed)
        self._complete_groups()

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            for name, default in _OWN_OPTIONS.items():
                group.setdefault(name, self.defaults.get(name, default))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state over; a group that torch's optimizer saved gets this one's options."""
        # Who looks at the state of a parameter before its first step makes an empty one, which
        # torch's Adagrad does not expect.
        begun = {parameter: own for parameter, own in state["state"].items() if own}
        super().__setstate__({**state, "state": defaultdict(dict, begun)})
        self._complete_groups()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step: tables with a sparse gradient by their rows, the rest by torch.

        Args:
            closure: evaluates the model again and returns the loss; called once, first.

        Returns:
            what `closure` returned.

        Raises:
            RuntimeError: a sparse gradient cannot be taken; nothing has been changed.
            IndexError: a gradient is marked as coalesced, and its rows do not ascend or are not
                all in the table, which is seen when its turn comes; on CUDA see
                :func:`embed_ext.set_index_check`.
            IndexError: a gradient names a row that is not there; nothing has been changed, except
                where it is marked as coalesced and is not: that shows when its turn has come.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            steps = list(self._row_steps())
            try:
                for step in steps:
                    step.table.grad = None
                if self._catch_up is not None:
                    self._catch_up.before_dense_step()
                self._step_dense()
                self._step_tables(steps)
            finally:
                for step in steps:
                    step.table.grad = step.grad
        return loss

    def _step_dense(self) -> None:
        for group in self.param_groups:
            if group.get("fused"):  # torch reads the count where the parameter is, the rows do not
                for parameter in group["params"]:
                    state = self.state.get(parameter, {})
                    if parameter.grad is not None and isinstance(state.get("step"), Tensor):
                        state["step"] = state["step"].to(parameter.device)
        # torch puts hooks and profiling around the step of each class that is instantiated: around
        # the one that called this, and around its base too where somebody has made one of those.
        step = super().step
        if getattr(step, "hooked", False):
            step.__wrapped__(self)  # type: ignore[attr-defined]
        else:
            step()

    def _step_tables(self, steps: list[RowStep]) -> None:
        # A GradScaler leaves these to optimizers that are fused, for the time of the step.
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if not steps or (found_inf is not None and found_inf.item()):
            return
        for step in steps:
            if scale is not None:
                step.values = (step.values / scale.to(step.values.device)).to(step.table.dtype)
            if self._catch_up is not None:
                unused = self._catch_up.before_step(step)
            state = self._step_rows(step)
            if state:
                self.state[step.table].update(state)
            if self._catch_up is not None:
                self._catch_up.after_step(step, unused)

    def _step_one(self, table: Tensor) -> None:
        """Update the rows of one table that its gradient names."""
        with torch.no_grad():
            self._step_tables(list(self._row_steps(table)))

    def _row_steps(self, only: Tensor | None = None) -> Iterator[RowStep]:
        position = -1
        for number, group in enumerate(self.param_groups):
            for i, table in enumerate(group["params"]):
                position += 1
                grad = None if only is not None and table is not only else table.grad
                if grad is None or not (grad.is_sparse or self._has_state_of_rows(table)):
                    continue
                self._check(table, grad, group, (number, i))
                options = self._row_options(group)
                yield RowStep(table, grad, position, group, options, *_parts_of(grad))

    def _has_state_of_rows(self, table: Tensor) -> bool:
        # Of one number a row, or of float32 beside a table that is not: torch's step does not take
        # it, so a dense gradient becomes one in which all rows are in use.
        state = self.state.get(table, {})
        return table.dim() == 2 and any(
            isinstance(state.get(key), Tensor)
            and (state[key].dtype != table.dtype or state[key].shape != table.shape)
            for key in self._row_states
        )

    def _check(
        self, table: Tensor, grad: Tensor, group: dict[str, Any], place: tuple[int, int]
    ) -> None:
        def refuse(rule: str) -> NoReturn:
            number, i = place
            name = group.get("param_names", {i: f"parameter {i} of group {number}"})[i]
            raise RuntimeError(
                f"embed_ext.optim.{type(self).__name__}: {rule} (the gradient of {name}, of shape "
                f"{tuple(table.shape)})"
            )

        for option in _NOT_FOR_ROWS:
            if group.get(option):
                refuse(f"{option}={group[option]} is not for tables that are stepped by rows")
        if grad.is_sparse and (grad.sparse_dim(), grad.dense_dim()) != (1, 1):
            refuse(
                "expected a gradient with 1 sparse and 1 dense dimension, but got "
                f"{grad.sparse_dim()} and {grad.dense_dim()}"
            )
        if table.dtype not in _DTYPES or grad.dtype != table.dtype:
            refuse(
                "expected a table of dtype float32, float64, bfloat16 or float16 and a gradient of "
                f"the same, but got {table.dtype} and {grad.dtype}"
            )
        if table.dtype == torch.float16 and getattr(self, "grad_scale", None) is not None:
            refuse(
                "a GradScaler leaves the gradient to be unscaled in float16, where what it is for "
                "would be 0; train the table in bfloat16, or in float32 under autocast"
            )
        reason = why_not_by_rows(table)
        if reason is not None:
            refuse(reason)
        if self._catch_up is not None and (never := self._never_caught_up(group)):
            refuse(never)
        if type(group["seed"]) is not int:
            refuse(f"expected seed to be an int, but got {group['seed']!r}")

    def _row_state(self, table: Tensor, key: str, per_row: bool = False) -> Tensor:
        # As the op takes it; what comes from torch's step may be sparse, or of the table's dtype.
        state: Tensor | None = self.state.get(table, {}).get(key)
        if state is None:
            return lazy_zeros(table, per_row)
        if state.is_sparse:
            state = state.to_dense()
        return state.to(dtype_beside(table))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` of this class or of torch's returned.

        As torch's, but float32 states of bfloat16 and float16 parameters of two dimensions, which
        may be tables, stay float32, and a group keeps its `stochastic_rounding` and `seed` where
        what is loaded has none.
        """
        # The last hook before it sees what is loaded in the end, the first one after it comes
        # before all who look at the outcome.
        final: dict[str, Any] = {}
        before = self.register_load_state_dict_pre_hook(lambda _, loaded: final.update(loaded))
        after = self.register_load_state_dict_post_hook(
            lambda _: self._keep_precision(final), prepend=True
        )
        options = [{name: group[name] for name in _OWN_OPTIONS} for group in self.param_groups]
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        for group, own, saved in zip(
            self.param_groups, options, final["param_groups"], strict=True
        ):
            group.update({name: own[name] for name in _OWN_OPTIONS if name not in saved})

    def _keep_precision(self, loaded: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
            if any(group.get(option) for option in _NOT_FOR_ROWS):
                continue  # such a group has dense gradients, and torch's step wants torch's state
            for table, number in zip(group["params"], saved["params"], strict=True):
                if not is_low_precision_table(table):
                    continue
                state = loaded["state"].get(number, {})
                for key in self._row_states:
                    if isinstance(state.get(key), Tensor) and state[key].dtype == torch.float32:
                        self.state[table][key] = state[key].to(table.device)
