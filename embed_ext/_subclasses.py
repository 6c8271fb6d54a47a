"""The classes that convert() gives to modules of a subclass of nn.Embedding.

For a user's class ``Scaled`` it is a class of the same name with the bases ``(Swapped, Scaled,
embed_ext.Embedding)``. In its order of resolution embed_ext.Embedding comes after Scaled and before
nn.Embedding, so that ``super().forward`` in Scaled is this project's lookup, and ``isinstance``
holds for all three. Where forward calls ``nn.functional.embedding`` itself, the class has a forward
that calls it under a mode.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from embed_ext import functional
from embed_ext._forwards import STOCK_LOOKUPS, way_of
from embed_ext.modules import Embedding, finds_weight_as_parameter
from embed_ext.routing import is_taken

__all__ = ["original_class", "served_by", "swapped_class", "why_not_subclass"]

_SERVED = {
    "inherited": "by the forward that it inherits",
    "super": "by its super().forward",
    "function": "by the lookups in its forward",
}


class Swapped:
    """Before the user's class: what a class made for a module has to do differently."""

    # Not __slots__ = (): without a __dict__ of its own it would have another layout than a module,
    # and Python would not change a module's class to one that begins with it.

    def __init_subclass__(cls, **_: Any) -> None:
        """Keep the user's hook from it: nobody wrote this class, for a registry for instance."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as the user's class says, and swap what comes out.

        The class itself cannot be found by its name: that is the user's.
        """
        reduced = super().__reduce_ex__(protocol)
        made = type(self)
        kind = original_class(made)
        if kind is None or not isinstance(reduced, tuple):
            return reduced
        make, arguments, *state = reduced
        arguments = tuple(_of_kind(argument, made, kind) for argument in arguments)
        return (_rebuild, (kind, _of_kind(make, made, kind), arguments), *state)


class _Lookups(TorchFunctionMode):
    # Of this thread, as every mode; torch.compile traces through it, so that nothing is left of it
    # in what runs. routing.py says why a mode around a whole model costs too much.
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is STOCK_LOOKUPS[0] or func is F.embedding:
            return _by_function(func, *args, **kwargs)
        if func is STOCK_LOOKUPS[1]:
            return _by_op(*args, **kwargs)
        return func(*args, **kwargs)


_LOOKUPS = _Lookups()


def _forward_with_lookups(kind: type[nn.Embedding]) -> Callable[..., Any]:
    def forward(self: nn.Embedding, *args: Any, **kwargs: Any) -> Any:
        with _LOOKUPS:
            return kind.forward(self, *args, **kwargs)

    # torch.export, for one, asks for the names of arguments. Not functools.wraps: by its mark
    # TorchScript would take the user's code for this one's, and PyTorch's lookup with it.
    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    return forward


def _by_function(stock: Any, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Any:
    lookup = functional.embedding if is_taken(input, weight) else stock
    return lookup(input, weight, *args, **options)


def _by_op(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if not is_taken(indices, weight):
        return torch.embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse)
    # -1 is no row here, and the last one for the function.
    row = None if padding_idx < 0 else padding_idx
    return functional.embedding(
        indices, weight, row, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse
    )


def _of_kind(value: Any, made: type, kind: type) -> Any:
    if value is made:
        return kind
    if getattr(value, "__self__", None) is made:  # a class method
        return getattr(kind, value.__name__)
    return value


def _rebuild(kind: type[nn.Embedding], make: Callable[..., Any], arguments: Any) -> Any:
    """Make the module as its class does, and swap it, where that is still possible."""
    module = make(*arguments)
    if type(module) is kind and why_not_subclass(kind) is None:
        object.__setattr__(module, "__class__", swapped_class(kind))
    return module


# Neither is kept alive: not the user's class, nor the one made for it when no module has it.
_made: weakref.WeakKeyDictionary[type, weakref.ref[type[nn.Embedding]]]
_made = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def swapped_class(kind: type[nn.Embedding]) -> type[nn.Embedding]:
    """Return the class made for a user's class: one for each."""
    with _lock:
        known = _made.get(kind)
        made = None if known is None else known()
        if made is None:
            made = _make(kind)
            _made[kind] = weakref.ref(made)
        return made


def _make(kind: type[nn.Embedding]) -> type[nn.Embedding]:
    # Whoever prints or looks up the class sees the user's.
    members = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    members["_finds_weight_as_parameter"] = finds_weight_as_parameter(kind)
    way = way_of(kind)
    members["_served"] = _SERVED[way or "inherited"]
    if way == "function":
        members["forward"] = _forward_with_lookups(kind)
    metaclass: Any = type(kind)
    made: type[nn.Embedding] = metaclass(kind.__name__, (Swapped, kind, Embedding), members)
    return made


def original_class(made: type) -> type[nn.Embedding] | None:
    """Return the user's class that a class was made for; None if it was not made here."""
    if made.__bases__[0] is not Swapped:
        return None
    kind: type[nn.Embedding] = made.__bases__[1]
    return kind


def served_by(made: type) -> str:
    """Say by what a module of a class that was made here is served; "" of any other class."""
    served: str = vars(made).get("_served", "")
    return served


def why_not_subclass(kind: type[nn.Embedding]) -> str | None:
    """Say why modules of this class are not swapped, whatever is in them; None if they can be."""
    name = f"its class {kind.__module__}.{kind.__qualname__}"
    if issubclass(kind, LazyModuleMixin):
        return f"{name} is lazy, and changes at the first call: convert after that"
    if kind.__new__ is not object.__new__:
        return f"{name} has a __new__ of its own (as fully_shard's: convert first)"
    if kind.__module__.partition(".")[0] == "torch":
        return f"{name} is PyTorch's own, and the tools that made it test for the exact class"
    if type(kind) not in (type, ABCMeta):
        return f"{name} is made by a metaclass of its own, {type(kind).__qualname__}"
    if way_of(kind) is None:
        return f"{name} has a forward of its own, which is not seen to call a lookup"
    try:
        swapped_class(kind)
    except TypeError as error:
        return f"no class can be made for {name[4:]}: {error}"
    return None
