"""What the tests of the CUDA half share beyond tests.common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.common import EMULATED, HAS_CUDA

DEVICE = "cpu" if EMULATED else "cuda"  # of the tensors that the CUDA kernels take

needs_cuda = (
    [pytest.mark.emulated]
    if EMULATED
    else [
        pytest.mark.cuda,
        pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device, or a CPU-only build"),
    ]
)


def not_emulated(why: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(EMULATED, reason=f"the emulated device {why}")


needs_gpu = not_emulated("has no streams, no graphs and no count of its memory")

# One width a kernel's way: less than a vector, odd, a part of a warp, a warp, several chunks.
WIDTHS = (1, 2, 3, 8, 31, 50, 64, 65, 100, 128, 257, 1024)


def synchronize() -> None:
    """Wait until all kernels are through, which those of the emulated device are at once."""
    if not EMULATED:
        torch.cuda.synchronize()


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
