"""Several uses of one table in one backward on CUDA: their rows are added to one gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import embed_ext
from tests.common import REAL_DTYPES
from tests.cuda.common import DEVICE, deterministic, needs_cuda, needs_gpu, row_sums, whole_numbers

pytestmark = needs_cuda

ROWS, WIDTH, TOKENS = 3000, 24, 200


def batch(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """indices [TOKENS], grad_output [TOKENS, WIDTH] of whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(ROWS, (TOKENS,), generator=generator)
    return indices.to(DEVICE), whole_numbers((TOKENS, WIDTH), dtype, seed).to(DEVICE)


def backward(table: embed_ext.Embedding, batches: list[tuple[Tensor, Tensor]]) -> None:
    outputs = [table(indices) for indices, _ in batches]
    torch.autograd.backward(outputs, [grad for _, grad in batches])


def assert_grad_is(table: embed_ext.Embedding, batches: list[tuple[Tensor, Tensor]]) -> None:
    expected = sum(row_sums(grad, indices, ROWS) for indices, grad in batches)
    assert torch.equal(table.weight.grad.double(), expected)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("uses", [2, 4])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_uses_add_up(dtype: torch.dtype, uses: int, keep: bool, is_deterministic: bool) -> None:
    table = embed_ext.Embedding(ROWS, WIDTH, dtype=dtype, device=DEVICE, keep_grad_buffer=keep)
    places = set()
    with deterministic(is_deterministic):
        for step in range(3):
            table.zero_grad()
            batches = [batch(10 * step + use, dtype) for use in range(uses)]
            backward(table, batches)
            assert_grad_is(table, batches)
            places.add(table.weight.grad.data_ptr())
    assert not keep or len(places) == 1


@needs_gpu
def test_one_table_of_memory_is_made() -> None:
    table = embed_ext.Embedding(1_000_000, WIDTH, device=DEVICE)
    indices = [torch.randint(1_000_000, (64,), device=DEVICE) for _ in range(4)]
    outputs = [table(rows) for rows in indices]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.backward([out.sum() for out in outputs])
    assert torch.cuda.max_memory_allocated() - before < 1.5 * table.weight.nbytes


def test_a_tied_output_layer() -> None:
    table = embed_ext.Embedding(ROWS, WIDTH, device=DEVICE, dtype=torch.float64)
    hidden = whole_numbers((7, WIDTH), torch.float64, 0).to(DEVICE)
    one = batch(1, torch.float64)
    torch.autograd.backward(
        [hidden @ table.weight.t(), table(one[0])], [hidden.new_ones(7, ROWS), one[1]]
    )
    assert torch.equal(table.weight.grad, row_sums(one[1], one[0], ROWS) + hidden.sum(0))


@needs_gpu
def test_uses_on_two_streams() -> None:
    table = embed_ext.Embedding(ROWS, WIDTH, device=DEVICE)
    side = torch.cuda.Stream()
    for step in range(5):
        table.zero_grad()
        batches = [batch(10 * step + use, torch.float32) for use in range(4)]
        side.wait_stream(torch.cuda.current_stream())
        outputs = []
        for use, (indices, _) in enumerate(batches):
            with torch.cuda.stream(side if use % 2 else torch.cuda.current_stream()):
                outputs.append(table(indices))
        torch.cuda.current_stream().wait_stream(side)
        torch.autograd.backward(outputs, [grad for _, grad in batches])
        assert_grad_is(table, batches)
