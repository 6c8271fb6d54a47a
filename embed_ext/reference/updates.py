"""What an optimizer's step does to the rows that a gradient names, in plain PyTorch.

All take the two parts of a coalesced gradient: `indices` [U], int64, strictly ascending, and
`values` [U, D] of the dtype of `weight`. Tables of bfloat16 and float16 are updated in float32, in
which their state is kept, and rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["embedding_adagrad_", "embedding_adam_", "embedding_sgd_"]


def embedding_sgd_(
    weight: Tensor,
    momentum_buffer: Tensor | None,
    indices: Tensor,
    values: Tensor,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """One step of ``torch.optim.SGD`` for some rows, in place.

    Args:
        weight: shape ``(V, D)``.
        momentum_buffer: shape ``(V, D)``, zeros for rows that have had no gradient yet; None
            without momentum. (The op refuses a momentum other than 0 without one.)
        indices: shape ``(U)``.
        values: shape ``(U, D)``.
        lr, weight_decay, momentum, dampening, nesterov, maximize: as there.

    Example:
        >>> import torch
        >>> from embed_ext import reference
        >>> weight = torch.ones(3, 1)
        >>> reference.embedding_sgd_(weight, None, torch.tensor([1]), torch.ones(1, 1), lr=0.5)
        >>> weight.flatten().tolist()
        [1.0, 0.5, 1.0]
    """
    row, grad = _operands(weight, indices, values, maximize)
    grad = grad + weight_decay * row
    if momentum_buffer is not None:
        buffer = momentum * momentum_buffer[indices] + (1 - dampening) * grad
        momentum_buffer[indices] = buffer
        grad = grad + momentum * buffer if nesterov else buffer
    weight[indices] = (row - lr * grad).to(weight.dtype)


def embedding_adagrad_(
    weight: Tensor,
    sum: Tensor,
    indices: Tensor,
    values: Tensor,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> None:
    """One step of ``torch.optim.Adagrad`` for some rows, or of its row-wise form, in place.

    The row-wise form keeps one number a row, the sum of the means of the squared gradient over the
    row (EXACT_ROWWISE_ADAGRAD of FBGEMM's documentation).

    Args:
        weight: shape ``(V, D)``.
        sum: shape ``(V, D)``, or ``(V)`` for the row-wise form.
        indices: shape ``(U)``.
        values: shape ``(U, D)``.
        lr: the rate of this step, `lr_decay` included.
        weight_decay, eps, maximize: as there.

    Example:
        >>> import torch
        >>> from embed_ext import reference
        >>> weight, total = torch.ones(3, 2), torch.zeros(3)
        >>> grad = torch.tensor([[3.0, 4.0]])
        >>> reference.embedding_adagrad_(weight, total, torch.tensor([1]), grad, lr=0.1)
        >>> total.tolist()
        [0.0, 12.5, 0.0]
    """
    row, grad = _operands(weight, indices, values, maximize)
    grad = grad + weight_decay * row
    total = sum[indices] + _squares(grad, sum)
    sum[indices] = total
    weight[indices] = (row - lr * grad / (_beside(total, grad).sqrt() + eps)).to(weight.dtype)


def embedding_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    indices: Tensor,
    values: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: int,
    maximize: bool = False,
) -> None:
    """One step of ``torch.optim.Adam``, AdamW, or of their row-wise form, for some rows, in place.

    The row-wise form keeps one second moment a row, of the mean of the squared gradient over the
    row (PARTIAL_ROWWISE_ADAM of FBGEMM's documentation).

    Args:
        weight: shape ``(V, D)``.
        exp_avg: shape ``(V, D)``.
        exp_avg_sq: shape ``(V, D)``, or ``(V)`` for the row-wise form.
        indices: shape ``(U)``.
        values: shape ``(U, D)``.
        lr, beta1, beta2, eps, weight_decay, maximize: as there.
        decoupled: whether the decay shrinks the row (AdamW) or is added to its gradient (Adam).
        step: which step of the table it is, from 1 on; for the correction of the moments.

    Example:
        >>> import torch
        >>> from embed_ext import reference
        >>> weight, mean, square = torch.ones(3, 1), torch.zeros(3, 1), torch.zeros(3, 1)
        >>> reference.embedding_adam_(
        ...     weight, mean, square, torch.tensor([1]), torch.ones(1, 1),
        ...     0.5, 0.9, 0.999, 1e-8, 0.0, False, step=1)
        >>> weight.flatten()
        tensor([1.0000, 0.5000, 1.0000])
    """
    row, grad = _operands(weight, indices, values, maximize)
    if decoupled:
        row = row * (1 - lr * weight_decay)
    else:
        grad = grad + weight_decay * row
    mean = exp_avg[indices] + (1 - beta1) * (grad - exp_avg[indices])
    square = beta2 * exp_avg_sq[indices] + (1 - beta2) * _squares(grad, exp_avg_sq)
    exp_avg[indices], exp_avg_sq[indices] = mean, square
    spread = _beside(square, grad).sqrt() / math.sqrt(1 - beta2**step) + eps
    weight[indices] = (row - lr / (1 - beta1**step) * mean / spread).to(weight.dtype)


def _operands(
    weight: Tensor, indices: Tensor, values: Tensor, maximize: bool
) -> tuple[Tensor, Tensor]:
    # The rows [U, D] and their gradients, in the type that they are computed in.
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    grad = values.to(wide)
    return weight[indices].to(wide), -grad if maximize else grad


def _squares(grad: Tensor, state: Tensor) -> Tensor:
    # [U, D], or their means [U] for a state with one number a row
    return grad.square() if state.dim() == 2 else grad.square().mean(1)


def _beside(state: Tensor, grad: Tensor) -> Tensor:
    return state if state.dim() == grad.dim() else state.unsqueeze(1)
