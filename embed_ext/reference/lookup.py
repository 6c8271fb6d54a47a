"""The lookup, its gradients and max_norm, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "embedding",
    "embedding_dense_backward",
    "embedding_grad_add_",
    "embedding_renorm_",
    "embedding_sparse_backward",
]


def embedding(weight: Tensor, indices: Tensor) -> Tensor:
    """Look up rows: ``out[i] = weight[indices[i]]``.

    Args:
        weight: shape ``(V, D)``.
        indices: shape ``(*)``, any integer dtype.

    Returns:
        Shape ``(*, D)``.

    Example:
        >>> import torch
        >>> from embed_ext import reference
        >>> reference.embedding(torch.eye(3), torch.tensor([2, 0]))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    return weight[indices.long()]


def embedding_dense_backward(
    grad_output: Tensor,
    indices: Tensor,
    num_weights: int,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Sum gradients by row: ``grad_weight[v] = sum(grad_output[i] for indices[i] == v)``.

    bfloat16 and float16 are summed in float32 and rounded once.

    Args:
        grad_output: shape ``(*, D)``.
        indices: shape ``(*)``.
        num_weights: V.
        padding_idx: a row that gets zero; -1 for none.
        scale_grad_by_freq: divide row v by the number of times that it occurs in `indices`.

    Returns:
        Shape ``(V, D)``.

    Example:
        >>> import torch
        >>> from embed_ext import reference
        >>> reference.embedding_dense_backward(torch.ones(3, 1), torch.tensor([1, 1, 2]), 4)
        tensor([[0.],
                [2.],
                [1.],
                [0.]])
    """
    rows, grad = _kept(grad_output, indices, padding_idx)
    low_precision = grad.dtype in (torch.bfloat16, torch.float16)
    total = torch.zeros(
        (num_weights, grad.size(-1)),
        dtype=torch.float32 if low_precision else grad.dtype,
        device=grad.device,
    )
    total.index_add_(0, rows, grad.to(total.dtype))
    if scale_grad_by_freq:
        total /= torch.bincount(rows, minlength=num_weights).clamp(min=1).unsqueeze(-1)
    return total.to(grad.dtype)


def embedding_sparse_backward(
    grad_output: Tensor,
    indices: Tensor,
    num_weights: int,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    coalesced: bool = False,
) -> Tensor:
    """The same sum as one COO entry an index, in order, uncoalesced, padding left out.

    Arguments as :func:`embedding_dense_backward`; the result is sparse, shape ``(V, D)``. With
    `coalesced` it has one entry a row in use instead, in ascending order.

    Example:
        >>> import torch
        >>> from embed_ext import reference
        >>> grad = reference.embedding_sparse_backward(torch.ones(3, 1), torch.tensor([1, 1, 2]), 4)
        >>> grad._indices()
        tensor([[1, 1, 2]])
    """
    rows, grad = _kept(grad_output, indices, padding_idx)
    if coalesced:
        rows = torch.bincount(rows, minlength=num_weights).nonzero().flatten()
        grad = embedding_dense_backward(
            grad_output, indices, num_weights, padding_idx, scale_grad_by_freq
        )[rows]
    elif scale_grad_by_freq:
        counts = torch.bincount(rows, minlength=num_weights)
        grad = (grad / counts[rows].unsqueeze(-1)).to(grad_output.dtype)
    size = (num_weights, grad.size(-1))
    # Opted out in so many words: torch 2.11 warns of an argument that says the same.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # type: ignore[no-untyped-call]
        return torch.sparse_coo_tensor(
            rows.unsqueeze(0), grad, size, is_coalesced=True if coalesced else None
        )


def embedding_grad_add_(
    grad_weight: Tensor,
    grad_output: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> None:
    """Add :func:`embedding_dense_backward` to `grad_weight`, in place, rounding their sum once.

    Args:
        grad_weight: shape ``(V, D)``, of the dtype of `grad_output` or, if that is bfloat16 or
            float16, of float32.
        grad_output, indices, padding_idx, scale_grad_by_freq: as there.

    Example:
        >>> import torch
        >>> from embed_ext import reference
        >>> total = torch.ones(3, 1)
        >>> reference.embedding_grad_add_(total, torch.ones(2, 1).bfloat16(), torch.tensor([2, 2]))
        >>> total.flatten().tolist()
        [1.0, 1.0, 3.0]
    """
    low_precision = grad_output.dtype in (torch.bfloat16, torch.float16)
    grad = embedding_dense_backward(
        grad_output.float() if low_precision else grad_output,
        indices,
        grad_weight.size(0),
        padding_idx,
        scale_grad_by_freq,
    )
    grad_weight.copy_(grad_weight.to(grad.dtype) + grad)


def embedding_renorm_(
    weight: Tensor, indices: Tensor, max_norm: float, norm_type: float = 2.0
) -> None:
    """Scale, in place, each row that `indices` names to at most `max_norm`.

    ``row *= max_norm / (norm + 1e-7)`` where ``norm > max_norm``, once a row.

    Args:
        weight: shape ``(V, D)``.
        indices: shape ``(*)``.
        max_norm: the longest norm to leave.
        norm_type: the p of the norm.

    Example:
        >>> import torch
        >>> from embed_ext import reference
        >>> weight = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
        >>> reference.embedding_renorm_(weight, torch.tensor([1]), max_norm=1.0)
        >>> weight
        tensor([[3.0000, 4.0000],
                [0.6000, 0.8000]])
    """
    for row in set(indices.reshape(-1).tolist()):
        wide = weight[row].to(torch.complex128 if weight.is_complex() else torch.float64)
        norm = float(torch.linalg.vector_norm(wide, norm_type))
        if norm > max_norm:
            weight[row] *= max_norm / (norm + 1e-7)


def _kept(grad_output: Tensor, indices: Tensor, padding_idx: int) -> tuple[Tensor, Tensor]:
    # grad_output [..., D], indices [...] -> rows [N], gradients [N, D] of the tokens that count
    rows = indices.reshape(-1).long()
    grad = grad_output.reshape(rows.numel(), grad_output.size(-1))
    keep = rows != padding_idx
    return rows[keep], grad[keep]
