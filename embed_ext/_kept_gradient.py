"""The search for writes that a kept gradient does not notice."""

from __future__ import annotations

from embed_ext import _C


def set_verify_kept_gradients(on: bool) -> None:
    """Search each kept gradient for writes by others before it is used again; for debugging.

    See ``keep_grad_buffer`` of :class:`embed_ext.Embedding`, whose own search is of a sample after
    the first gradients, and which clears and warns where this raises. It reads the whole table. The
    environment variable ``EMBED_EXT_VERIFY_KEPT_GRADIENTS=1`` switches it on from the start. With
    it, a backward that finds a number that should be zero raises RuntimeError naming the row.

    Example:
        >>> import embed_ext
        >>> embed_ext.set_verify_kept_gradients(True)
        >>> embed_ext.verify_kept_gradients()
        True
        >>> embed_ext.set_verify_kept_gradients(False)
    """
    _C.set_verify_kept_gradients(on)


def verify_kept_gradients() -> bool:
    """Return what :func:`set_verify_kept_gradients` set.

    Example:
        >>> import embed_ext
        >>> embed_ext.verify_kept_gradients()
        False
    """
    return _C.verify_kept_gradients()
