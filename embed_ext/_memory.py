"""The memory of large CPU gradients and outputs that waits for the next step."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from embed_ext import _C

# Below this, zeros that are written cost less than pages that the system makes.
_SMALLEST_UNTOUCHED = 1 << 20


def cached_bytes() -> int:
    """Return how many bytes of CPU memory wait to be used again.

    A gradient of 1 MiB and more and an output of 32 MiB and more, on the CPU, are not given back to
    the system when their tensor dies: the next step's are made there, without page faults. What
    waits and what is in use are together never more than what was once in use. Blocks of 32 MiB and
    more count as resident, but the system takes their pages whenever it needs memory.

    Example:
        >>> import torch, embed_ext
        >>> table = embed_ext.Embedding(100_000, 8)
        >>> table(torch.tensor([1, 2])).sum().backward()
        >>> table.zero_grad()
        >>> embed_ext.cached_bytes() >= 100_000 * 8 * 4
        True
    """
    return _C.cached_bytes()


def empty_cache() -> int:
    """Give the memory that waits (:func:`cached_bytes`) back to the system; return its bytes.

    For a process that has trained and goes on with something else. In a training loop it only
    makes the next step slower.

    Example:
        >>> import embed_ext
        >>> _ = embed_ext.empty_cache()
        >>> embed_ext.cached_bytes()
        0
    """
    return _C.empty_cache()


def untouched_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that, on the CPU, take up no memory until they are written to, page by page.

    As the system maps them: of a state of ten million rows of which a thousand are ever used, a
    thousand pages come to be. torch.zeros, which makes those of other devices, writes its zeros.

    Example:
        >>> import torch
        >>> from embed_ext._memory import untouched_zeros
        >>> shape = torch.Size([1_000_000, 64])
        >>> untouched_zeros(shape, torch.float32, torch.device("cpu"))[999_999].sum()
        tensor(0.)
    """
    size = shape.numel() * dtype.itemsize
    is_mapped = device.type == "cpu" and hasattr(mmap, "MAP_ANONYMOUS")  # not on Windows
    if size < _SMALLEST_UNTOUCHED or not is_mapped:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # else some systems make 2 MiB of a row
        with contextlib.suppress(OSError):  # a kernel that has no huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
