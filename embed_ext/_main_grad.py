"""Gradients that go straight to ``weight.main_grad``, where mixed precision keeps them.

Training in the manner of Megatron keeps, beside a bfloat16 weight, a float32 ``weight.main_grad``
to which each micro-batch's gradient is added. Through autograd's ``.grad`` that takes a whole
bfloat16 table, its rounding, and a pass over both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embed_ext.functional import LOOKUPS

__all__ = ["lookup_adding_to_main_grad"]


class _LookupAddingToMainGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool
    ) -> Tensor:
        """weight [V, D], indices [...] -> [..., D]."""
        ctx.save_for_backward(indices)
        # Not saved: an optimizer may well step between forward and backward, as its values play no
        # part in the gradient.
        ctx.weight = weight
        ctx.padding_idx = padding_idx
        ctx.scale_grad_by_freq = scale_grad_by_freq
        return torch.ops.embed_ext.embedding(weight, indices)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, None, None]:
        """grad_output [..., D]; what autograd gets for weight is None."""
        (indices,) = ctx.saved_tensors
        main_grad = getattr(ctx.weight, "main_grad", None)
        if not isinstance(main_grad, Tensor):
            raise RuntimeError(
                "add_to_main_grad: weight.main_grad must be a tensor of weight's shape, "
                f"float32 or of weight's dtype, but it is {main_grad!r}"
            )
        torch.ops.embed_ext.embedding_grad_add_(
            main_grad, grad_output, indices, ctx.padding_idx, ctx.scale_grad_by_freq
        )
        if hasattr(ctx.weight, "grad_added_to_main_grad"):
            ctx.weight.grad_added_to_main_grad = True
        return None, None, None, None


def lookup_adding_to_main_grad(
    weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """Look up weight [V, D] at indices [...]; backward() adds the gradient to weight.main_grad."""
    if type(weight) in LOOKUPS:
        raise NotImplementedError(
            f"add_to_main_grad: not for a weight of type {type(weight).__name__}; "
            "use add_to_main_grad=False for a sharded table"
        )
    apply = _LookupAddingToMainGrad.apply
    return apply(weight, indices, padding_idx, scale_grad_by_freq)  # type: ignore[no-any-return, no-untyped-call]
