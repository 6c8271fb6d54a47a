"""The same bits from every number of threads, and but for NaNs from every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.common import (
    REAL_DTYPES,
    assert_same_bits,
    generator,
    make_indices,
    make_table,
    run_python,
)
from tests.ops.updates import METHODS, make_update

ops = torch.ops.embed_ext

# Large enough to be split among threads; two rows are hot enough to be summed in chunks.
TOKENS, ROWS, WIDTH = 12_000, 3000, 33


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tokens() -> Tensor:
    """Indices [TOKENS], a third of them on two rows."""
    indices = make_indices((TOKENS,), ROWS)
    indices[::6] = 7
    indices[1::6] = 2999
    return indices


def renormed(weight: Tensor, indices: Tensor) -> Tensor:
    """A renormed copy of weight [V, D]."""
    copy = weight.clone()
    ops.embedding_renorm_(copy, indices, 2.0, 3.0)
    return copy


def updated(name: str, dtype: torch.dtype) -> Tensor:
    """What an optimizer's update of most rows leaves, all of it as one row."""
    update = make_update(METHODS[name], ROWS, WIDTH, ROWS - 100, dtype)
    seed = 3 if dtype in (torch.bfloat16, torch.float16) else None
    return torch.cat([written.double().flatten() for written in update.run(seed=seed)])


def updated_by_entries(name: str, dtype: torch.dtype) -> Tensor:
    """What an update by a gradient of `tokens()` leaves, all of it as one row."""
    update = make_update(METHODS[name], ROWS, WIDTH, 0, dtype)
    update = replace(update, indices=tokens(), values=make_table(TOKENS, WIDTH, dtype, seed=4))
    return torch.cat([w.double().flatten() for w in update.run(coalesced=False)])


COMPUTATIONS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "embedding": lambda dtype: ops.embedding(make_table(ROWS, WIDTH, dtype), tokens()),
    "strided embedding": lambda dtype: ops.embedding(make_table(WIDTH, ROWS, dtype).t(), tokens()),
    "dense backward": lambda dtype: ops.embedding_dense_backward(
        make_table(TOKENS, WIDTH, dtype), tokens(), ROWS, 5
    ),
    "scaled dense backward": lambda dtype: ops.embedding_dense_backward(
        make_table(TOKENS, WIDTH, dtype), tokens(), ROWS, -1, True
    ),
    "sparse backward": lambda dtype: ops.embedding_sparse_backward(
        make_table(TOKENS, WIDTH, dtype), tokens(), ROWS, 7, True
    )._values(),
    "coalesced backward": lambda dtype: ops.embedding_sparse_backward(
        make_table(TOKENS, WIDTH, dtype), tokens(), ROWS, 5, False, True
    )._values(),
    "renorm": lambda dtype: renormed(make_table(ROWS, WIDTH, dtype), tokens()),
    **{name: partial(updated, name) for name in METHODS},
    **{f"{name}, by entries": partial(updated_by_entries, name) for name in METHODS},
}


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("name", COMPUTATIONS)
def test_every_number_of_threads(name: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = COMPUTATIONS[name](dtype)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(COMPUTATIONS[name](dtype), expected)


LARGE, LARGE_ROWS = 40_000, 70_000  # tokens enough that the sort is shared among threads as well


def by_rank(num_rows: int) -> Tensor:
    """Indices [LARGE] of a Zipf distribution: row 0 is the most frequent one, row 1 the next."""
    weights = torch.arange(1, num_rows + 1, dtype=torch.float64).pow(-1.05).cumsum(0)
    draws = torch.rand(LARGE, dtype=torch.float64, generator=generator()) * weights[-1]
    return torch.searchsorted(weights, draws).clamp_max(num_rows - 1)


BATCHES: dict[str, Callable[[], Tensor]] = {
    "uniform": lambda: make_indices((LARGE,), LARGE_ROWS),
    "zipf by rank": lambda: by_rank(LARGE_ROWS),
    "one row": lambda: torch.full((LARGE,), LARGE_ROWS - 1),
    "half padding": lambda: (
        make_indices((LARGE,), LARGE_ROWS) * (torch.rand(LARGE, generator=generator()) < 0.5)
    ),
    "all padding": lambda: torch.zeros(LARGE, dtype=torch.int64),
    "ascending": lambda: torch.arange(LARGE),
}


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_large_batches(name: str, index_dtype: torch.dtype, scale_grad_by_freq: bool) -> None:
    indices = BATCHES[name]().to(index_dtype)
    grad = make_table(LARGE, 9, seed=2)
    options = (LARGE_ROWS, 0, scale_grad_by_freq)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        table = make_table(LARGE_ROWS, 9, seed=3)
        ops.embedding_grad_add_(table, grad, indices, *options[1:])
        coalesced = ops.embedding_sparse_backward(grad, indices, *options, True)
        dense = ops.embedding_dense_backward(grad, indices, *options)
        results.append((dense, table, coalesced._indices(), coalesced._values()))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual, expected)


# The package may be installed elsewhere; the tests are here.
DIGEST = f"""
import hashlib, itertools, math, sys, torch, embed_ext
from embed_ext import _C
sys.path.append({str(Path(__file__).resolve().parents[2])!r})
from tests.common import GRAD_DTYPES, REAL_DTYPES, bits, make_indices, make_table
from tests.ops.updates import METHODS, make_update

ops, digest = torch.ops.embed_ext, hashlib.sha256()
for dtype in GRAD_DTYPES:
    for width in (1, 7, 8, 16, 33, 600):
        indices = make_indices((2000,), 40)
        indices[::2] = 3
        weight, grad = make_table(40, width, dtype), make_table(2000, width, dtype, seed=2)
        weight[1] = grad[2] = math.nan
        weight[4] = grad[5] = math.inf
        grad[11] = torch.finfo(dtype).tiny / 4
        for table in (weight, grad):  # NaNs of other payloads, and a negative one
            parts = torch.view_as_real(table) if dtype.is_complex else table
            parts = parts.view({{2: torch.int16, 4: torch.int32, 8: torch.int64}}[parts.itemsize])
            parts[6] = parts[1 if table is weight else 2] + 5
            parts[8] = -1
        for out in (
            ops.embedding(weight, indices),
            ops.embedding_dense_backward(grad, indices, 40, 7),
            ops.embedding_dense_backward(grad, indices, 40, -1, True),
        ):
            parts = torch.view_as_real(out) if dtype.is_complex else out
            digest.update(bits(parts.masked_fill(parts.isnan(), math.nan)).numpy().tobytes())
for dtype, width, name in itertools.product(REAL_DTYPES, (1, 16, 21, 600), METHODS):
    for seed in (None, 3) if dtype.itemsize == 2 else (None,):
        update = make_update(METHODS[name], 60, width, 40, dtype)
        update.values[:3] = torch.tensor([[math.nan], [math.inf], [torch.finfo(dtype).tiny / 4]])
        for written in update.run(seed=seed):
            written.masked_fill_(written.isnan(), math.nan)
            digest.update(bits(written).numpy().tobytes())
print(_C.cpu_capability(), digest.hexdigest())
"""

CAPABILITIES = ("portable", "avx2", "avx512")


@pytest.fixture(scope="module")
def portable_digest() -> str:
    """What the code that every machine can run computes."""
    result = run_python(DIGEST, EMBED_EXT_CPU_CAPABILITY="portable")
    assert result.returncode == 0, result.stderr
    name, digest = result.stdout.split()
    assert name == "portable"
    return digest


@pytest.mark.parametrize("capability", CAPABILITIES[1:])
def test_every_instruction_set(capability: str, portable_digest: str) -> None:
    """Denormals, infinities and every dtype included; of a NaN only that it is one.

    Which of several payloads a sum keeps, and what is left of one in float16, is the hardware's to
    say.
    """
    result = run_python(DIGEST, EMBED_EXT_CPU_CAPABILITY=capability)
    if "this machine supports at most" in result.stderr:
        pytest.skip(f"this machine's CPU has no {capability}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [capability, portable_digest]


@pytest.mark.parametrize("width", [1, 7, 16, 33])
def test_a_bfloat16_sum_has_one_nan(width: int) -> None:
    """The one of PyTorch's conversion, where a row is summed by vectors and where it is not."""
    payloads = torch.tensor([0x7F81, 0x7FFF, -1, -127], dtype=torch.int16).view(torch.bfloat16)
    assert payloads.isnan().all()
    grad = payloads.repeat(2)[:, None].expand(8, width)
    actual = ops.embedding_dense_backward(grad, torch.arange(4).repeat(2), 4)
    assert_same_bits(actual, torch.full((4, width), torch.nan, dtype=torch.bfloat16))


def test_unknown_instruction_set() -> None:
    result = run_python(DIGEST, EMBED_EXT_CPU_CAPABILITY="sse9")
    assert result.returncode == 1
    assert "RuntimeError: EMBED_EXT_CPU_CAPABILITY: expected portable, avx2" in result.stderr
    assert "but got sse9" in result.stderr
