"""Why a provider is not timed, from the error that it met."""

from __future__ import annotations

import torch

from benchmarks.environment import available_memory_bytes, without_folders
from benchmarks.record import Rejection
from benchmarks.verify import WrongResult


class TooLarge(Exception):
    """A case needs more memory than there is; the message says how much."""


def check_memory(needed: int, device: str) -> None:
    """Raise TooLarge if that many bytes are not free."""
    available = available_memory_bytes(device)
    if available is not None and needed > available:
        raise TooLarge(f"needs {needed / 2**30:.1f} GiB of memory")


def rejection(error: Exception, case: str, provider: str, mode: str = "") -> Rejection:
    """What is written down of an error, of one mode or of all."""
    reason = (str(error).splitlines() or [""])[0]
    if not isinstance(error, (TooLarge, WrongResult)):
        reason = without_folders(f"{type(error).__name__}: {reason}")
    reason = f"{mode}: {reason}" if mode else reason
    if isinstance(error, WrongResult):
        return Rejection(case, provider, "wrong", reason)
    fits = not isinstance(error, (TooLarge, torch.OutOfMemoryError))
    return Rejection(case, provider, "failed" if fits else "skipped", reason)
