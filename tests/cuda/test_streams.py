"""Work goes to the current stream and to the tensors' own device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.common import make_indices, make_table
from tests.cuda.common import deterministic, needs_cuda, needs_gpu, row_sums, whole_numbers

pytestmark = [*needs_cuda, needs_gpu]

ops = torch.ops.embed_ext

ROWS, WIDTH, TOKENS = 5000, 64, 20_000
PAUSE = 20_000_000  # clock cycles, some ten milliseconds


def late_copy(source: Tensor) -> Tensor:
    """A copy that the current stream makes only after a pause; until then it holds zeros."""
    copy = torch.zeros_like(source)
    torch.cuda.current_stream().synchronize()
    torch.cuda._sleep(PAUSE)
    copy.copy_(source)
    return copy


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_side_stream(is_deterministic: bool) -> None:
    """On another stream the kernels would read the zeros that the inputs hold before."""
    weight = whole_numbers((ROWS, WIDTH), torch.float32).cuda()
    grad = whole_numbers((TOKENS, WIDTH), torch.float32, seed=1).cuda()
    indices = make_indices((TOKENS,), ROWS).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), deterministic(is_deterministic):
        out = ops.embedding(late_copy(weight), late_copy(indices))
        dense = ops.embedding_dense_backward(late_copy(grad), late_copy(indices), ROWS)
        sparse = ops.embedding_sparse_backward(late_copy(grad), late_copy(indices), ROWS)
        shrunk = late_copy(weight)
        ops.embedding_renorm_(shrunk, late_copy(indices), 1.0)
    stream.synchronize()
    assert torch.equal(out, weight[indices])
    expected = row_sums(grad, indices, ROWS)
    assert torch.equal(dense.double(), expected)
    assert torch.equal(sparse.to_dense().double(), expected)
    assert shrunk[indices].norm(dim=1).max() < 1.001


def test_streams_side_by_side() -> None:
    """Scratch memory of one stream's call is not given to another's that runs at the same time."""
    indices = make_indices((TOKENS,), ROWS).cuda()
    grads = [whole_numbers((TOKENS, WIDTH), torch.bfloat16, seed).cuda() for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in grads]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for stream, grad in zip(streams, grads, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.embedding_dense_backward(grad, indices, ROWS))
    torch.cuda.synchronize()
    for number, result in enumerate(results):
        expected = row_sums(grads[number % len(grads)], indices, ROWS)
        assert torch.equal(result.double(), expected)


def test_tensors_of_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    weight = make_table(ROWS, WIDTH, device="cuda:1")
    indices = make_indices((TOKENS,), ROWS, device="cuda:1")
    out = ops.embedding(weight, indices)
    grad = ops.embedding_dense_backward(out, indices, ROWS)
    assert torch.cuda.current_device() == 0
    assert out.device == grad.device == weight.device
    assert torch.equal(out, weight[indices])
