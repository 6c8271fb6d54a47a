"""What an optimizer keeps of a table: the states that it begins with, and its counted steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embed_ext._memory import untouched_zeros
from embed_ext._support import PLAIN_TYPES, why_not

LOW_PRECISION = (torch.bfloat16, torch.float16)
_64_BITS = (1 << 64) - 1


def why_not_by_rows(table: Tensor) -> str | None:
    """Say why rows of a table [V, D] are not stepped; None if they are.

    As ``why_not``, but of DTensors lookups alone have rules.
    """
    return why_not(table, PLAIN_TYPES)


def is_low_precision_table(parameter: Tensor) -> bool:
    """Whether a parameter may be a table whose states are wider than itself."""
    if parameter.dtype not in LOW_PRECISION or parameter.dim() != 2:
        return False
    return why_not_by_rows(parameter) is None


def dtype_beside(table: Tensor) -> torch.dtype:
    """Return what rows are computed in, and states are: float64 for float64, else float32."""
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def lazy_zeros(table: Tensor, per_row: bool = False) -> Tensor:
    """Return the state that a table [V, D] begins with: zeros [V, D], or [V] if `per_row`.

    On the CPU a row's memory exists once the row is used.
    """
    shape = table.shape[:1] if per_row else table.shape
    return untouched_zeros(shape, dtype_beside(table), table.device)


def step_seed(seed: int, position: int, step: int) -> int:
    """Return a seed, an int64, for one step of one table.

    The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014) after each of the three numbers, so that neighbours have nothing in common.
    """
    mixed = 0
    for part in (seed, position, step):
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & _64_BITS
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _64_BITS
        mixed ^= mixed >> 31
    return mixed - (1 << 64) if mixed >> 63 else mixed


def step_of(state: dict[str, Any]) -> Tensor:
    """Return the count of a table's steps in its state, a 0-dim tensor, on the CPU to be read."""
    step = state.get("step")
    if step is None:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    return torch.as_tensor(step, device="cpu")
