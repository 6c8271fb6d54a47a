"""When a bad index on a CUDA device is reported."""

from __future__ import annotations

from typing import Literal, cast

from embed_ext import _C

Mode = Literal["lazy", "sync", "none"]


def set_index_check(mode: Mode) -> None:
    """Choose when a bad index in a CUDA tensor is reported, for the whole process.

    A bad index never reads or writes outside the table; its output row is zero. The environment
    variable ``EMBED_EXT_INDEX_CHECK`` sets the mode that a process starts with. On the CPU the
    mode plays no part: the call that got the bad index raises.

    Args:
        mode: ``"lazy"`` (default): the next call, the backward or :func:`check_indices` raises
            IndexError, and no call waits for the device. Each device keeps one report: of several
            bad indices any one may be it, and until it is raised, by whichever thread calls next,
            others are not reported. ``"sync"``: the call itself raises, after waiting for the
            device, and for its own indices only. ``"none"``: calls neither report nor raise. A
            report that was left before stays, for :func:`check_indices` or the first call in
            another mode to raise. In every mode a lookup in a table without rows raises at once.

    Raises:
        ValueError: for any other mode.

    Example:
        >>> import embed_ext
        >>> embed_ext.set_index_check("sync")
        >>> embed_ext.index_check()
        'sync'
        >>> embed_ext.set_index_check("lazy")
    """
    _C.set_index_check(mode)


def index_check() -> Mode:
    """Return the mode that :func:`set_index_check` set.

    Example:
        >>> import embed_ext
        >>> embed_ext.index_check()
        'lazy'
    """
    return cast(Mode, _C.index_check())


def check_indices() -> None:
    """Wait for every CUDA device in use and raise what a lazy check has found, in any mode.

    Raises:
        IndexError: naming the index, its position and the number of rows.

    Example:
        >>> import embed_ext
        >>> embed_ext.check_indices()
    """
    _C.check_indices()
