"""Batching rules: one call on a larger table in place of a loop over the batch.

A rule gets each argument with the dimension that is batched, None where it is not, and returns its
result with the dimension where the batch now is.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Dims = tuple[int | None, ...]


class Info(Protocol):
    """What ``torch.library.register_vmap`` passes first."""

    batch_size: int


def _front(tensor: Tensor, dim: int | None) -> Tensor:
    # tensor [..., B, ...] -> [B, ...]
    return tensor if dim is None else tensor.movedim(dim, 0)


def _rows_of_all(indices: Tensor, num_rows: int, batch_size: int) -> Tensor:
    """Rename the rows of B tables [B, V, D] to those of one table [B * V, D].

    indices [B, ...] -> [B, ...]. An index outside its own table stays outside the large one, so
    that the op turns it down instead of reading a neighbour's row.
    """
    indices = indices.to(torch.int64)
    table = torch.arange(batch_size, device=indices.device)
    start = num_rows * table.view(-1, *([1] * (indices.dim() - 1)))
    too_large = indices + num_rows * (batch_size - 1)
    outside = torch.where(indices < 0, indices, too_large)
    return torch.where((indices < 0) | (indices >= num_rows), outside, indices + start)


def _embedding(
    info: Info,
    in_dims: Dims,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    coalesced: bool = False,
) -> tuple[Tensor, int]:
    op = torch.ops.embed_ext.embedding
    options = scale_grad_by_freq, sparse, coalesced
    weight_dim, indices_dim = in_dims[:2]
    indices = _front(indices, indices_dim)
    if weight_dim is None:
        return op(weight, indices, padding_idx, *options), 0
    weight = _front(weight, weight_dim)
    batch_size, num_rows, width = weight.shape
    if indices_dim is None:
        # A row of the wide table holds that row of all B tables, side by side.
        wide = weight.movedim(0, 1).reshape(num_rows, batch_size * width)
        out = op(wide, indices, padding_idx, *options)
        return out.unflatten(-1, (batch_size, width)), out.dim() - 1
    rows = _rows_of_all(indices, num_rows, batch_size)
    out = op(weight.reshape(batch_size * num_rows, width), rows, -1, *options)
    if padding_idx >= 0:  # there are now B padding rows, and the op knows of one at most
        out = torch.where((indices == padding_idx).unsqueeze(-1), out.detach(), out)
    return out, 0


def _embedding_dense_backward(
    info: Info,
    in_dims: Dims,
    grad_output: Tensor,
    indices: Tensor,
    num_weights: int,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> tuple[Tensor, int]:
    op = torch.ops.embed_ext.embedding_dense_backward
    grad_dim, indices_dim = in_dims[:2]
    if indices_dim is None:
        assert grad_dim is not None  # vmap calls a rule only if something is batched
        wide = grad_output.movedim(grad_dim, -2)  # [..., B, D]
        out = op(wide.flatten(-2), indices, num_weights, padding_idx, scale_grad_by_freq)
        return out.unflatten(-1, wide.shape[-2:]), 1
    batch_size = info.batch_size
    indices = _front(indices, indices_dim)
    if grad_dim is None:
        grad_output = grad_output.expand(batch_size, *grad_output.shape)
    else:
        grad_output = _front(grad_output, grad_dim)
    rows = _rows_of_all(indices, num_weights, batch_size)
    if padding_idx >= 0:
        # Sent to one row, which the op leaves at zero; the other padding rows get no token.
        rows = torch.where(indices == padding_idx, padding_idx, rows)
    out = op(grad_output, rows, batch_size * num_weights, padding_idx, scale_grad_by_freq)
    return out.reshape(batch_size, num_weights, grad_output.size(-1)), 0


def _embedding_sparse_backward(info: Info, in_dims: Dims, *args: object) -> tuple[Tensor, int]:
    raise RuntimeError(
        "embedding_sparse_backward: a batch of sparse gradients has no layout; "
        "use sparse=False under vmap"
    )


def _embedding_grad_add_(
    info: Info,
    in_dims: Dims,
    grad_weight: Tensor,
    grad_output: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> tuple[None, None]:
    weight_dim, grad_dim, indices_dim = in_dims[:3]
    if weight_dim is None:
        raise RuntimeError(
            "embedding_grad_add_: vmap cannot add a batch of gradients in place to one grad_weight "
            "that is not batched"
        )
    for b, table in enumerate(grad_weight.unbind(weight_dim)):  # in place: a reshape may copy
        torch.ops.embed_ext.embedding_grad_add_(
            table,
            grad_output if grad_dim is None else grad_output.select(grad_dim, b),
            indices if indices_dim is None else indices.select(indices_dim, b),
            padding_idx,
            scale_grad_by_freq,
        )
    return None, None


def _embedding_renorm_(
    info: Info,
    in_dims: Dims,
    weight: Tensor,
    indices: Tensor,
    max_norm: float,
    norm_type: float = 2.0,
) -> tuple[None, None]:
    op = torch.ops.embed_ext.embedding_renorm_
    weight_dim, indices_dim = in_dims[:2]
    indices = _front(indices, indices_dim)
    if weight_dim is None:
        op(weight, indices, max_norm, norm_type)
        return None, None
    for b, table in enumerate(weight.unbind(weight_dim)):  # in place: a reshape might be a copy
        op(table, indices if indices_dim is None else indices[b], max_norm, norm_type)
    return None, None


def register() -> None:
    """Register the rules, once."""
    torch.library.register_vmap("embed_ext::embedding", _embedding)
    torch.library.register_vmap("embed_ext::embedding_dense_backward", _embedding_dense_backward)
    torch.library.register_vmap("embed_ext::embedding_sparse_backward", _embedding_sparse_backward)
    torch.library.register_vmap("embed_ext::embedding_grad_add_", _embedding_grad_add_)
    torch.library.register_vmap("embed_ext::embedding_renorm_", _embedding_renorm_)
