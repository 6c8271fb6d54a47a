"""Rows that catch up when they are next used: lazy steps that end where torch's dense ones do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils.hooks import RemovableHandle

from embed_ext._memory import untouched_zeros
from embed_ext.optim._missed_steps import Matrix, MissedSteps
from embed_ext.optim._module_hook import ModuleHook
from embed_ext.optim._row_step import RowOptimizer, RowStep
from embed_ext.optim._state import dtype_beside

__all__ = ["catch_up"]

_MOST_ROWS = 1 << 18  # looked at together: bounds what is allocated beside a table
_MOST_ELEMENTS = 1 << 16  # moved together: they stay in a core's cache


@dataclass
class _Table:
    """What is known of a table's rows.

    Attributes:
        missed: the steps since the table was last up to date as a whole.
        last: shape ``(V)``, int32: the last of these steps that each row is up to date with. It has
            memory where rows are used.
        unused_are_still: whether rows whose `last` is 0 are known to have no momentum.
        unchanging: how many of the first steps change nothing.
    """

    missed: MissedSteps
    last: Tensor
    unused_are_still: bool
    unchanging: int = 0

    def is_up_to_date(self) -> bool:
        """Whether no row has missed anything."""
        return self.missed.count == self.unchanging


class CatchUp:
    """What :func:`catch_up` has set up; see there."""

    def __init__(self, optimizer: RowOptimizer, model: nn.Module) -> None:
        """Begin; see :func:`catch_up`."""
        self._optimizer = optimizer
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._tables: dict[Tensor, _Table] = {}
        self._handles: list[RemovableHandle] = [
            optimizer.register_state_dict_pre_hook(lambda _: self.flush()),
            optimizer.register_load_state_dict_pre_hook(lambda *_: self.flush()),
            # What is loaded may have momentum anywhere.
            optimizer.register_load_state_dict_post_hook(lambda _: self._begin_all()),
        ]
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and id(weight) in own:
                self._follow(module)
        self._begin_all()

    @property
    def tables(self) -> list[Tensor]:
        """The tables whose rows are brought up to date, each of shape ``(V, D)``."""
        return list(self._tables)

    def _follow(self, module: nn.Embedding | nn.EmbeddingBag) -> None:
        table = module.weight
        self._tables[table] = self._begin(table)

        def flush(*_: Any) -> None:
            self._flush(table)

        # The compiler is not to trace it: it would compile again for every count of steps.
        before_lookup = torch.compiler.disable(self._before_lookup)  # type: ignore[no-untyped-call]
        self._handles += [
            module.register_forward_pre_hook(ModuleHook(before_lookup), with_kwargs=True),
            module.register_state_dict_pre_hook(ModuleHook(flush)),  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(ModuleHook(flush)),  # type: ignore[no-untyped-call]
        ]

    @torch.inference_mode(False)  # steps write to it, also if evaluation has made it
    def _begin(self, table: Tensor) -> _Table:
        last = untouched_zeros(torch.Size([len(table)]), torch.int32, table.device)
        return _Table(MissedSteps(table.device), last, self._momentum(table) is None)

    def _begin_all(self) -> None:
        for table in self._tables:
            self._tables[table] = self._begin(table)

    @torch.inference_mode(False)
    def _known(self, table: Tensor) -> _Table | None:
        own = self._tables.get(table)
        if own is not None and own.last.device != table.device:  # by model.to()
            own.last = own.last.to(table.device)
            own.missed.move_to(table.device)
        return own

    @torch.inference_mode(False)
    def _momentum(self, table: Tensor) -> Tensor | None:
        key = self._optimizer._carried_state
        if key is None or self._optimizer.state.get(table, {}).get(key) is None:
            return None
        state: Tensor = self._optimizer._row_state(table, key)
        self._optimizer.state[table][key] = state
        return state

    def _before_lookup(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        indices = args[0] if args else kwargs.get("input")
        table = module.weight
        if isinstance(indices, Tensor) and isinstance(table, Tensor):
            self.update(table, indices.values() if indices.is_nested else indices)

    @torch.no_grad()
    def update(self, table: Tensor, indices: Tensor) -> None:
        """Bring rows up to date, as the lookups of the modules do by themselves.

        Args:
            table: shape ``(V, D)``, a parameter of one of these modules; others are passed over.
            indices: shape ``(*)``, the rows that are about to be read, in any order, any of them
                several times. One that is out of range names the first or the last row.
        """
        own = self._known(table)
        if own is None or own.is_up_to_date() or indices.numel() == 0 or len(table) == 0:
            return
        for rows in torch.split(indices.detach().reshape(-1).long(), _MOST_ROWS):
            self._update_rows(table, own, rows.clamp(0, len(table) - 1))

    def _update_rows(self, table: Tensor, own: _Table, rows: Tensor) -> None:
        last = own.last.index_select(0, rows)
        behind = (last < own.missed.count).nonzero().squeeze(1)
        if len(behind) == 0:
            return
        rows, last = rows.index_select(0, behind), last.index_select(0, behind)
        # Each of several entries of a row leaves its number there, and the one whose number stays
        # is the row's.
        number = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        try:
            own.last.scatter_(0, rows, number)
            chosen = (own.last.index_select(0, rows) == number).nonzero().squeeze(1)
        finally:
            own.last.scatter_(0, rows, last)
        self._move(table, own, rows.index_select(0, chosen), last.index_select(0, chosen))

    def _move(self, table: Tensor, own: _Table, rows: Tensor, last: Tensor) -> None:
        # rows [U] that differ, last [U] of them. Noted part by part, so that nothing is done twice
        # after an interrupt.
        product = own.missed.since(last)  # [U, 2, 2] of (weight, momentum)
        decays = bool(product[:, 1, 0].any())  # an infinite weight times 0 is no number
        momentum = self._momentum(table)
        wide = dtype_beside(table)
        most = max(1, _MOST_ELEMENTS // max(1, table.size(1)))
        factors = product.to(wide).unsqueeze(-1)  # [U, 2, 2, 1]
        for some, factor in zip(torch.split(rows, most), torch.split(factors, most), strict=True):
            weight = table.index_select(0, some).to(wide)
            moved = factor[:, 0, 0] * weight
            if momentum is not None:
                carried = momentum.index_select(0, some)
                moved.addcmul_(factor[:, 0, 1], carried)
                carried.mul_(factor[:, 1, 1])
                if decays:
                    carried.addcmul_(factor[:, 1, 0], weight)
                momentum.index_copy_(0, some, carried)
            # Whoever has saved the table for a backward has read none of these rows.
            with _unsafe_preserve_version_counter(table):
                table.index_copy_(0, some, moved.to(table.dtype))
            own.last.index_fill_(0, some, own.missed.count)

    def before_step(self, step: RowStep) -> Matrix:
        """Bring the rows that a step uses up to date; return what it does to the others."""
        self.update(step.table, step.indices)
        return self._optimizer._step_of_unused_rows(step)

    def after_step(self, step: RowStep, unused: Matrix) -> None:
        """Note a step that has been made."""
        own = self._known(step.table)
        if own is not None and len(step.table) > 0:
            own.missed.record(unused)
            rows = step.indices.clamp(0, len(step.table) - 1)  # bad ones are the op's to report
            own.last.index_fill_(0, rows, own.missed.count)

    def before_dense_step(self) -> None:
        """Bring tables up to date that torch's optimizer is about to step as a whole."""
        for table in self._tables:
            if table.grad is not None:  # those that are stepped by rows have none now
                self._flush(table)
                self._tables[table].unused_are_still = False

    def flush(self) -> None:
        """Bring all rows of all tables up to date: before a table is read as a whole.

        Saving the model or the optimizer and loading either does it by itself.
        """
        for table in self._tables:
            self._flush(table)

    @torch.no_grad()
    def _flush(self, table: Tensor) -> None:
        own = self._known(table)
        if own is None or own.is_up_to_date():
            return
        # Of a row that never had a gradient: without decay it stays as it is, and so does memory
        # that nothing has used yet.
        never = own.missed.since(own.last.new_zeros(1))[0]
        still = own.unused_are_still and bool(never[0, 0] == 1) and bool(never[1, 0] == 0)
        for begin in range(0, len(table), _MOST_ROWS):
            last = own.last[begin : begin + _MOST_ROWS]
            behind = (last < own.missed.count) & (last > 0 if still else True)
            rows = behind.nonzero().squeeze(1)
            self._move(table, own, rows + begin, last[rows])
        self._tables[table] = self._begin(table)
        if still:
            self._remember_unused(self._tables[table], own.last)

    def _remember_unused(self, begun: _Table, last: Tensor) -> None:
        # As if there had been one step, that changed nothing.
        begun.unused_are_still, begun.unchanging = True, 1
        begun.missed.record(((1.0, 0.0), (0.0, 1.0)))
        for begin in range(0, len(last), _MOST_ROWS):
            begun.last[begin + last[begin : begin + _MOST_ROWS].nonzero().squeeze(1)] = 1

    def remove(self) -> None:
        """Bring all rows up to date, and go back to rows that stay as they are."""
        self.flush()
        for handle in self._handles:
            handle.remove()
        if self._optimizer._catch_up is self:
            self._optimizer._catch_up = None


def catch_up(optimizer: Any, model: nn.Module) -> CatchUp:
    """Let rows that a step does not use do what torch's dense optimizer would have them do.

    A row is brought up to date when it is next looked up: the steps that it has missed are one
    2 x 2 matrix of its weight and its momentum, whatever their number. A step still costs what the
    rows in use cost, and training is torch's of the same gradients made dense, up to rounding:

    - ``SGD``, with weight decay, momentum, dampening and Nesterov's: all of it.
    - ``AdamW``, and Adam with ``decoupled_weight_decay``: the decay. Moments stay lazy, since what
      they would do to a row is no product.
    - Adagrad without weight decay misses nothing. Adagrad with it, and Adam whose decay passes
      through its moments, have no such matrix and are refused.

    Learning rates and other options may change from step to step. What was missed is computed in
    float32 (float64 for itself; products of steps in float64) and rounded to nearest.

    Tables are those of the ``nn.Embedding`` and ``nn.EmbeddingBag`` modules, this library's among
    them, that `model` has now; a forward hook brings the rows up to date. Whoever reads a table
    past its module calls ``update(table, indices)`` first, or ``flush()``, which brings all rows up
    to date. ``state_dict()`` and ``load_state_dict()`` of the model and of the optimizer do that by
    themselves; ``torch.save(model)``, ``copy.deepcopy`` and ``torch.export`` do not. Call its
    ``remove()`` before the model is traced or compiled as one graph. Beside a table it keeps 4
    bytes a row in use, and 32 bytes a step until the next ``flush()``. For a table that processes
    share in memory it is of no use: each counts its own steps.

    Args:
        optimizer: one of ``embed_ext.optim``.
        model: the model whose lookups read its tables.

    Returns:
        A handle: ``flush()``, ``update(table, indices)``, and ``remove()``, which undoes it.

    Raises:
        TypeError: `optimizer` is not one of ``embed_ext.optim``.
        ValueError: `model` looks nothing up in a table of the optimizer's, or the optimizer has a
            handle already.
        RuntimeError: at ``step()``, before anything is changed, for a group that is refused.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(10, 2, sparse=True, _weight=torch.ones(10, 2))
        >>> optimizer = embed_ext.optim.SGD(table.parameters(), lr=0.5, weight_decay=0.5)
        >>> handle = embed_ext.optim.catch_up(optimizer, table)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     table(torch.tensor([1])).sum().backward()
        ...     optimizer.step()
        >>> table.weight[:2, 0].tolist(), table(torch.tensor([0])).tolist()
        ([1.0, -0.3125], [[0.5625, 0.5625]])
        >>> handle.flush()
        >>> table.weight[:3, 0].tolist()
        [0.5625, -0.3125, 0.5625]
    """
    if not isinstance(optimizer, RowOptimizer):
        raise TypeError(
            "catch_up: expected an optimizer of embed_ext.optim, but got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    if optimizer._catch_up is not None:
        raise ValueError(
            "catch_up: expected an optimizer without a handle, but it has one; remove() that"
        )
    handle = CatchUp(optimizer, model)
    if not handle.tables:
        handle.remove()
        raise ValueError(
            "catch_up: expected a model with nn.Embedding or nn.EmbeddingBag modules whose weight "
            f"is one of the optimizer's parameters, but {type(model).__name__} has none"
        )
    optimizer._catch_up = handle
    return handle
