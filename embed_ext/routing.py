"""Serving the lookups of modules that keep their class, by way of ``nn.functional.embedding``.

How, and why so. ``nn.Embedding.forward``, and what subclasses call by ``super().forward``, look
``embedding`` up in ``torch.nn.functional`` at each call. While anybody routes, a function of ours
stands there, which asks a global and a thread-local switch whose turn it is; while nobody does,
PyTorch is as it was. A ``TorchFunctionMode`` would need no such replacement, and would reach a
function imported earlier, too, but every torch function of the model then takes a detour through
Python: a GPT-2 of four layers and width 64 took 45% longer on a CPU, where this costs a lookup
about a microsecond and the rest nothing. A mode cannot reach other threads either.

torch.compile inlines the function and guards on what it read. That holds for a plain
``threading.local`` (torch 2.13): a ContextVar cannot be traced, and changes to a subclass of
``threading.local`` with a default in its class go unnoticed.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from embed_ext import functional
from embed_ext._support import INDEX_DTYPES, TENSOR_TYPES, why_not

__all__ = ["is_routed", "is_taken", "route", "routed"]

_lock = threading.Lock()
_num_users = 0  # contexts that are open in any thread, and one for the global switch
_everywhere = False  # the global switch
_here = threading.local()  # .enabled: what the innermost context of this thread says, or None
_torch_embedding = F.embedding  # what was there when we took its place
_is_covered = False  # when we left it, somebody else had taken it


def is_routed() -> bool:
    """Return whether ``nn.functional.embedding`` is routed for this thread.

    Example:
        >>> import embed_ext
        >>> with embed_ext.routed():
        ...     embed_ext.routing.is_routed()
        True
    """
    enabled = getattr(_here, "enabled", None)
    return _everywhere if enabled is None else enabled


@contextmanager
def routed(enabled: bool = True) -> Iterator[None]:
    """Run ``nn.functional.embedding`` by this project's op, for this thread, within a ``with``.

    It reaches what calls ``torch.nn.functional.embedding`` by that name: every nn.Embedding and
    every subclass that calls ``super().forward``. It does not reach a name that was bound before
    (``from torch.nn.functional import embedding``), nor ``torch.embedding`` and TorchScript. What
    embed_ext does not take (a tensor subclass, another device, see :func:`embed_ext.convert`)
    goes to PyTorch's own lookup. A gradient keeps the formula of its forward.

    Contexts nest, the innermost decides, and it also decides over :func:`route`. Other threads are
    not affected; tasks of an event loop share their thread. torch.compile recompiles once on a
    change; the ``with`` belongs around the call of what is compiled. The first use in a process
    imports torch._dynamo (a second or so), which must see PyTorch unrouted once.

    Args:
        enabled: False has PyTorch's lookup run within the ``with``.

    Example:
        >>> import embed_ext, torch
        >>> class Scaled(torch.nn.Embedding):
        ...     def forward(self, input):
        ...         return super().forward(input) * self.embedding_dim**0.5
        >>> with embed_ext.routed():
        ...     print(Scaled(10, 4)(torch.tensor([1])).grad_fn.next_functions[0][0].name())
        embed_ext::EmbeddingBackward
    """
    before = getattr(_here, "enabled", None)
    _add_users(1)
    _here.enabled = enabled
    try:
        yield
    finally:
        _here.enabled = before
        _add_users(-1)


def route(enabled: bool = True) -> None:
    """Route ``nn.functional.embedding`` to this project's op in all threads, or no longer.

    What is reached, and what is not, is said in :func:`routed`.

    Example:
        >>> import embed_ext
        >>> embed_ext.route(True)
        >>> embed_ext.routing.is_routed()
        True
        >>> embed_ext.route(False)
    """
    global _everywhere
    with _lock:
        change = int(bool(enabled)) - int(_everywhere)
        _everywhere = bool(enabled)
    _add_users(change)


def _add_users(change: int) -> None:
    global _num_users
    # Dynamo's list of functions that it does not inline is made by name when it is imported. Made
    # now, it would hold our function, and no change would ever be noticed.
    importlib.import_module("torch._dynamo")
    with _lock:
        was_used = _num_users > 0
        _num_users += change
        if _num_users > 0 and not was_used:
            _take_the_place()
        elif _num_users == 0 and was_used:
            _leave_the_place()


def _take_the_place() -> None:
    global _torch_embedding, _is_covered
    # Somebody who replaced the function after us still calls ours: to take it for PyTorch's would
    # be a loop.
    if _is_covered and F.embedding is not _torch_embedding:
        return
    _is_covered = False
    if F.embedding is not _embedding:
        _torch_embedding = F.embedding
        F.embedding = _embedding


def _leave_the_place() -> None:
    global _is_covered
    _is_covered = F.embedding is not _embedding
    if not _is_covered:
        F.embedding = _torch_embedding


def is_taken(input: Tensor, weight: Tensor) -> bool:
    """Whether the ops take these indices (*) and this table [V, D]."""
    return type(input) in TENSOR_TYPES and input.dtype in INDEX_DTYPES and why_not(weight) is None


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up by embed_ext where that is asked for and possible, else by PyTorch."""
    # TorchScript compiles the first branch alone.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _torch_embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    else:
        return _choose(
            input,
            weight,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
        )


def _choose(input: Tensor, weight: Tensor, **options: Any) -> Tensor:
    # handle_torch_function is given the options by name, as by torch: overrides count on it.
    relevant = (input, weight)
    if is_routed() and is_taken(input, weight):
        if has_torch_function_variadic(input, weight):  # a mode, which may call _embedding again
            return handle_torch_function(_embedding, relevant, input, weight, **options)
        return functional.embedding(input, weight, **options)
    # Subclasses know torch's function by identity; torch's own body would pass on the name, which
    # is ours now.
    if has_torch_function_variadic(input, weight):
        return handle_torch_function(_torch_embedding, relevant, input, weight, **options)
    return _torch_embedding(input, weight, **options)
