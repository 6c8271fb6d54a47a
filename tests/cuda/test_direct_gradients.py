"""Gradients that go straight to a kept memory, or to the .grad that is there, on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import embed_ext
from tests.common import EMULATED, REAL_DTYPES, index_check_is
from tests.cuda.common import DEVICE, deterministic, needs_cuda, needs_gpu, row_sums, whole_numbers

pytestmark = needs_cuda

ROWS, WIDTH, TOKENS = 3000, 24, 200
MANY_TOKENS = (10 if EMULATED else 40) * ROWS


def module(dtype: torch.dtype = torch.float32, **options: object) -> embed_ext.Embedding:
    return embed_ext.Embedding(ROWS, WIDTH, dtype=dtype, device=DEVICE, **options)


def batch(seed: int, dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """indices [tokens], half of them one row, grad_output [tokens, WIDTH] of whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(ROWS, (tokens,), generator=generator)
    indices[: tokens // 2] = indices[0]
    return indices.to(DEVICE), whole_numbers((tokens, WIDTH), dtype, seed).to(DEVICE)


def assert_grad_is(table: embed_ext.Embedding, *batches: tuple[Tensor, Tensor]) -> None:
    expected = sum(row_sums(grad, indices, ROWS) for indices, grad in batches)
    assert torch.equal(table.weight.grad.double(), expected)


@pytest.mark.usefixtures("verified_gradients")  # else what was not cleared is found, and cleared
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_steps_use_one_memory(dtype: torch.dtype, is_deterministic: bool) -> None:
    table = module(dtype, keep_grad_buffer=True)
    places = set()
    with deterministic(is_deterministic):
        for step, tokens in enumerate((TOKENS, 1, 4 * ROWS, MANY_TOKENS, TOKENS)):
            one = batch(step, dtype, min(tokens, 500) if dtype.itemsize == 2 else tokens)
            table(one[0]).backward(one[1])
            assert_grad_is(table, one)
            places.add(table.weight.grad.data_ptr())
            table.weight.grad = None
    assert len(places) == 1


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_micro_batches_are_added_in_place(
    dtype: torch.dtype, keep: bool, is_deterministic: bool
) -> None:
    table = module(dtype, keep_grad_buffer=keep)
    with deterministic(is_deterministic):
        for step in range(3):
            done = []
            for micro_batch in range(3):
                done.append(batch(10 * step + micro_batch, dtype, 100))
                before = table.weight.grad
                table(done[-1][0]).backward(done[-1][1])
                assert before is None or table.weight.grad is before
                assert_grad_is(table, *done)
            table.weight.grad = None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    table = module(dtype)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(ROWS, (TOKENS,), generator=generator).to(DEVICE)
    grad = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).to(DEVICE)
    table(indices).backward(grad)
    exact = table.weight.grad.double() + row_sums(grad, indices, ROWS)
    table(indices).backward(grad)
    torch.testing.assert_close(table.weight.grad, exact.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [lambda grad: grad.mul_(2), lambda grad: grad.clamp_(-1, 1), lambda grad: grad.fill_(7)],
    ids=["mul", "clamp", "fill"],
)
def test_in_place_changes_are_noticed(change: Callable[[Tensor], Tensor]) -> None:
    table = module(keep_grad_buffer=True)
    for step in range(3):
        one = batch(step, torch.float32)
        table(one[0]).backward(one[1])
        assert_grad_is(table, one)
        change(table.weight.grad)
        table.weight.grad = None


def test_a_gradient_that_is_still_held_is_left_alone() -> None:
    table = module(keep_grad_buffer=True)
    first, second = batch(0, torch.float32), batch(1, torch.float32)
    table(first[0]).backward(first[1])
    held = table.weight.grad
    copy = held.clone()
    table.weight.grad = None
    table(second[0]).backward(second[1])
    assert_grad_is(table, second)
    assert torch.equal(held, copy)


def test_indices_that_change_after_the_backward() -> None:
    table = module(keep_grad_buffer=True)
    for step in range(3):
        one = batch(step, torch.float32)
        indices = one[0].clone()
        table(indices).backward(one[1])
        indices.zero_()
        assert_grad_is(table, one)
        table.weight.grad = None


@pytest.mark.usefixtures("verified_gradients")
def test_bad_indices_are_not_cleared() -> None:
    """Which rows were written is known by the indices, bad ones and all."""
    table = module(keep_grad_buffer=True)
    with index_check_is("none"):
        for step in range(3):
            indices, grad = batch(step, torch.float32)
            indices[::7], indices[1::7] = ROWS + 1000 * step, -1 - step
            table(indices).backward(grad)
            good = (indices >= 0) & (indices < ROWS)
            assert_grad_is(table, (indices[good], grad[good]))
            table.weight.grad = None


def test_writes_that_hide_are_found_by_the_search() -> None:
    table = module(keep_grad_buffer=True)
    embed_ext.set_verify_kept_gradients(True)
    try:
        one = batch(0, torch.float32)
        table(one[0]).backward(one[1])
        unused = min(set(range(ROWS)) - set(one[0].tolist()))
        table.weight.grad.data[unused] = 1
        table.weight.grad = None
        with pytest.raises(RuntimeError, match=f"keep_grad_buffer: row {unused} "):
            table(one[0]).backward(one[1])
        table(one[0]).backward(one[1])
        assert_grad_is(table, one)
    finally:
        embed_ext.set_verify_kept_gradients(False)


@needs_gpu
def test_another_stream_gets_memory_of_its_own() -> None:
    table = module(keep_grad_buffer=True)
    one = batch(0, torch.float32)
    table(one[0]).backward(one[1])
    first = table.weight.grad.data_ptr()
    table.weight.grad = None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        table(one[0]).backward(one[1])
    torch.cuda.current_stream().wait_stream(stream)
    assert_grad_is(table, one)
    second: Any = table.weight.grad
    assert second.data_ptr() != first


@needs_gpu
def test_micro_batches_of_another_stream() -> None:
    """The rows that were used there are not known here: all are cleared."""
    table = module(keep_grad_buffer=True)
    stream = torch.cuda.Stream()
    for step in range(3):
        batches = [batch(10 * step + number, torch.float32) for number in range(2)]
        table(batches[0][0]).backward(batches[0][1])
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            table(batches[1][0]).backward(batches[1][1])
        torch.cuda.current_stream().wait_stream(stream)
        assert_grad_is(table, *batches)
        table.weight.grad = None


@pytest.mark.usefixtures("reports_at_once")
def test_bad_indices_leave_grad_alone() -> None:
    table = module(keep_grad_buffer=True)
    good = batch(0, torch.float32)
    table(good[0]).backward(good[1])
    bad = good[0].clone()
    bad[5] = ROWS
    with pytest.raises(IndexError, match="out of range"):
        table(bad).backward(good[1])
    before = table.weight.grad.clone()
    with pytest.raises(IndexError, match=r"embedding_grad_add_: .*indices\[5\]"):
        torch.ops.embed_ext.embedding_grad_add_(table.weight.grad, good[1], bad)
    assert torch.equal(table.weight.grad, before)
    assert_grad_is(table, good)


@needs_gpu
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_that_add_to_grad(dtype: torch.dtype, keep: bool) -> None:
    """Each replay adds the rows of that moment's indices; later steps still start from zero."""
    table = module(dtype, keep_grad_buffer=keep)
    indices, grad = batch(0, dtype, 100)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            table(indices).backward(grad)
    torch.cuda.current_stream().wait_stream(stream)
    table.weight.grad.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table(indices).backward(grad)
    table.weight.grad.zero_()
    batches = [batch(seed, dtype, 100) for seed in range(3)]
    for one in batches:
        indices.copy_(one[0])
        grad.copy_(one[1])
        graph.replay()
    assert_grad_is(table, *batches)
    del graph
    table.weight.grad = None
    for one in batches:
        table(one[0]).backward(one[1])
        assert_grad_is(table, one)
        table.weight.grad = None


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_main_grad(dtype: torch.dtype, is_deterministic: bool) -> None:
    table = module(dtype, add_to_main_grad=True)
    weight: Any = table.weight
    weight.main_grad = torch.zeros(ROWS, WIDTH, device=DEVICE)
    batches = [batch(seed, dtype) for seed in range(3)]
    with deterministic(is_deterministic):
        for indices, grad in batches:
            table(indices).backward(grad)
    expected = sum(row_sums(grad, indices, ROWS) for indices, grad in batches)
    assert table.weight.grad is None
    assert torch.equal(weight.main_grad.double(), expected)
