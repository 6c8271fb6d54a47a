"""The tests' shared vocabulary: devices, dtypes, tolerances, index and table generators."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import embed_ext
from embed_ext._index_check import Mode

# Whether this is the build for tests/emulator, whose CUDA kernels serve CPU tensors.
EMULATED = embed_ext.build_info().cuda_archs == "emulated"
HAS_CUDA = (
    embed_ext.build_info().cuda_archs is not None and not EMULATED and torch.cuda.is_available()
)


def runs_cuda_kernels(device: str) -> bool:
    """Whether the ops on tensors of this device are the CUDA ones, be it emulated."""
    return device == "cuda" or EMULATED


INDEX_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
)
REAL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
GRAD_DTYPES = REAL_DTYPES + COMPLEX_DTYPES
FROZEN_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

# Relative and absolute error that one rounding of a short sum may leave, by dtype.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float64: (1e-12, 1e-12),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
    torch.complex64: (1e-5, 1e-5),
    torch.complex128: (1e-12, 1e-12),
}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare within the tolerance of the actual tensor's dtype; shape, layout and dtype count."""
    rtol, atol = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes [..., itemsize], by which NaNs equal themselves and -0.0 is not 0.0."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().unsqueeze(-1).view(torch.uint8)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Compare bit by bit; shape and dtype count."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(bits(actual), bits(expected)), f"{actual} is not {expected}"


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator, so that both devices get the same numbers."""
    return torch.Generator().manual_seed(seed)


def make_table(
    num_rows: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Tensor:
    """A table [num_rows, width] of random values that every dtype can hold."""
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        values = torch.randn(num_rows, width, generator=generator(seed), dtype=wide)
    else:
        values = torch.randint(0, 2, (num_rows, width), generator=generator(seed))
    return values.to(dtype).to(device)


def make_indices(
    shape: tuple[int, ...],
    num_rows: int,
    dtype: torch.dtype = torch.int64,
    device: str = "cpu",
    seed: int = 1,
) -> Tensor:
    """Indices of the given shape, uniform over the rows that the dtype can name."""
    largest = torch.iinfo(dtype).max
    values = torch.randint(0, min(num_rows, largest), shape, generator=generator(seed))
    return values.to(dtype).to(device)


def expand_scalar(table: Tensor) -> Tensor:
    """The first element of a table [V, D], seen as a table of that shape with zero strides."""
    return table.reshape(-1)[:1].expand(table.shape)


# Views with the same values [V, D] and other strides; each costs a copy, none shares memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda table: table.clone(),
    "transposed": lambda table: table.t().contiguous().t(),
    "rows_sliced": lambda table: table.repeat_interleave(2, dim=0)[::2],
    "columns_sliced": lambda table: table.repeat(1, 2)[:, : table.size(1)],
    "columns_strided": lambda table: table.repeat_interleave(3, dim=1)[:, ::3],
}


# Options that nn.Embedding takes too, and in combinations that it takes.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 2},
    "padding_first": {"padding_idx": 0},
    "padding_negative": {"padding_idx": -1},
    "max_norm": {"max_norm": 1.0},
    "max_norm_l1": {"max_norm": 1.5, "norm_type": 1.0},
    "frequency": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True},
    "sparse_padding": {"padding_idx": 2, "sparse": True},
    "all_dense": {"padding_idx": 3, "max_norm": 1.0, "norm_type": 3.0, "scale_grad_by_freq": True},
}


def make_pair(*args: Any, **kwargs: Any) -> tuple[embed_ext.Embedding, nn.Embedding]:
    """The module and nn.Embedding, of the same arguments and the same weights, apart in memory."""
    ours = embed_ext.Embedding(*args, **kwargs)
    theirs = nn.Embedding(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same_step(ours: nn.Module, theirs: nn.Module, indices: Tensor) -> None:
    """Run forward and backward of both on the same numbers; compare outputs and all parameters."""
    expected = theirs(indices)
    actual = ours(indices)
    assert_close(actual, expected)
    grad = torch.randn(expected.shape, generator=generator(), dtype=torch.float64)
    for out in (actual, expected):
        out.backward(grad.to(out))
    expected_parameters = dict(theirs.named_parameters())
    actual_parameters = dict(ours.named_parameters())
    assert actual_parameters.keys() == expected_parameters.keys()
    for name, parameter in actual_parameters.items():
        assert_close(parameter.detach(), expected_parameters[name].detach())
        expected_grad = expected_parameters[name].grad
        assert expected_grad is not None and parameter.grad is not None
        assert_close(parameter.grad, expected_grad)


@contextmanager
def index_check_is(mode: Mode) -> Iterator[None]:
    """Under it, this mode says when bad indices on a GPU are reported."""
    before = embed_ext.index_check()
    embed_ext.set_index_check(mode)
    try:
        yield
    finally:
        embed_ext.set_index_check(before)


class OpLog(TorchDispatchMode):
    """Notes the name of each op that runs under it, as in "aten.add.Tensor"."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def run_python(
    code: str, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds this embed_ext, with these variables set.

    The timeout is there to end a deadlock, not to measure anything.
    """
    package_root = Path(embed_ext.__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(package_root), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
