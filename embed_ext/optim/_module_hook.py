"""Hooks that belong to one module and not to its copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ModuleHook:
    """A hook of a module; a copy of the module, and what is loaded from a file, has an idle one."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[type[ModuleHook], tuple[Callable[..., None]]]:
        return ModuleHook, (_idle,)


def _idle(*_: Any) -> None:
    pass
