"""Swapping the lookups of a whole model, in place and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from embed_ext._subclasses import original_class, served_by, swapped_class, why_not_subclass
from embed_ext._support import why_not
from embed_ext.modules import Embedding

__all__ = ["ConversionReport", "Entry", "convert", "revert"]

Where: TypeAlias = "str | Iterable[str] | Callable[[str, nn.Module], bool] | None"

# What embed_ext.Embedding reads, and keeps in the module's own attributes. keep_grad_buffer is a
# property, which is kept in the first.
_STATE = ("_kept_gradient", "add_to_main_grad", "coalesced")
_NAMES = (*_STATE, "keep_grad_buffer")

_ROUTED = "embed_ext.routed() serves it as it is"
_ROUTED_INSIDE = "embed_ext.routed() serves what it looks up through nn.functional.embedding"


@dataclass(frozen=True)
class Entry:
    """One module of a :class:`ConversionReport`.

    Attributes:
        names: every name under which the model holds it; "" is the model itself.
        module: its class and options.
        reason: why it was left; empty if it was not.
        served: of a subclass that was converted: by what it is served; empty for nn.Embedding's.

    Example:
        >>> import embed_ext, torch
        >>> entry, = embed_ext.convert(torch.nn.Sequential(torch.nn.Embedding(5, 3))).swapped
        >>> entry.names, entry.module
        (('0',), 'Embedding(5, 3)')
    """

    names: tuple[str, ...]
    module: str
    reason: str = ""
    served: str = ""

    def __str__(self) -> str:
        names = " = ".join(name or "(the model itself)" for name in self.names)
        remarks = (self.reason, self.served and f"served {self.served}")
        return "\n    ".join([f"{names}: {self.module}", *filter(None, remarks)])


@dataclass(frozen=True, repr=False)
class ConversionReport:
    """What :func:`convert` or :func:`revert` did; printed, it says so line by line.

    Attributes:
        action: "convert" or "revert".
        swapped: the modules whose class was changed.
        already: those that were of the wanted class before.
        left: every other nn.Embedding, each with the reason.

    Example:
        >>> import embed_ext, torch
        >>> model = torch.nn.ModuleDict({"words": torch.nn.Embedding(9, 3)})
        >>> model["same"] = model["words"]
        >>> print(embed_ext.convert(model))
        embed_ext.convert: 1 swapped, 0 already there, 0 left
        swapped:
          words = same: Embedding(9, 3)
    """

    action: str
    swapped: tuple[Entry, ...]
    already: tuple[Entry, ...]
    left: tuple[Entry, ...]

    def __str__(self) -> str:
        lines = [
            f"embed_ext.{self.action}: {len(self.swapped)} swapped, {len(self.already)} already "
            f"there, {len(self.left)} left"
        ]
        for title in ("swapped", "already", "left"):
            entries: tuple[Entry, ...] = getattr(self, title)
            if entries:
                lines += [f"{title}:", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)

    __repr__ = __str__  # what a session shows of a call that nobody printed


def convert(model: nn.Module, *, where: Where = None) -> ConversionReport:
    """Make every ``nn.Embedding`` of a model, or the model itself, an :class:`embed_ext.Embedding`.

    In place: each module stays the object that it was, and only its class changes. Its parameters,
    hooks, buffers, flags, names and other attributes are therefore the same objects as before;
    optimizers, tied weights and modules held in two places notice nothing, and a compiled model
    recompiles at its next call. Calling it again changes nothing.

    A module of a subclass gets a class that is made for its own: of the same name, a subclass of
    it and of embed_ext.Embedding, with its forward. The report says by what it is served: by the
    forward that it inherits, by its ``super().forward``, or by the lookups in its forward (of
    ``torch.nn.functional``; these take the time of a ``TorchFunctionMode``, some microseconds, and
    do not know the options of embed_ext.Embedding).

    Left as they are, with the reason in the report: subclasses whose forward is not seen to call
    a lookup, modules whose `forward` was replaced, TorchScript modules, modules that have
    attributes of the names of embed_ext.Embedding's options, and tables that embed_ext's ops do
    not take (a tensor subclass such as a quantized weight, a quantized dtype, another device).
    :func:`embed_ext.routed` serves the lookups of most of them, and those that other modules do
    with a module's weight.

    Args:
        model: any module.
        where: which modules to consider; all by default. A pattern or several, as in a shell
            (``"encoder.*"``), of which the module's name must match one; or a function that is
            given the name and the module. A module with several names needs one that is selected.

    Returns:
        A :class:`ConversionReport`.

    Raises:
        TypeError: `model` is not an nn.Module.

    Example:
        >>> import embed_ext, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 3), torch.nn.Linear(3, 2))
        >>> print(embed_ext.convert(model))
        embed_ext.convert: 1 swapped, 0 already there, 0 left
        swapped:
          0: Embedding(10, 3)
        >>> type(model[0])
        <class 'embed_ext.modules.Embedding'>
    """
    # To read a class's code takes longer than all else: once for each class.
    reason = partial(_why_not_converted, cache(why_not_subclass))
    return _swap("convert", model, where, _converted_class, reason)


def revert(model: nn.Module, *, where: Where = None) -> ConversionReport:
    """Undo :func:`convert`: make every :class:`embed_ext.Embedding` a plain ``nn.Embedding``.

    A module of a subclass gets back the class that it had.

    In place, like :func:`convert`, and for modules that were created as embed_ext.Embedding too:
    the two differ in nothing but their class, and in `keep_grad_buffer`, `add_to_main_grad` and
    `coalesced`, which are forgotten. Afterwards nothing of the model needs embed_ext, as when it is
    to be pickled, or handed to a tool that tests for the exact class. Left, with a reason:
    subclasses of embed_ext.Embedding that somebody wrote.

    Args:
        model: any module.
        where: which modules to consider, as in :func:`convert`.

    Returns:
        A :class:`ConversionReport`.

    Raises:
        TypeError: `model` is not an nn.Module.

    Example:
        >>> import embed_ext, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 3))
        >>> embed_ext.convert(model).swapped == embed_ext.revert(model).swapped
        True
        >>> type(model[0])
        <class 'torch.nn.modules.sparse.Embedding'>
    """
    return _swap("revert", model, where, _reverted_class, _why_not_reverted)


def _converted_class(kind: type[nn.Embedding]) -> type[nn.Embedding]:
    return Embedding if kind is nn.Embedding else swapped_class(kind)


def _reverted_class(kind: type[nn.Embedding]) -> type[nn.Embedding]:
    return original_class(kind) or nn.Embedding


def _swap(
    action: str,
    model: nn.Module,
    where: Where,
    target: Callable[[type[nn.Embedding]], type[nn.Embedding]],
    why_not_swapped: Callable[[nn.Module], str | None],
) -> ConversionReport:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{action}(): expected an nn.Module, but got {type(model).__name__}")
    selected = _selector(where)
    swapped, already, left = [], [], []
    for module, names in _embeddings(model).items():
        reason = why_not_swapped(module)
        shown = f"{type(module).__name__}({module.extra_repr()})"
        entry = Entry(names, shown)
        if reason == "":
            already.append(entry)
        elif not any(selected(name, module) for name in names):
            left.append(Entry(names, shown, "not selected by `where`"))
        elif reason is not None:
            left.append(Entry(names, shown, reason))
        else:
            kind: Any = type(module)
            try:
                _change_class(module, target(kind))
            except TypeError as error:  # __slots__, for one, that do not fit
                left.append(Entry(names, shown, f"Python does not change its class: {error}"))
                continue
            swapped.append(Entry(names, shown, served=served_by(type(module))))
    return ConversionReport(action, tuple(swapped), tuple(already), tuple(left))


def _change_class(module: nn.Module, target: type[nn.Embedding]) -> None:
    # The two classes have the same layout and all state is in __dict__: no copy, no second object
    # for whoever holds this one. torch's parametrize does the same.
    object.__setattr__(module, "__class__", target)
    if not issubclass(target, Embedding):
        # Memory that nobody would use again, and options that nobody would read.
        for name in _STATE:
            vars(module).pop(name, None)
    vars(module).pop("forward", None)  # see _is_patched: the method of the class before
    # torch 2.11: Dynamo checks a class again only where the dict below it was written to.
    vars(module)["_swapped"] = True
    del vars(module)["_swapped"]


def _selector(where: Where) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda name, module: True
    if callable(where):
        return where
    patterns = (where,) if isinstance(where, str) else tuple(where)
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in patterns)


def _embeddings(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    found: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding) or _is_scripted(module):
            found[module] = (*found.get(module, ()), name)
    return found


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and module.original_name == "Embedding"


def _is_patched(module: nn.Module) -> bool:
    # A hook that has put back what it replaced (Accelerate's do) leaves the class's own method.
    forward = vars(module).get("forward")
    if forward is None:
        return False
    own = getattr(forward, "__func__", None) is type(module).forward
    return not (own and forward.__self__ is module)


def _why_not_converted(why_not_class: Callable[..., str | None], module: nn.Module) -> str | None:
    # None: it can be; "": it is already.
    kind = type(module)
    if isinstance(module, Embedding):
        return ""
    if _is_scripted(module):
        return "it is TorchScript, compiled as it stands: convert first, script then"
    if is_parametrized(module):
        return f"it is parametrized: convert first, parametrize then; or {_ROUTED}"
    if _is_patched(module):
        return f"its forward was replaced on the instance; {_ROUTED_INSIDE}"
    stock = nn.Embedding.forward
    if stock.__module__ != nn.Embedding.__module__ or hasattr(stock, "__wrapped__"):
        return f"nn.Embedding.forward itself was replaced; {_ROUTED_INSIDE}"
    taken = next((name for name in _NAMES if hasattr(module, name)), None)
    if taken is not None:
        return f"its attribute {taken} would be an option of embed_ext.Embedding; {_ROUTED_INSIDE}"
    if issubclass(kind, nn.Embedding) and kind is not nn.Embedding:
        reason = why_not_class(kind)
        if reason is not None:
            return f"{reason}; {_ROUTED_INSIDE}"
    # Pruning, for one, keeps the weight as an attribute that is no parameter. Without any weight
    # both classes raise the same error.
    weight = getattr(module, "weight", None)
    return None if weight is None else why_not(weight)


def _why_not_reverted(module: nn.Module) -> str | None:
    if type(module) is Embedding or original_class(type(module)) is not None:
        if _is_patched(module):
            return "its forward was replaced on the instance, and may call the one to be removed"
        return None
    if isinstance(module, Embedding):
        if is_parametrized(module):
            return "it is parametrized: remove the parametrization first"
        return f"its class {type(module).__qualname__} is a subclass of embed_ext.Embedding"
    return "it is TorchScript, compiled as it stands" if _is_scripted(module) else ""
