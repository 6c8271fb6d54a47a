"""How the forward of a subclass of nn.Embedding looks up, as far as its code shows."""

from __future__ import annotations

import builtins
import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from embed_ext.functional import TORCH_EMBEDDING

__all__ = ["STOCK_LOOKUPS", "Way", "way_of"]

# "inherited": forward is nn.Embedding's own. "super": it calls super().forward, which gets there.
# "function": it calls one of STOCK_LOOKUPS itself.
Way: TypeAlias = Literal["inherited", "super", "function"]

# PyTorch's own, also while embed_ext.routed() has another function in their place.
STOCK_LOOKUPS = (TORCH_EMBEDDING, torch.embedding)
_LOOKUPS = (*STOCK_LOOKUPS, nn.Embedding.forward)
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}
_SUPER_ATTRIBUTE = {*_ATTRIBUTE, "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD"}


def way_of(kind: type[nn.Embedding]) -> Way | None:
    """Say how forward gets to a lookup; None where its code does not show that it does.

    What is read is forward, and the methods of the subclass that it names. That errs on the side of
    None: a helper outside of the class, or a callable that is no function, is not looked into.
    """
    first = _owner(kind, "forward")
    if first is nn.Embedding:
        return "inherited"
    todo = [(first, "forward")]
    seen = set(todo)
    reaches_super = False
    while todo:
        owner, name = todo.pop()
        if owner is nn.Embedding and name == "forward":
            reaches_super = True
        if owner is None or issubclass(nn.Embedding, owner):
            continue
        for what, value in _loads(inspect.unwrap(vars(owner)[name])):
            if what == "value" and any(value is lookup for lookup in (*_LOOKUPS, F.embedding)):
                return "function"
            if what == "super":
                following = (_owner(kind, value, after=owner), value)
            elif what == "attribute" and value != "forward":
                following = (_owner(kind, value), value)
            else:
                continue
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return "super" if reaches_super else None


def _owner(kind: type, name: str, after: type | None = None) -> type | None:
    mro = kind.__mro__
    start = 0 if after is None else mro.index(after) + 1
    return next((cls for cls in mro[start:] if name in vars(cls)), None)


def _loads(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function's code loads.

    ("value", v): a global, or an attribute of a module or class that was reached from one.
    ("super", name): the attribute of ``super()``. ("attribute", name): one of anything else.
    """
    if not isinstance(function, FunctionType):
        return
    names = {**vars(builtins), **function.__globals__}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    names.update((name, cell.cell_contents) for name, cell in cells if _is_filled(cell))
    todo = [function.__code__]
    while todo:
        code = todo.pop()
        yield from _loads_of_code(code, names)
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _loads_of_code(code: CodeType, names: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    value: Any = None
    after_super = False
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation in ("LOAD_GLOBAL", "LOAD_DEREF"):
            value = names.get(name)
            after_super = after_super or value is super
            yield "value", value
        elif after_super and operation in _SUPER_ATTRIBUTE:
            after_super = False
            yield "super", name
        elif operation in _ATTRIBUTE and isinstance(value, (ModuleType, type)):
            value = getattr(value, name, None)
            yield "value", value
        elif operation in _ATTRIBUTE:
            yield "attribute", name
        elif operation not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL"):
            value = None
