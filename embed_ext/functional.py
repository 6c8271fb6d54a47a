"""The lookup as a function, with the arguments of ``torch.nn.functional.embedding``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from embed_ext import _C

__all__ = ["embedding"]

# (weight, indices, padding_idx, scale_grad_by_freq, sparse, coalesced) -> out, of types of weight
# for which the op alone would not do.
LOOKUPS: dict[type, Callable[..., Tensor]] = {}

# As classes know it by identity; routing may put another function in its place later.
TORCH_EMBEDDING = F.embedding
_PLAIN = (Tensor, nn.Parameter)
# What a class inherits that overrides nothing: it runs the function that it is handed.
_inherited = vars(Tensor)["__torch_function__"].__func__


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    coalesced: bool = False,
) -> Tensor:
    """Look up rows of a table: ``out[..., :] = weight[input[...], :]``.

    The class of `weight`, if it has a ``__torch_function__`` of its own as torchao's tables and
    torch's ExpandedWeight have, is handed ``torch.nn.functional.embedding``, the lookup that such
    classes know; `coalesced` means nothing there. Classes of `input`, modes and tracers are handed
    this function.

    Args:
        input: indices, shape ``(*)``, any shape including empty and 0-D. int64, int32, int16,
            int8, uint8, uint16 or uint32.
        weight: the table, shape ``(V, D)``, any strides. Any dtype; floating and complex tables
            have gradients, and those of bfloat16 and float16 are summed in float32 and rounded
            once.
        padding_idx: a row that gets no gradient; negative values count from the end.
        max_norm: if given, each row that `input` names and whose `norm_type`-norm is larger is
            first scaled to it, in place, without a gradient.
        norm_type: the p of that norm.
        scale_grad_by_freq: divide a row's gradient by the number of times `input` names it.
        sparse: make the gradient of `weight` a sparse COO tensor, one entry an index, in order.
        coalesced: of a sparse gradient: sum the entries of a row, in float32 (float64 for itself),
            and give each row in use one entry, in ascending order, so that an optimizer's
            ``coalesce()`` has nothing left to do. On CUDA the host waits for the number of rows,
            so that a CUDA graph cannot capture this backward. Nothing changes without `sparse`.

    Returns:
        A tensor of shape ``(*, D)`` and the dtype of `weight`.

    Raises:
        IndexError: an index is negative or not below V. On CUDA see
            :func:`embed_ext.set_index_check` for when.
        RuntimeError: `weight` is not 2-D, `input` has another dtype, or they are on two devices.
        TypeError: an argument is not a tensor.
        AssertionError: `padding_idx` is not a row of `weight`.

    Example:
        >>> import torch
        >>> from embed_ext.functional import embedding
        >>> weight = torch.tensor([[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]])
        >>> embedding(torch.tensor([2, 0]), weight)
        tensor([[3.0000, 3.5000],
                [1.0000, 1.5000]])
    """
    # Where a class runs what it was handed, Dynamo still says yes to the first question.
    if has_torch_function_variadic(input, weight) and (
        not is_compiling() or torch._C._is_torch_function_enabled()
    ):
        return _overridden(
            input,
            weight,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            coalesced=coalesced,
        )
    if is_compiling() and _overrides(weight):
        # Dynamo says no above for a wrapper class, which is asked once the graph runs, about the
        # function that is in the graph.
        return TORCH_EMBEDDING(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    if max_norm is not None:
        # Everything is checked before the table is written to.
        _check_tensors(weight, input)
        padding_idx = resolve_padding_idx(padding_idx, weight)
        padding_idx = None if padding_idx < 0 else padding_idx
        # detach() beside no_grad(), which a trace would not record. To a compiler a write without
        # it is one that autograd sees: it adds zeros to the gradient, which then is never sparse.
        with torch.no_grad() if is_compiling() else nullcontext():
            torch.ops.embed_ext.embedding_renorm_(weight.detach(), input, max_norm, norm_type)
    if is_compiling():  # a compiler sees into torch.ops, not into a C function
        return _lookup(weight, input, padding_idx, scale_grad_by_freq, sparse, coalesced)
    return _C.embedding(weight, input, padding_idx, scale_grad_by_freq, sparse, coalesced)


def _overridden(input: Tensor, weight: Tensor, **options: Any) -> Tensor:
    # handle_torch_function is given the options by name, as by torch: overrides count on it.
    relevant = (input, weight)
    if _overrides(weight):
        # It may know torch's lookup, and turn down functions that it does not know.
        options.pop("coalesced")
        return handle_torch_function(TORCH_EMBEDDING, relevant, input, weight, **options)
    # Everybody else passes on what they are handed, or records it: that is to be this lookup.
    return handle_torch_function(embedding, relevant, input, weight, **options)


def _overrides(weight: object) -> bool:
    if type(weight) in _PLAIN or not isinstance(weight, Tensor):
        return False
    function: object = type(weight).__torch_function__
    function = getattr(function, "__func__", function)
    return function is not _inherited and function is not torch._C._disabled_torch_function_impl


def _check_tensors(weight: object, indices: object) -> None:
    for name, value in (("input", indices), ("weight", weight)):
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"embedding(): argument '{name}' must be Tensor, not {kind}")


def resolve_padding_idx(padding_idx: int | None, weight: Tensor) -> int:
    """Return the padding row as the ops take it: counted from the start, and -1 for None."""
    if padding_idx is None:
        return -1
    padding_idx = index(padding_idx)
    num_rows = weight.size(0)
    if padding_idx != 0 and not -num_rows <= padding_idx < num_rows:
        raise AssertionError(
            f"Padding_idx must be within num_embeddings: it is {padding_idx} and weight has "
            f"{num_rows} rows"
        )
    return padding_idx + num_rows if padding_idx < 0 else padding_idx


def _lookup(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
    sparse: bool,
    coalesced: bool,
) -> Tensor:
    op: Callable[..., Tensor] = torch.ops.embed_ext.embedding
    lookup = LOOKUPS.get(type(weight), op)
    padding_idx = resolve_padding_idx(padding_idx, weight)
    return lookup(weight, indices, padding_idx, scale_grad_by_freq, sparse, coalesced)


def _general_path(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
    sparse: bool,
    coalesced: bool,
) -> Tensor:
    # _C.embedding's way out for anything but two plain tensors.
    if has_torch_function_variadic(indices, weight):
        return embedding(
            indices,
            weight,
            padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            coalesced=coalesced,
        )
    _check_tensors(weight, indices)
    return _lookup(weight, indices, padding_idx, scale_grad_by_freq, sparse, coalesced)


_C.set_general_path(_general_path)
