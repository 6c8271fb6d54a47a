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

__all__ = ["check_weight", "lookup_adding_to_main_grad"]


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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        """grad_output [..., D]; what autograd gets for weight is not its gradient."""
        (indices,) = ctx.saved_tensors
        weight = ctx.weight
        main_grad = getattr(weight, "main_grad", None)
        if not isinstance(main_grad, Tensor) or main_grad.shape != weight.shape:
            found = main_grad.shape if isinstance(main_grad, Tensor) else main_grad
            raise RuntimeError(
                "add_to_main_grad: weight.main_grad must be a tensor of weight's shape, "
                f"{tuple(weight.shape)}, but it is {found!r}"
            )
        torch.ops.embed_ext.embedding_grad_add_(
            main_grad, grad_output, indices, ctx.padding_idx, ctx.scale_grad_by_freq
        )
        stand_in = None
        if hasattr(weight, "grad_added_to_main_grad"):
            # What Megatron's hooks ask for: a .grad that they drop without a look at its values.
            weight.grad_added_to_main_grad = True
            make = (
                torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
            )
            stand_in = make(weight)
        return stand_in, None, None, None


def check_weight(weight: Tensor) -> None:
    """Raise NotImplementedError for a weight whose gradient cannot go to ``main_grad``."""
    if type(weight) in LOOKUPS:
        raise NotImplementedError(
            f"add_to_main_grad: not for a weight of type {type(weight).__name__}; "
            "use add_to_main_grad=False for a sharded table"
        )


def lookup_adding_to_main_grad(
    weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """Look up weight [V, D] at indices [...]; backward() adds the gradient to weight.main_grad."""
    apply = _LookupAddingToMainGrad.apply
    return apply(weight, indices, padding_idx, scale_grad_by_freq)  # type: ignore[no-any-return, no-untyped-call]
