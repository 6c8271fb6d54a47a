"""Clipping of dense and sparse gradients together, as ``torch.nn.utils`` clips dense ones.

What torch's functions do with a table's dense gradient, these do with its sparse one, in the memory
of its entries: no tensor of the table's size is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from types import GeneratorType, SimpleNamespace
from typing import cast

import torch
from torch import Tensor
from torch.nn import utils

from embed_ext._row_gradients import UPDATED_IN_BACKWARD, coalesced

__all__ = ["clip_grad_norm_", "clip_grad_value_", "get_total_norm"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale all gradients, in place, so that their norm as one vector is at most `max_norm`.

    Each is multiplied by ``min(max_norm / (total_norm + 1e-6), 1)``, as by
    ``torch.nn.utils.clip_grad_norm_``, whose results these are for dense gradients. For a sparse
    one they are those that it has for ``grad.to_dense()``. A sparse gradient whose entries are not
    coalesced is replaced in ``.grad`` by one whose are, even if an error is raised later, so that
    the optimizer need not do that again. One that is coalesced keeps its tensors.

    Where the factor is NaN, as it is for a norm of NaN, so is every entry afterwards. The rows
    without an entry stay zero then, which in a dense gradient become NaN as well.

    Args:
        parameters: whose ``.grad`` are clipped: one tensor or many, of any dtypes. Those without a
            gradient do not count. torch takes DTensors, but none beside other tensors.
        max_norm: the longest norm to leave.
        norm_type: the p of the norm, any that ``torch.linalg.vector_norm`` takes.
        error_if_nonfinite: raise if the norm is infinite or NaN, before anything is scaled.
        foreach: None and True use torch's functions for many tensors at once where there are some,
            and True raises where there are none; False never uses them.

    Returns:
        The norm before clipping, 0-D.

    Raises:
        RuntimeError: the norm is not finite, under `error_if_nonfinite`; a table is updated in the
            backward (:func:`embed_ext.optim.step_in_backward`); `foreach` is True for
            tensors that have no such functions; a gradient without elements has no norm, for inf
            and negative p.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(1000, 4, sparse=True)
        >>> table(torch.tensor([7, 1, 7, 7, 7])).sum().backward()
        >>> embed_ext.clip_grad_norm_(table.parameters(), max_norm=1.0, norm_type=torch.inf)
        tensor(4.)
        >>> table.weight.grad.values()
        tensor([[0.2500, 0.2500, 0.2500, 0.2500],
                [1.0000, 1.0000, 1.0000, 1.0000]])
    """
    if isinstance(parameters, GeneratorType):
        parameters = list(parameters)
        if not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=3,  # the caller of the wrapper that no_grad() makes
            )
    grads = _coalesced_grads(_with_grad("clip_grad_norm_", parameters))
    total_norm = get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
    utils.clip_grads_with_norm_(_owners_of_entries(grads), max_norm, total_norm, foreach)
    return total_norm


@torch.no_grad()
def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor],
    clip_value: float,
    foreach: bool | None = None,
) -> None:
    """Clamp all gradients, in place, to the range from ``-clip_value`` to ``clip_value``.

    As ``torch.nn.utils.clip_grad_value_`` does to dense gradients, and would do to
    ``grad.to_dense()`` of a sparse one: it is the sum of a row's entries that is clamped. ``.grad``
    is coalesced as by :func:`clip_grad_norm_`.

    Args:
        parameters: whose ``.grad`` are clipped: one tensor or many, of any real dtypes. Those
            without a gradient do not count.
        clip_value: the largest absolute value to leave.
        foreach: as of :func:`clip_grad_norm_`.

    Raises:
        ValueError: `clip_value` is negative or NaN, which would change the zeros of the rows that a
            sparse gradient has no entry for.
        RuntimeError: a gradient is complex; a table is updated in the backward
            (:func:`embed_ext.optim.step_in_backward`); `foreach` is True for tensors that have no
            functions for many at once.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(1000, 4, sparse=True)
        >>> table(torch.tensor([7, 1, 7, 7])).sum().backward()
        >>> embed_ext.clip_grad_value_(table.parameters(), 2.0)
        >>> table.weight.grad.values()
        tensor([[1., 1., 1., 1.],
                [2., 2., 2., 2.]])
    """
    clip_value = float(clip_value)
    owners = _with_grad("clip_grad_value_", parameters)
    if not clip_value >= 0 and any(_is_sparse(cast(Tensor, owner.grad)) for owner in owners):
        raise ValueError(
            f"clip_grad_value_: expected clip_value >= 0 for sparse gradients, but got {clip_value}"
        )
    utils.clip_grad_value_(_owners_of_entries(_coalesced_grads(owners)), clip_value, foreach)


@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Return the norm of dense and sparse tensors as one vector: the norm of their norms.

    As ``torch.nn.utils.get_total_norm`` of the dense ones and ``to_dense()`` of the sparse ones:
    of several entries for one row the sum counts, and zeros where there is no entry, which are the
    smallest elements for a negative `norm_type`. Nothing is changed.

    Args:
        tensors: one tensor or many, of any shapes and floating or complex dtypes.
        norm_type, error_if_nonfinite, foreach: as of :func:`clip_grad_norm_`.

    Returns:
        The norm, 0-D, on the device of the first tensor.

    Raises:
        RuntimeError: as by :func:`clip_grad_norm_`.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(1000, 1, sparse=True)
        >>> table(torch.tensor([7, 7, 7])).sum().backward()
        >>> embed_ext.get_total_norm([table.weight.grad, torch.tensor([4.0])])
        tensor(5.)
    """
    norm_type = float(norm_type)
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    counted = [part for tensor in tensors for part in _parts_that_count(tensor, norm_type)]
    return utils.get_total_norm(counted, norm_type, error_if_nonfinite, foreach)


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout is torch.sparse_coo


def _with_grad(function: str, parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if any(parameter in UPDATED_IN_BACKWARD for parameter in parameters):
        raise RuntimeError(
            f"{function}: expected all gradients to be there, but a table is updated in the "
            "backward (embed_ext.optim.step_in_backward), and its gradient is gone; train without "
            "one of the two"
        )
    return [parameter for parameter in parameters if parameter.grad is not None]


def _coalesced_grads(owners: list[Tensor]) -> list[Tensor]:
    # Each owner's .grad, which is coalesced afterwards.
    grads = []
    for owner in owners:
        grad = cast(Tensor, owner.grad)
        if _is_sparse(grad) and not grad.is_coalesced():
            owner.grad = grad = coalesced(grad)
        grads.append(grad)
    return grads


def _owners_of_entries(grads: list[Tensor]) -> list[Tensor]:
    # torch's functions read nothing of a parameter but its .grad.
    entries = [grad.values() if _is_sparse(grad) else grad for grad in grads]
    return cast("list[Tensor]", [SimpleNamespace(grad=grad) for grad in entries])


def _parts_that_count(tensor: Tensor, norm_type: float) -> list[Tensor]:
    # What has the tensor's norm: all of a dense one, and the entries of a sparse one. That there
    # are zeros beside these matters if the least element counts, or if there is no other.
    if not _is_sparse(tensor):
        return [tensor]
    values = coalesced(tensor).values()
    has_zeros = values.numel() < tensor.numel()
    if has_zeros and (norm_type < 0 or values.numel() == 0):
        return [values, values.new_zeros(1)] if values.numel() > 0 else [values.new_zeros(1)]
    return [values]
