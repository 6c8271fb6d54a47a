"""Tables, outputs and gradients of more than 2**31 elements on CUDA."""

from __future__ import annotations

import pytest
import torch

from tests.common import make_indices, make_table
from tests.cuda.common import deterministic, needs_cuda, not_emulated

pytestmark = [
    *needs_cuda,
    not_emulated("would take hours for as many elements"),
    pytest.mark.large,
]

ops = torch.ops.embed_ext

GIB = 1 << 30
MANY = (1 << 31) + (1 << 20)  # elements
WIDTH = 64
ROWS = MANY // WIDTH


def needs_device_memory(gib: float) -> None:
    """Skip where the device has less memory free than the test takes."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free device memory, {free:.1f} are there")


def last_rows(count: int) -> torch.Tensor:
    """Indices [count] of rows whose elements lie beyond 2**31, and of row 0."""
    indices = torch.arange(ROWS - count, ROWS, device="cuda")
    indices[0] = 0
    return indices


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_beyond_the_limit_are_read(transposed: bool) -> None:
    needs_device_memory(3)
    shape = (WIDTH, ROWS) if transposed else (ROWS, WIDTH)
    weight = torch.zeros(shape, dtype=torch.int8, device="cuda")
    weight = weight.t() if transposed else weight
    indices = last_rows(1000)
    marks = torch.randint(-100, 100, (1000, WIDTH), device="cuda").to(torch.int8)
    weight[indices] = marks
    assert torch.equal(ops.embedding(weight, indices), marks)


@pytest.mark.parametrize("width", [WIDTH, 4096, 1])
def test_output_beyond_the_limit_is_written(width: int) -> None:
    """Width 1 needs 2**31 indices too; they are int8 to take little memory."""
    needs_device_memory(6)
    weight = torch.randint(-100, 100, (100, width), device="cuda").to(torch.int8)
    indices = torch.zeros(MANY // width, dtype=torch.int8, device="cuda")
    indices[-1000:] = make_indices((1000,), 100, torch.int8, "cuda")
    out = ops.embedding(weight, indices)
    assert torch.equal(out[-1000:], weight[indices[-1000:].long()])
    assert torch.equal(out[0], weight[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_gradient_beyond_the_limit(dtype: torch.dtype, is_deterministic: bool) -> None:
    needs_device_memory(12 if dtype == torch.float32 else 6)
    indices = last_rows(1000)
    grad = make_table(1000, WIDTH, dtype, "cuda")
    with deterministic(is_deterministic):
        actual = ops.embedding_dense_backward(grad, indices, ROWS)
    assert torch.equal(actual[indices], grad)
    untouched = actual[1 : ROWS - 999]
    assert all(not part.any() for part in untouched.split(1 << 22))


def test_grad_output_beyond_the_limit() -> None:
    needs_device_memory(6)
    grad = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, device="cuda")
    grad[-1000:] = 1
    indices = torch.zeros(ROWS, dtype=torch.int32, device="cuda")
    actual = ops.embedding_dense_backward(grad, indices, 2)
    expected = torch.tensor([1000.0, 0.0], dtype=torch.bfloat16, device="cuda")
    assert torch.equal(actual, expected[:, None].expand(2, WIDTH))
