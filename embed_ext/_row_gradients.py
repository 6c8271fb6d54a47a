"""What is done to the sparse gradient of a table once it is made."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from embed_ext._support import why_not

# Tables whose gradients are gone before somebody could clip them (optim/in_backward.py).
UPDATED_IN_BACKWARD = WeakTensorKeyDictionary()

# What the op sums.
_SUMMED_DTYPES = {
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
}


def coalesced(grad: Tensor) -> Tensor:
    """Return a sparse gradient with one entry a row in use, in ascending order.

    The entries of a row are added up in float32 (float64 for itself) and rounded once, as those of
    a lookup with ``coalesced=True`` are, which takes less time than ``Tensor.coalesce`` does. That
    is what adds them up where this library has no kernel: where more than the rows is sparse, for
    other dtypes and devices, and for a gradient that requires a gradient itself.

    Args:
        grad: sparse COO, shape ``(V, D)``.

    Returns:
        `grad` itself where it is coalesced, else a new tensor of its shape and dtype.

    Raises:
        IndexError: a row of `grad` is not below V; of a CUDA tensor see
            :func:`embed_ext.set_index_check` for when.

    Example:
        >>> import torch
        >>> from embed_ext import Embedding
        >>> from embed_ext._row_gradients import coalesced
        >>> table = Embedding(10, 2, sparse=True)
        >>> table(torch.tensor([7, 1, 7])).sum().backward()
        >>> grad = coalesced(table.weight.grad)
        >>> grad.indices(), grad.values()
        (tensor([[1, 7]]), tensor([[1., 1.],
                [2., 2.]]))
    """
    if grad.is_coalesced():
        return grad
    values = grad._values()
    if (
        grad.sparse_dim() == grad.dense_dim() == 1
        and values.dtype in _SUMMED_DTYPES
        and not grad.requires_grad
        and why_not(values) is None
    ):
        summed: Tensor = torch.ops.embed_ext.embedding_sparse_backward(
            values, grad._indices()[0], grad.size(0), -1, False, True
        )
        return summed
    return grad.coalesce()
