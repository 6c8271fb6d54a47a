"""Jagged nested tensors as indices: the op runs on their values, the offsets stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor
from torch.nested._internal.ops import extract_kwargs

Call = Callable[..., Tensor]


def _embedding(cls: type, op: Call, types: Sequence[type], args: Any, kwargs: Any) -> NestedTensor:
    # weight [V, D], indices (B, j) -> (B, j, D)
    weight, indices, *options = args
    if isinstance(weight, NestedTensor):
        raise RuntimeError("embedding: expected a dense weight, but it is a nested tensor")
    out = op(weight, indices._values, *options, **kwargs)
    return NestedTensor(out, **extract_kwargs(indices))  # type: ignore[no-untyped-call]


def _backward(cls: type, op: Call, types: Sequence[type], args: Any, kwargs: Any) -> Tensor:
    # grad_output (B, j, D), indices (B, j) -> [V, D]
    grad_output, indices, *options = args
    return op(grad_output._values, indices._values, *options, **kwargs)


def _grad_add(cls: type, op: Call, types: Sequence[type], args: Any, kwargs: Any) -> None:
    # grad_weight [V, D], grad_output (B, j, D), indices (B, j)
    grad_weight, grad_output, indices, *options = args
    op(grad_weight, grad_output._values, indices._values, *options, **kwargs)


def register() -> None:
    """Register the rules, once."""
    register_one = torch.library.register_torch_dispatch
    register_one("embed_ext::embedding", NestedTensor, _embedding)
    register_one("embed_ext::embedding_dense_backward", NestedTensor, _backward)
    register_one("embed_ext::embedding_sparse_backward", NestedTensor, _backward)
    register_one("embed_ext::embedding_grad_add_", NestedTensor, _grad_add)
