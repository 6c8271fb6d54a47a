"""The lookup as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from embed_ext import _C, functional

__all__ = ["Embedding"]


class Embedding(nn.Embedding):
    """A drop-in for ``torch.nn.Embedding``: same constructor, attributes, state and results.

    It is a subclass, so that whatever tests ``isinstance(module, nn.Embedding)`` keeps working.
    On top of it: seven index dtypes in place of two, gradients of bfloat16 and float16 tables
    summed in float32 and rounded once, and an IndexError that names the bad index. See
    :func:`embed_ext.functional.embedding` for shapes, dtypes and errors.

    Args:
        num_embeddings: rows of the table, V.
        embedding_dim: columns of the table, D.
        padding_idx: a row that starts at zero and gets no gradient.
        max_norm: scale looked-up rows down to this norm, in place, before each lookup.
        norm_type: the p of that norm.
        scale_grad_by_freq: divide a row's gradient by the number of times the batch names it.
        sparse: make the gradient of `weight` a sparse tensor.
        device, dtype: of the table.

    Shape:
        input ``(*)`` -> output ``(*, embedding_dim)``

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(10, 3, padding_idx=0)
        >>> table
        Embedding(10, 3, padding_idx=0)
        >>> table(torch.tensor([0, 4], dtype=torch.uint8))[0].tolist()
        [0.0, 0.0, 0.0]
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows that `input` names; see :func:`embed_ext.functional.embedding`."""
        # TorchScript compiles the first branch alone.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self.max_norm is not None:
                torch.ops.embed_ext.embedding_renorm_(
                    self.weight.detach(), input, self.max_norm, self.norm_type
                )
            padding_idx = -1 if self.padding_idx is None else self.padding_idx
            return torch.ops.embed_ext.embedding(  # type: ignore[no-any-return]
                self.weight, input, padding_idx, self.scale_grad_by_freq, self.sparse
            )
        else:
            # nn.Module.__getattr__ takes longer than a small lookup; it is asked only where weight
            # is not an ordinary parameter (parametrized, or assigned as a plain tensor).
            weight: Tensor | None = self._parameters.get("weight")
            if weight is None:
                weight = self.weight
            if self.max_norm is None and not is_compiling():
                return _C.embedding(
                    weight, input, self.padding_idx, self.scale_grad_by_freq, self.sparse
                )
            return functional.embedding(
                input,
                weight,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )
