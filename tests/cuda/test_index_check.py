"""Bad indices on CUDA: reported as the mode says, without harm to table, result or context."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest
import torch
from torch import Tensor

import embed_ext
from tests.common import INDEX_DTYPES, make_table
from tests.cuda.common import DEVICE, deterministic, needs_cuda, needs_gpu, synchronize

pytestmark = [*needs_cuda, pytest.mark.usefixtures("reports_later")]

ops = torch.ops.embed_ext

ROWS = 5
BAD = 7
POSITION = 2
GOOD_INDICES = [0, 4, 1, 3]
BAD_INDICES = [0, 4, BAD, 3]


def cuda_indices(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values).to(dtype).to(DEVICE)


def reported(op: str, where: str = f"[{POSITION}]") -> pytest.RaisesExc[IndexError]:
    """Expect the error that names op, position, index and rows."""
    message = f"{op}: index out of range: indices{where} is {BAD}, but weight has {ROWS} rows"
    return pytest.raises(IndexError, match=re.escape(message))


def assert_context_works() -> None:
    """Nothing of the error is left, in this library or in the device."""
    embed_ext.check_indices()
    weight = make_table(ROWS, 16, device=DEVICE)
    indices = cuda_indices(GOOD_INDICES)
    assert torch.equal(ops.embedding(weight, indices), weight[indices])
    embed_ext.check_indices()


@pytest.mark.parametrize("width", [1, 3, 16, 130, 4096])
@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_forward_writes_zeros_and_reports_later(width: int, dtype: torch.dtype) -> None:
    weight = make_table(ROWS, width, device=DEVICE)
    out = ops.embedding(weight, cuda_indices(BAD_INDICES, dtype))
    expected = weight[cuda_indices(GOOD_INDICES)]
    expected[POSITION] = 0
    assert torch.equal(out, expected)
    with reported("embedding"):
        embed_ext.check_indices()
    assert_context_works()


def test_the_next_call_raises_and_the_one_after_runs() -> None:
    weight = make_table(ROWS, 16, device=DEVICE)
    ops.embedding(weight, cuda_indices(BAD_INDICES))
    synchronize()
    with reported("embedding"):
        ops.embedding(weight, cuda_indices(GOOD_INDICES))
    assert_context_works()


def test_the_backward_raises() -> None:
    weight = make_table(ROWS, 16, device=DEVICE).requires_grad_()
    out = embed_ext.functional.embedding(cuda_indices(BAD_INDICES), weight)
    synchronize()
    with reported("embedding"):
        out.sum().backward()
    assert_context_works()


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_backward_leaves_a_bad_index_out(dtype: torch.dtype, scale: bool) -> None:
    grad = torch.ones(4, 16, dtype=dtype, device=DEVICE)
    actual = ops.embedding_dense_backward(grad, cuda_indices(BAD_INDICES), ROWS, -1, scale)
    assert actual.sum(1).tolist() == [16, 0, 0, 16, 16]
    with reported("embedding_dense_backward"):
        embed_ext.check_indices()
    assert_context_works()


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("padding_idx", [-1, 3])
def test_sparse_backward_leaves_a_bad_index_out(padding_idx: int, coalesced: bool) -> None:
    """The position counts the indices that were given, not those that padding leaves."""
    grad = torch.ones(4, 16, device=DEVICE)
    indices = cuda_indices([3, 4, BAD, 0])
    sparse = ops.embedding_sparse_backward(grad, indices, ROWS, padding_idx, False, coalesced)
    assert not coalesced or sparse._nnz() == 3 - (padding_idx == 3)
    actual = sparse.to_dense()
    assert actual.sum(1).tolist() == [16, 0, 0, 16 * (padding_idx != 3), 16]
    with reported("embedding_sparse_backward"):
        embed_ext.check_indices()
    assert_context_works()


def test_renorm_leaves_a_bad_index_out() -> None:
    weight = torch.ones(ROWS, 16, device=DEVICE)
    ops.embedding_renorm_(weight, cuda_indices(BAD_INDICES), 2.0)
    norms = weight.norm(dim=1).cpu()
    torch.testing.assert_close(norms, torch.tensor([2.0, 4.0, 4.0, 2.0, 2.0]))
    with reported("embedding_renorm_"):
        embed_ext.check_indices()
    assert_context_works()


def test_sync_raises_at_the_call_and_knows_the_shape() -> None:
    embed_ext.set_index_check("sync")
    weight = make_table(ROWS, 16, device=DEVICE)
    with reported("embedding", "[1, 0]"):
        ops.embedding(weight, cuda_indices(BAD_INDICES).view(2, 2))
    assert_context_works()


def test_none_reports_nothing_and_still_writes_zeros() -> None:
    embed_ext.set_index_check("none")
    weight = make_table(ROWS, 16, device=DEVICE)
    out = ops.embedding(weight, cuda_indices(BAD_INDICES))
    assert not out[POSITION].any()
    assert_context_works()


def leave_a_report(weight: Tensor) -> None:
    """As a lazy call does whose bad index nobody has asked for yet."""
    embed_ext.set_index_check("lazy")
    ops.embedding(weight, cuda_indices(BAD_INDICES))
    synchronize()


def test_none_does_not_raise_what_was_left_before() -> None:
    weight = make_table(ROWS, 16, device=DEVICE)
    leave_a_report(weight)
    embed_ext.set_index_check("none")
    for values in (GOOD_INDICES, BAD_INDICES):
        ops.embedding(weight, cuda_indices(values))
    with reported("embedding"):
        embed_ext.check_indices()
    assert_context_works()


@pytest.mark.parametrize("mode", ["lazy", "sync"])
def test_what_was_left_is_raised_when_the_mode_is_back(mode: Literal["lazy", "sync"]) -> None:
    weight = make_table(ROWS, 16, device=DEVICE)
    leave_a_report(weight)
    embed_ext.set_index_check("none")
    ops.embedding(weight, cuda_indices(GOOD_INDICES))
    embed_ext.set_index_check(mode)
    with reported("embedding"):
        ops.embedding(weight, cuda_indices(GOOD_INDICES).view(2, 2))
    assert_context_works()


@needs_gpu
def test_sync_does_not_give_another_call_its_own_shape() -> None:
    """The report of a graph's replay comes while a call of other indices is under way."""
    weight = make_table(ROWS, 16, device=DEVICE)
    captured = Captured(torch.float32)
    captured.indices.copy_(torch.tensor(BAD_INDICES))
    embed_ext.set_index_check("sync")
    torch.cuda._sleep(20_000_000)  # so that the report is not there yet when the call begins
    captured.graph.replay()
    ops.embedding(weight, cuda_indices(GOOD_INDICES).view(2, 2))
    with reported("embedding"):
        embed_ext.check_indices()
    assert_context_works()


@needs_gpu
def test_sync_raises_in_the_thread_whose_index_it_is() -> None:
    """Each with its own op and shape, however the calls of two streams meet."""
    embed_ext.set_index_check("sync")
    weight = make_table(ROWS, 16, device=DEVICE)
    grad = torch.ones(4, 16, device=DEVICE)
    calls = {
        "embedding": lambda bad: ops.embedding(weight, bad.view(2, 2)),
        "embedding_dense_backward": lambda bad: ops.embedding_dense_backward(grad, bad, ROWS),
        "good": lambda bad: ops.embedding(weight, bad.clamp(max=ROWS - 1)),
    }

    def messages(name: str) -> set[str]:
        found = set()
        with torch.cuda.stream(torch.cuda.Stream()):
            bad = cuda_indices(BAD_INDICES)
            for _ in range(50):
                try:
                    calls[name](bad)
                    found.add("")
                except IndexError as error:
                    found.add(str(error).partition(" is ")[0])
        return found

    with ThreadPoolExecutor(len(calls)) as pool:
        results = dict(zip(calls, pool.map(messages, calls), strict=True))
    assert results == {
        "embedding": {"embedding: index out of range: indices[1, 0]"},
        "embedding_dense_backward": {
            f"embedding_dense_backward: index out of range: indices[{POSITION}]"
        },
        "good": {""},
    }


def test_a_million_bad_indices_are_one_report() -> None:
    weight = make_table(ROWS, 1, device=DEVICE)
    out = ops.embedding(weight, torch.full((1_000_000,), BAD, device=DEVICE))
    assert not out.any()
    with pytest.raises(IndexError, match=rf"is {BAD}, but weight has {ROWS} rows"):
        embed_ext.check_indices()
    assert_context_works()


class Captured:
    """Forward and dense backward in a CUDA graph, with indices that can be replaced."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.weight = make_table(ROWS, 16, dtype, DEVICE)
        self.indices = cuda_indices(GOOD_INDICES)
        self.grad = torch.ones(4, 16, dtype=dtype, device=DEVICE)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out, self.weight_grad = self.run()

    def run(self) -> tuple[Tensor, Tensor]:
        out = ops.embedding(self.weight, self.indices)
        return out, ops.embedding_dense_backward(self.grad, self.indices, ROWS)


@needs_gpu
@pytest.mark.parametrize("mode", ["lazy", "sync"])
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs(dtype: torch.dtype, is_deterministic: bool, mode: str) -> None:
    """Nothing waits during a capture; a replay with a bad index reports it."""
    embed_ext.set_index_check("sync" if mode == "sync" else "lazy")
    with deterministic(is_deterministic):
        captured = Captured(dtype)
    for values in (GOOD_INDICES, [2, 2, 2, 2], [1, 0, 1, 0]):
        captured.indices.copy_(torch.tensor(values))
        captured.graph.replay()
        assert torch.equal(captured.out, captured.weight[captured.indices])
        counts = torch.bincount(captured.indices, minlength=ROWS).to(dtype)
        assert torch.equal(captured.weight_grad, counts[:, None].expand(ROWS, 16))
    embed_ext.check_indices()

    captured.indices.copy_(torch.tensor(BAD_INDICES))
    captured.graph.replay()
    with reported("embedding"):
        embed_ext.check_indices()
    assert not captured.out[POSITION].any()
    assert captured.weight_grad.sum(1).tolist() == [16, 0, 0, 16, 16]
    assert_context_works()
