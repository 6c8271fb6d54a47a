"""What the tests of the CUDA half share beyond tests.common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.common import HAS_CUDA

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device, or a CPU-only build"),
]

# One width a kernel's way: less than a vector, odd, a part of a warp, a warp, several chunks.
WIDTHS = (1, 2, 3, 8, 31, 50, 64, 65, 100, 128, 257, 1024)


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Run with torch.use_deterministic_algorithms(enabled)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def whole_numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values whose sums have no rounding, in whatever order they are added."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def row_sums(grad: Tensor, indices: Tensor, num_rows: int) -> Tensor:
    """The dense gradient [num_rows, D] in float64, of grad [N, D] and indices [N] in range."""
    sums = torch.zeros(num_rows, grad.size(1), dtype=torch.float64, device=grad.device)
    return sums.index_add_(0, indices.long(), grad.double())
