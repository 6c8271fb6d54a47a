"""DTensor: a table that several processes share.

A table stays as it is placed, and the indices come to it. Of one dimension of the mesh:

    weight [V, D]   indices         out [..., D]    gradient of weight
    Shard(0)        Replicate       Partial         Shard(0)
    Shard(1)        Replicate       Shard(-1)       Shard(1)
    Replicate       Shard(i)        Shard(i)        Partial
    Replicate       Replicate       Replicate       Replicate

Imported once ``torch.distributed.tensor`` is, which takes long and which few need; registers its
rules then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from embed_ext import functional
from embed_ext._support import TENSOR_TYPES

_ROWS = Shard(0)
_NO_SPARSE = "embedding: the gradient of a DTensor cannot be sparse; use sparse=False"


class _Lookup(torch.autograd.Function):
    """The lookup over DTensors that are placed already, from one plan to the next."""

    @staticmethod
    def forward(
        weight: DTensor,  # [V, D]
        indices: DTensor,  # [...]
        of_out: tuple[Placement, ...],
        of_grad: tuple[Placement, ...],
        padding_idx: int,
        scale_grad_by_freq: bool,
    ) -> DTensor:
        part, (first, size) = weight.to_local(), _own_part(weight)
        if part.size(0) != size:
            raise RuntimeError(
                f"embedding: expected {size} of weight's {weight.size(0)} rows on this rank, as "
                f"torch.chunk splits them, but it has {part.size(0)}"
            )
        out = _part_of_lookup(part, indices.to_local(), first, weight.size(0))
        return _as_whole(out, weight, of_out, *indices.shape, weight.size(1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the indices, and of the table its size and place alone."""
        weight, indices, ctx.of_out, ctx.of_grad, ctx.padding_idx, ctx.scale_grad_by_freq = inputs
        ctx.num_rows = weight.size(0)
        ctx.part = _own_part(weight)
        ctx.save_for_backward(indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: DTensor) -> tuple[DTensor | None, ...]:
        """grad_output [..., D] -> gradient of weight [V, D]."""
        (indices,) = ctx.saved_tensors
        of_grad_output = [Replicate() if to.is_partial() else to for to in ctx.of_out]
        grad = _part_of_gradient(
            _place(grad_output, of_grad_output).to_local(),
            indices.to_local(),
            ctx.part,
            ctx.num_rows,
            ctx.padding_idx,
            ctx.scale_grad_by_freq,
        )
        width = grad_output.size(-1)
        grad_weight = _as_whole(grad, grad_output, ctx.of_grad, ctx.num_rows, width)
        return grad_weight, None, None, None, None, None


def _part_of_lookup(weight: Tensor, indices: Tensor, first: int, num_rows: int) -> Tensor:
    # weight [R, D], the rows from `first` of [V, D]; indices [...] of V rows -> [..., D], with zero
    # for a token of another row
    if weight.size(0) == num_rows:
        return torch.ops.embed_ext.embedding(weight, indices)  # type: ignore[no-any-return]
    _check_indices(weight, indices, num_rows)
    if weight.size(0) == 0:
        return weight.new_zeros((*indices.shape, weight.size(1)))
    rows, elsewhere = _own_rows(indices, first, weight.size(0))
    out = torch.ops.embed_ext.embedding(weight, rows.masked_fill(elsewhere, 0))
    return out.masked_fill_(elsewhere.unsqueeze(-1), 0)  # type: ignore[no-any-return]


def _part_of_gradient(
    grad_output: Tensor,
    indices: Tensor,
    part: tuple[int, int],
    num_rows: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    # grad_output [..., D], indices [...] of V rows -> [R, D], of the R rows from the first
    op = torch.ops.embed_ext.embedding_dense_backward
    first, size = part
    if size == num_rows:
        return op(  # type: ignore[no-any-return]
            grad_output, indices, num_rows, padding_idx, scale_grad_by_freq
        )
    rows, elsewhere = _own_rows(indices, first, size)
    # What counts nowhere here goes to one row more, and that is the padding row.
    rows = rows.masked_fill(elsewhere | (indices == padding_idx), size)
    return op(grad_output, rows, size + 1, size, scale_grad_by_freq)[:size]  # type: ignore[no-any-return]


def _check_indices(weight: Tensor, indices: Tensor, num_rows: int) -> None:
    # A table [V, 0] has nothing to read: what is left of the lookup is the check.
    torch.ops.embed_ext.embedding(weight.new_empty((num_rows, 0)), indices)


def _own_rows(indices: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    # indices [...] of the table -> of the part [size, D], and where they name no row of it
    rows = indices.to(torch.int64) - first
    return rows, (rows < 0) | (rows >= size)


def _own_part(weight: DTensor) -> tuple[int, int]:
    # the first row that this rank has, and how many
    first, size = 0, weight.size(0)
    mesh = weight.device_mesh
    for dim, placement in enumerate(weight.placements):
        if placement == _ROWS:
            chunk = -(-size // mesh.size(dim))  # as torch.chunk: the last ranks may have none
            start = min(chunk * mesh.get_local_rank(dim), size)
            first, size = first + start, min(chunk, size - start)
    return first, size


def _place(tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    if tensor.placements == tuple(placements):
        return tensor
    return tensor.redistribute(placements=placements)


def _sendable(indices: DTensor) -> DTensor:
    # Not every backend can send the other types.
    if indices.dtype in (torch.int64, torch.int32):
        return indices
    return cast(DTensor, indices.to(torch.int64))


def _as_whole(part: Tensor, like: DTensor, placements: Sequence[Placement], *shape: int) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, like.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _check_kinds(op: str, **tensors: object) -> None:
    meshes = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            others = " and ".join(other for other in tensors if other != name)
            raise RuntimeError(
                f"{op}: {others} is a DTensor, but {name} is a plain tensor; distribute it over "
                f"the same mesh"
            )
        meshes.append(tensor.device_mesh)
    if meshes[0] != meshes[1]:
        raise RuntimeError(f"{op}: {' and '.join(tensors)} are DTensors on two meshes")


def _plan(
    weight: DTensor, indices: DTensor, scale_grad_by_freq: bool
) -> Iterator[tuple[Placement, ...]]:
    # for each dimension of the mesh: how to place weight, indices, the result and the gradient
    for table, batch in zip(weight.placements, indices.placements, strict=True):
        if type(table) is Shard:
            yield table, Replicate(), Partial() if table == _ROWS else Shard(indices.ndim), table
        elif type(batch) is Shard and not scale_grad_by_freq:
            yield Replicate(), batch, batch, Partial()
        else:  # a part of the batch does not know how often all of it names a row
            yield Replicate(), Replicate(), Replicate(), Replicate()


def _lookup(
    weight: DTensor, indices: DTensor, padding_idx: int, scale_grad_by_freq: bool
) -> DTensor:
    # weight [V, D], indices [...] -> [..., D]
    _check_kinds("embedding", weight=weight, indices=indices)
    if weight.dim() != 2:
        raise RuntimeError(f"embedding: expected weight to be 2-D, but it is {weight.dim()}-D")
    plan = _plan(weight, indices, scale_grad_by_freq)
    of_weight, of_indices, of_out, of_grad = zip(*plan, strict=True)
    out = _Lookup.apply(  # type: ignore[no-untyped-call]
        _place(weight, of_weight),
        _place(_sendable(indices), of_indices),
        of_out,
        of_grad,
        padding_idx,
        scale_grad_by_freq,
    )
    return cast(DTensor, out)


def embedding(
    weight: DTensor,
    indices: DTensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
    coalesced: bool,
) -> DTensor:
    """The lookup, with a gradient that is placed as the table is.

    weight [V, D], indices [...] -> [..., D]
    """
    if sparse and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(_NO_SPARSE)
    return _lookup(weight, indices, padding_idx, scale_grad_by_freq)


# The ops themselves. Their backward does not see how the table is placed: its gradient is partial
# or replicated where embedding()'s is sharded by rows.


def _embedding(
    weight: DTensor,
    indices: DTensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    coalesced: bool = False,
) -> DTensor:
    return _lookup(weight, indices, padding_idx, scale_grad_by_freq)


def _backward_plan(
    grad_output: DTensor, indices: DTensor, scale_grad_by_freq: bool
) -> Iterator[tuple[Placement, ...]]:
    # for each dimension of the mesh: how to place grad_output, indices and the result
    for grad in grad_output.placements:
        if grad == Shard(indices.ndim):
            yield grad, Replicate(), Shard(1)
        elif type(grad) is Shard and not scale_grad_by_freq:
            yield grad, grad, Partial()
        elif grad == Partial():
            yield grad, Replicate(), Partial()
        else:
            yield Replicate(), Replicate(), Replicate()


def _embedding_dense_backward(
    grad_output: DTensor,
    indices: DTensor,
    num_weights: int,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> DTensor:
    # grad_output [..., D], indices [...] -> [V, D]
    _check_kinds("embedding_dense_backward", grad_output=grad_output, indices=indices)
    plan = _backward_plan(grad_output, indices, scale_grad_by_freq)
    of_grad, of_indices, of_out = zip(*plan, strict=True)
    part = torch.ops.embed_ext.embedding_dense_backward(
        _place(grad_output, of_grad).to_local(),
        _place(_sendable(indices), of_indices).to_local(),
        num_weights,
        padding_idx,
        scale_grad_by_freq,
    )
    return _as_whole(part, grad_output, of_out, num_weights, grad_output.size(-1))


def _embedding_sparse_backward(*args: Any) -> DTensor:
    raise RuntimeError(_NO_SPARSE)


def _embedding_renorm_(
    weight: DTensor, indices: DTensor, max_norm: float, norm_type: float = 2.0
) -> None:
    # weight [V, D], indices [...]: each rank scales the rows that it has
    _check_kinds("embedding_renorm_", weight=weight, indices=indices)
    if any(placement not in (_ROWS, Replicate()) for placement in weight.placements):
        raise RuntimeError(
            f"embedding_renorm_: max_norm needs whole rows, but weight is placed as "
            f"{weight.placements}; shard it by rows, Shard(0), or replicate it"
        )
    everywhere = [Replicate()] * weight.device_mesh.ndim
    rows = _place(_sendable(indices), everywhere).to_local()
    part = weight.to_local()
    _check_indices(part, rows, weight.size(0))
    rows, elsewhere = _own_rows(rows, *_own_part(weight))
    torch.ops.embed_ext.embedding_renorm_(part, rows[~elsewhere], max_norm, norm_type)


def _register() -> None:
    def rule_of(function: Callable[..., Any]) -> Callable[..., Any]:
        def rule(cls: type, op: Any, types: Sequence[type], args: Any, kwargs: Any) -> Any:
            with torch.no_grad():
                return function(*args, **kwargs)

        return rule

    for function in (
        _embedding,
        _embedding_dense_backward,
        _embedding_sparse_backward,
        _embedding_renorm_,
    ):
        name = f"embed_ext::{function.__name__[1:]}"
        torch.library.register_torch_dispatch(name, DTensor, rule_of(function))
    functional.LOOKUPS[DTensor] = embedding
    TENSOR_TYPES.add(DTensor)


_register()
