"""The lookup as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from embed_ext import _C, functional
from embed_ext._main_grad import check_weight, lookup_adding_to_main_grad

__all__ = ["Embedding", "finds_weight_as_parameter"]


def finds_weight_as_parameter(kind: type[nn.Module]) -> bool:
    """Whether nothing in this class comes before the parameter where `weight` is asked for."""
    return (
        kind.__getattribute__ is object.__getattribute__
        and kind.__getattr__ is nn.Module.__getattr__
        and not any("weight" in vars(base) for base in kind.__mro__)
    )


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
        keep_grad_buffer: keep the memory of a dense gradient from one backward to the next, and
            clear only the rows that were written in it; also an attribute, to be set at any time.
            See below.
        add_to_main_grad: add each gradient to ``weight.main_grad`` and leave ``weight.grad`` alone;
            also an attribute. See below.
        coalesced: make a sparse gradient a coalesced one, each row once, in ascending order; also
            an attribute, to be set at any time. See below.

    With `keep_grad_buffer` a backward costs what the rows it uses cost, where otherwise it clears a
    table's worth of memory first; the price is that memory, kept until the module goes or the
    attribute is set to False. It is used again once `weight.grad` is gone, as after
    ``zero_grad()``; if it is still there, the next gradient is added to it row by row. All uses of
    the table in one backward share it. Other gradients are made as ever: with `sparse` or
    `max_norm`, under torch.compile and torch.func, with ``create_graph``, while a CUDA graph is
    captured, and of a table whose gradient an output layer that shares it has begun.

    It relies on nobody else writing to the other rows of a gradient. In-place operations, such as
    gradient clipping's, are noticed by the tensor's version and cost one clearing of the whole
    table; a gradient that is still held somewhere is left alone. Writes that hide from autograd and
    then let go are searched for: an optimizer that writes through ``weight.grad.data``, NumPy or
    DLPack, ``set_`` or the ``unsafe_`` views, a C++ operator that is registered without autograd,
    a collective called on ``weight.grad`` by hand. The first 4 reuses are searched whole, and
    64 rows of each later one (on CUDA, where a search waits for the device, one in 64 is searched
    whole). What is found is cleared before it does harm, a warning names it, and from then on all
    of the memory is cleared each time. So what stays unseen is a write that is hidden, that begins
    after the 4th, and that is to few rows: after such a one call
    ``torch.autograd.graph.increment_version(weight.grad)``.
    :func:`embed_ext.set_verify_kept_gradients` searches every gradient whole and raises. On CUDA,
    memory is used again on the stream that it was handed out on; other streams that have read the
    gradient must have been waited for, because ``record_stream`` is not heard here.

    With `add_to_main_grad`, as training in the manner of Megatron keeps gradients, ``backward()``
    adds the rows in use to ``weight.main_grad``, a tensor of weight's shape and dtype or, for a
    bfloat16 or float16 weight, of float32, which then meets sums that were never rounded. Whoever
    made it also clears it, and reduces it among processes: DDP reduces ``.grad`` alone. For
    autograd weight has no gradient: ``weight.grad`` stays as it is, and hooks are called with None.
    If weight has an attribute ``grad_added_to_main_grad``, Megatron's protocol is kept: it is set
    to True, and a ``.grad`` whose values mean nothing is left for the hooks that want one. The
    gradient cannot be differentiated again; TorchScript, torch.func and sharded tables (DTensor)
    are refused.

    With `sparse` a gradient has one entry an index, and an optimizer has to sort and sum these
    before it can use them (``coalesce()``). With `coalesced` too that is done already, and
    ``weight.grad`` says so (``is_coalesced()``) once the backward is through. A hook that runs
    within the backward and gets the parameter still finds a gradient that does not say so. On CUDA
    the host waits for the number of rows, so that a CUDA graph cannot capture the backward.

    Shape:
        input ``(*)`` -> output ``(*, embedding_dim)``

    Raises:
        ValueError: `coalesced` or `keep_grad_buffer` is asked for where it means nothing: the first
            is for sparse gradients, the second for dense ones.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(10, 3, padding_idx=0)
        >>> table
        Embedding(10, 3, padding_idx=0)
        >>> table(torch.tensor([0, 4], dtype=torch.uint8))[0].tolist()
        [0.0, 0.0, 0.0]
    """

    # Of the class, so that a module whose __init__ never ran, such as an unpickled one, has them.
    # A comment gives the type, because torch.jit.script would read an annotation.
    _kept_gradient = None  # type: _C.KeptGradient | None
    add_to_main_grad = False
    coalesced = False
    # A property that is put into the class later, as by torch's parametrize, takes the parameter
    # away from the module.
    _finds_weight_as_parameter = True
    __constants__ = [*nn.Embedding.__constants__, "add_to_main_grad", "coalesced"]
    __jit_unused_properties__ = ["keep_grad_buffer"]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Look once at what each lookup would have to ask."""
        super().__init_subclass__(**kwargs)
        cls._finds_weight_as_parameter = finds_weight_as_parameter(cls)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        keep_grad_buffer: bool = False,
        add_to_main_grad: bool = False,
        coalesced: bool = False,
    ) -> None:
        if coalesced and not sparse:
            raise ValueError("coalesced: only a sparse gradient has entries; use sparse=True")
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        if keep_grad_buffer:
            self.keep_grad_buffer = True
        if add_to_main_grad:
            if sparse:
                raise ValueError("add_to_main_grad: adds to a dense table; use sparse=False")
            self.add_to_main_grad = True
        if coalesced:
            self.coalesced = True

    @property
    def keep_grad_buffer(self) -> bool:
        """Whether the memory of the gradient is kept; see the class."""
        return self._kept_gradient is not None

    @keep_grad_buffer.setter
    def keep_grad_buffer(self, keep: bool) -> None:
        if keep and self.sparse:
            raise ValueError("keep_grad_buffer: a sparse gradient has no buffer; use sparse=False")
        if keep != self.keep_grad_buffer:
            self._kept_gradient = _C.KeptGradient() if keep else None

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes; of the kept gradient, whose memory no copy shares, that it is."""
        state = vars(self).copy()
        if self.keep_grad_buffer:
            state["_kept_gradient"] = True  # so that weights_only has no class of it to allow
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the attributes over."""
        if state.get("_kept_gradient"):
            state = {**state, "_kept_gradient": _C.KeptGradient()}
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Return nn.Embedding's, and what is not the default."""
        options = ("keep_grad_buffer", "add_to_main_grad", "coalesced")
        extra = [name for name in options if getattr(self, name)]
        return ", ".join([super().extra_repr(), *(f"{name}=True" for name in extra)])

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows that `input` names; see :func:`embed_ext.functional.embedding`."""
        # TorchScript compiles the first branch alone.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            assert not self.add_to_main_grad, "add_to_main_grad: TorchScript does not know it"
            if self.max_norm is not None:
                torch.ops.embed_ext.embedding_renorm_(
                    self.weight.detach(), input, self.max_norm, self.norm_type
                )
            padding_idx = -1 if self.padding_idx is None else self.padding_idx
            return torch.ops.embed_ext.embedding(  # type: ignore[no-any-return]
                self.weight,
                input,
                padding_idx,
                self.scale_grad_by_freq,
                self.sparse,
                self.coalesced,
            )
        else:
            # nn.Module.__getattr__ takes longer than a small lookup; it is asked only where weight
            # may be something else than the parameter of that name (parametrized, a plain tensor,
            # a property). No get(): a mapping of somebody's own may do its work in __getitem__.
            compiling = is_compiling()
            weight: Tensor | None = None
            if not compiling and self._finds_weight_as_parameter:
                fields = self.__dict__
                parameters = fields["_parameters"]
                if "weight" in parameters and "weight" not in fields:
                    weight = parameters["weight"]
            if weight is None:
                weight = self.weight
            sparse = self.sparse
            if self.add_to_main_grad:
                check_weight(weight)
                padding_idx = functional.resolve_padding_idx(self.padding_idx, weight)
                if self.max_norm is not None:
                    torch.ops.embed_ext.embedding_renorm_(
                        weight.detach(), input, self.max_norm, self.norm_type
                    )
                return lookup_adding_to_main_grad(
                    weight, input, padding_idx, self.scale_grad_by_freq
                )
            if self.max_norm is None and not compiling:
                return _C.embedding(
                    weight,
                    input,
                    self.padding_idx,
                    self.scale_grad_by_freq,
                    sparse,
                    sparse and self.coalesced,  # a dense lookup does not take the time to ask
                    self._kept_gradient,
                )
            return functional.embedding(
                input,
                weight,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                sparse,
                coalesced=self.coalesced,
            )
