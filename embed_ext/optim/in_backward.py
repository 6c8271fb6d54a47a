"""Tables that the backward itself trains, so that no gradient of theirs is kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from embed_ext._row_gradients import UPDATED_IN_BACKWARD
from embed_ext.optim._row_step import RowOptimizer

__all__ = ["step_in_backward"]


class StepInBackward:
    """What :func:`step_in_backward` has set up, to be undone by ``remove()``."""

    def __init__(self, optimizer: RowOptimizer) -> None:
        """Begin; see :func:`step_in_backward`."""
        self._optimizer = optimizer
        self._updated: set[int] = set()  # ids of tables that wait for optimizer.step()
        self._tables = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and parameter.dim() == 2
        ]
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_post_hook(lambda *_: self._updated.clear())
        ]
        for table in self._tables:
            self._handles.append(table.register_post_accumulate_grad_hook(self._update))

    def _update(self, table: Tensor) -> None:
        if table.grad is None or not table.grad.is_sparse:
            return
        if id(table) in self._updated:
            raise RuntimeError(
                "step_in_backward: a second backward before optimizer.step(), but gradients cannot "
                "be accumulated, as those of the first are gone; call optimizer.step() after each, "
                "or train without step_in_backward"
            )
        self._optimizer._step_one(table)
        table.grad = None
        self._updated.add(id(table))
        UPDATED_IN_BACKWARD[table] = True

    def remove(self) -> None:
        """Go back to gradients that are kept until ``optimizer.step()``."""
        for handle in self._handles:
            handle.remove()
        for table in self._tables:
            UPDATED_IN_BACKWARD.pop(table, None)  # type: ignore[no-untyped-call]


def step_in_backward(optimizer: Any) -> StepInBackward:
    """Let each table be updated as soon as a backward has its gradient, and drop the gradient.

    Of a model with several tables one gradient exists at a time. Sparse gradients are treated so;
    parameters with dense ones wait for ``optimizer.step()``, which has to be called after each
    backward in any case. Built on ``Tensor.register_post_accumulate_grad_hook``.

    What reads gradients after the backward cannot go with it. Clipping
    (:func:`embed_ext.clip_grad_norm_`, :func:`embed_ext.clip_grad_value_`) and a second backward
    before ``optimizer.step()``, which would accumulate, raise a RuntimeError, and so does
    DistributedDataParallel, which misses the gradient at the first backward. Not noticed, and
    wrong: clipping by ``torch.nn.utils``, which passes over the table, and a ``GradScaler``, which
    unscales after the backward.

    Args:
        optimizer: one of ``embed_ext.optim``, whose parameters of two dimensions it is about; those
            that are added later are not.

    Returns:
        A handle, whose ``remove()`` undoes it.

    Raises:
        TypeError: `optimizer` is not one of ``embed_ext.optim``.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(10, 2, sparse=True, _weight=torch.ones(10, 2))
        >>> optimizer = embed_ext.optim.SGD(table.parameters(), lr=0.5)
        >>> handle = embed_ext.optim.step_in_backward(optimizer)
        >>> table(torch.tensor([1, 4, 4])).sum().backward()
        >>> table.weight[:5, 0].tolist(), table.weight.grad
        ([1.0, 0.5, 1.0, 1.0, 0.0], None)
        >>> optimizer.step()
        >>> handle.remove()
    """
    if not isinstance(optimizer, RowOptimizer):
        raise TypeError(
            "step_in_backward: expected an optimizer of embed_ext.optim, but got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    return StepInBackward(optimizer)
