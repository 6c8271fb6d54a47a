"""The lookup as a ``torch.autograd.Function``, to subclass where a gradient is to be customised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["EmbeddingFunction"]


class EmbeddingFunction(torch.autograd.Function):
    """Call ``EmbeddingFunction.apply(weight, indices, ...)``, arguments as listed below.

    The same values and gradients as :func:`embed_ext.functional.embedding`, which is quicker: its
    gradient formula is in C++. This one is for those who want to see the formula in Python, or to
    change it: subclass it and override :meth:`backward`. It works under torch.func transforms, can
    be differentiated any number of times, and has a forward-mode derivative. torch.compile traces
    no Function that has one: call ``torch.compiler.allow_in_graph(EmbeddingFunction)`` once, and
    it is compiled as it stands.

    Args:
        weight: the table, shape ``(V, D)``, floating or complex if its gradient is wanted.
        indices: shape ``(*)``, any index dtype of :func:`embed_ext.functional.embedding`.
        padding_idx: a row that gets no gradient; -1, the default, for none.
        scale_grad_by_freq: divide a row's gradient by the number of times it occurs (False).
        sparse: return the gradient as a sparse COO tensor (False).
        coalesced: of a sparse gradient: one entry a row in use, ascending (False).

    Returns:
        A tensor of shape ``(*, D)``.

    Example:
        >>> import torch
        >>> from embed_ext import EmbeddingFunction
        >>> weight = torch.zeros(3, 2, requires_grad=True)
        >>> EmbeddingFunction.apply(weight, torch.tensor([1, 1, 2])).sum().backward()
        >>> weight.grad
        tensor([[0., 0.],
                [2., 2.],
                [1., 1.]])
    """

    # Built on differentiable ops, so that vmap can run through forward and backward as they are.
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        indices: Tensor,
        padding_idx: int = -1,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        coalesced: bool = False,
    ) -> Tensor:
        """weight [V, D], indices [...] -> [..., D]."""
        return torch.ops.embed_ext.embedding(  # type: ignore[no-any-return]
            weight, indices, padding_idx, scale_grad_by_freq, sparse, coalesced
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, indices, ctx.padding_idx, ctx.scale_grad_by_freq, ctx.sparse, ctx.coalesced = inputs
        ctx.num_weights = weight.shape[0]
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """grad_output [..., D] -> gradient of weight [V, D]; the other arguments have none."""
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        (indices,) = ctx.saved_tensors
        ops = torch.ops.embed_ext
        args = grad_output, indices, ctx.num_weights, ctx.padding_idx, ctx.scale_grad_by_freq
        if ctx.sparse:
            grad = ops.embedding_sparse_backward(*args, ctx.coalesced)
        else:
            grad = ops.embedding_dense_backward(*args)
        return grad, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, weight_tangent: Tensor | None, *_: Any) -> Tensor | None:
        """Tangent of weight [V, D] -> tangent of the output [..., D]: the lookup is linear."""
        if weight_tangent is None:
            return None
        (indices,) = ctx.saved_tensors
        return torch.ops.embed_ext.embedding(weight_tangent, indices)  # type: ignore[no-any-return]
