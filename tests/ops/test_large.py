"""Tables of many MiB and of more than 2**31 elements: gradients that cost the rows they touch."""

from __future__ import annotations

import copy
import io
import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import embed_ext
from tests.common import assert_close, make_indices, make_table

ops = torch.ops.embed_ext

MIB = 1 << 20
STATM = Path("/proc/self/statm")
PAGE = os.sysconf("SC_PAGESIZE")

needs_statm = pytest.mark.skipif(
    not STATM.exists(), reason="no /proc/self/statm to read memory from"
)


def resident() -> int:
    """Bytes of real memory that this process holds."""
    return int(STATM.read_text().split()[1]) * PAGE


def lazily_free() -> int:
    """Bytes of this process's memory that the system takes as soon as it needs some."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("LazyFree:"))


def available() -> int:
    """Bytes of memory that the machine can still give."""
    return os.sysconf("SC_AVPHYS_PAGES") * PAGE


def needs_memory(gib: float) -> None:
    """Skip where a table of this size could not be mapped."""
    if available() < gib * (1 << 30):
        pytest.skip(f"needs {gib} GiB of free memory, {available() / (1 << 30):.1f} are there")


# (num_weights, width, tokens): bytes and used rows on both sides of what decides how zeros are made
TABLES = {
    "small": (2000, 16, 500),
    "1 MiB, few rows used": (100_000, 4, 50),
    "1 MiB, most rows used": (5000, 64, 9000),
    "32 MiB, few rows used": (140_000, 64, 300),
    "32 MiB, most rows used": (17_000, 512, 20_000),
}
MAPPED = [name for name in TABLES if name.startswith("32") or "few" in name]


def gradient(num_weights: int, width: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [N], their grad_output [N, width], and the gradient [num_weights, width]."""
    indices = make_indices((tokens,), num_weights, torch.int32)
    grad = make_table(tokens, width)
    return indices, grad, ops.embedding_dense_backward(grad, indices, num_weights)


@pytest.mark.parametrize("table", TABLES)
def test_value(table: str) -> None:
    indices, grad, actual = gradient(*TABLES[table])
    expected = torch.zeros_like(actual).index_add_(0, indices, grad)
    assert_close(actual, expected)


@pytest.mark.parametrize("table", MAPPED)
def test_behaves_as_any_tensor(table: str) -> None:
    """Arithmetic in place, numpy, deepcopy, save and load, sharing between processes."""
    _, _, actual = gradient(*TABLES[table])
    before = actual.clone()
    assert actual.add_(1).sub(1).sub(before).abs().max() < 1e-5
    actual.copy_(before)
    actual.numpy()[0, 0] = before[0, 0] = 5
    assert torch.equal(copy.deepcopy(actual), before)
    file = io.BytesIO()
    torch.save(actual, file)
    file.seek(0)
    assert torch.equal(torch.load(file), before)
    assert torch.equal(actual.share_memory_(), before)
    assert actual.is_shared()


@pytest.mark.parametrize("table", MAPPED)
def test_can_be_resized(table: str) -> None:
    """Larger, smaller and to nothing: the storage is not borrowed memory."""
    _, _, actual = gradient(*TABLES[table])
    num_weights, width = actual.shape
    before = actual.clone()
    actual.resize_(num_weights * 2, width)
    assert torch.equal(actual[:num_weights], before)
    actual[num_weights:] = 3
    actual.resize_(10, width)
    assert torch.equal(actual, before[:10])
    actual.untyped_storage().resize_(0)
    assert actual.untyped_storage().nbytes() == 0


def test_the_next_gradient_of_a_size_faults_no_pages_in() -> None:
    indices, grad = make_indices((100,), 1 << 20), make_table(100, 64)
    for _ in range(2):  # a sanitizer faults in what it knows of the memory in the second
        ops.embedding_dense_backward(grad, indices, 1 << 20).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    actual = ops.embedding_dense_backward(grad, indices, 1 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert actual.nbytes == 256 * MIB
    assert faults < 100  # there are 128 huge pages in it, or 65,536 small ones
    assert actual.count_nonzero(1).count_nonzero() == indices.unique().numel()


@needs_statm
@pytest.mark.parametrize("on_another_thread", [False, True])
def test_memory_is_the_systems_to_take_when_its_tensor_is_gone(on_another_thread: bool) -> None:
    embed_ext.empty_cache()
    before, free_before = resident(), lazily_free()
    held = [ops.embedding_dense_backward(torch.ones(1, 512), torch.tensor([0]), 64_000)]
    held[0].fill_(1)
    assert resident() - before > 120 * MIB
    if on_another_thread:
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
    else:
        held.clear()
    assert resident() - before - (lazily_free() - free_before) < 32 * MIB
    embed_ext.empty_cache()
    assert resident() - before < 32 * MIB


@needs_statm
def test_training_steps_do_not_pile_up_memory() -> None:
    weight = torch.zeros(64_000, 256, requires_grad=True)
    indices = make_indices((64,), 64_000)
    sizes = []
    for _ in range(6):
        weight.grad = None
        ops.embedding(weight, indices).sum().backward()
        assert weight.grad is not None
        weight.grad.add_(1)
        sizes.append(resident())
    assert sizes[-1] - sizes[1] < 32 * MIB


@pytest.mark.large
def test_lookup_past_two_billion_elements() -> None:
    needs_memory(5)
    weight = torch.empty(1_100_000, 2048, dtype=torch.bfloat16)
    assert weight.numel() > 2**31
    weight[-3:] = make_table(3, 2048, torch.bfloat16)
    indices = torch.tensor([1_099_999, 1_099_997, 1_099_998], dtype=torch.int32)
    assert torch.equal(ops.embedding(weight, indices), weight[-3:][[2, 0, 1]])
    strided = weight[:, ::2]
    assert torch.equal(ops.embedding(strided, indices), strided[-3:][[2, 0, 1]])
    ops.embedding_renorm_(weight, indices, 1.0)
    norms = torch.linalg.vector_norm(weight[-3:].double(), dim=1)
    assert_close(norms.bfloat16(), torch.ones(3, dtype=torch.bfloat16))


@pytest.mark.large
def test_output_past_two_billion_elements() -> None:
    needs_memory(4)
    weight = make_table(3, 2048, torch.int8)
    indices = torch.zeros(1_100_000, dtype=torch.int8)
    indices[-2:] = torch.tensor([2, 1])
    out = ops.embedding(weight, indices)
    assert out.numel() > 2**31
    assert torch.equal(out[[0, 2**20, -3, -2, -1]], weight[[0, 0, 0, 2, 1]])


@pytest.mark.large
def test_gradient_past_two_billion_elements() -> None:
    """From the last rows of a large grad_output into the last rows of a large table."""
    needs_memory(5)
    tokens = num_weights = 1_100_000
    grad = torch.empty(tokens, 2048, dtype=torch.bfloat16)
    grad[-3:] = make_table(3, 2048, torch.bfloat16)
    indices = torch.zeros(tokens, dtype=torch.int32)
    indices[-3:] = torch.tensor([num_weights - 1, num_weights - 2, num_weights - 1])
    before = resident() if STATM.exists() else 0
    actual = ops.embedding_dense_backward(grad, indices, num_weights, 0)
    assert actual.numel() > 2**31
    last = grad[-3:].float()
    assert_close(actual[-3:], torch.stack([last[0] * 0, last[1], last[0] + last[2]]).bfloat16())
    assert not actual[:1000].any()
    if STATM.exists():
        assert resident() - before < 256 * MIB


@pytest.mark.large
def test_more_rows_than_32_bits_count() -> None:
    """Row numbers past 2**32 take the wide token."""
    needs_memory(9)
    num_weights = 2**32 + 10
    indices = torch.tensor([2**32 + 5, 5, 2**32 + 5])
    grad = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float16)
    actual = ops.embedding_dense_backward(grad, indices, num_weights)
    assert actual.shape == (num_weights, 1)
    assert actual[[5, 2**32 + 5, 2**32 + 4, 0]].flatten().tolist() == [2, 5, 0, 0]
    sparse = ops.embedding_sparse_backward(grad, indices, num_weights, -1, True)
    assert sparse._values().flatten().tolist() == [0.5, 2, 2]
    sparse = ops.embedding_sparse_backward(grad, indices, num_weights, -1, False, True)
    assert sparse.indices().tolist() == [[5, 2**32 + 5]]
    assert sparse.values().flatten().tolist() == [2, 5]
