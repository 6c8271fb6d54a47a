"""What is counted of kernels whose accesses are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import embed_ext
from benchmarks.cases import Case
from benchmarks.counts.cases import CASES, GRAD_ADD, PERMUTATION, CountedCase
from benchmarks.counts.emulated import count as count_case
from tests.emulator import control
from tests.emulator.counts import FILL, SCAN, SELECT, SORT, LaunchCounts, counted

pytestmark = pytest.mark.emulated

ops = torch.ops.embed_ext


def count(name: str, *arguments: Tensor | int) -> LaunchCounts:
    with counted() as launches:
        assert control.call(name, *arguments) == []
    (launch,) = launches
    assert (launch.kernel, launch.threads) == (name, 64)
    return launch


def numbers(size: int) -> Tensor:
    return torch.zeros(size)


def test_contiguous_reads() -> None:
    launch = count("read_contiguous", numbers(192), numbers(192), 3)
    assert launch.blocks == 3
    assert launch.read_sectors == launch.written_sectors == 3 * 2 * 4
    assert launch.unique_read_sectors == launch.unique_written_sectors == 3 * 2 * 4
    assert launch.requested_bytes == launch.fetched_bytes == 2 * 192 * 4
    assert (launch.longest, launch.longest_reads, launch.adds) == (2, 1, 0)


def test_reads_that_begin_within_a_sector() -> None:
    launch = count("read_contiguous", numbers(64), numbers(65)[1:], 1)
    assert launch.read_sectors == 2 * 5  # a warp's 128 bytes lie in 5
    assert launch.unique_read_sectors == 9
    assert launch.sectors_read_by_block == 9
    assert launch.fetched_bytes == 32 * (9 + 8)


def test_a_sector_a_lane() -> None:
    launch = count("read_strided", numbers(64), numbers(512))
    assert launch.read_sectors == launch.sectors_read_by_block == 64
    assert launch.written_sectors == 8


def test_all_lanes_at_one_address() -> None:
    launch = count("read_one", numbers(64), numbers(1))
    assert launch.read_sectors == 2 * 2  # one a warp, of two blocks
    assert launch.sectors_read_by_block == 2
    assert launch.unique_read_sectors == 1
    assert launch.unique_written_sectors == 8
    assert launch.written_sectors == 2 * 8


def test_another_instruction_asks_again() -> None:
    launch = count("read_twice", numbers(64), numbers(64))
    assert launch.read_sectors == 2 * 8
    assert launch.sectors_read_by_block == launch.unique_read_sectors == 8
    assert (launch.longest, launch.longest_reads) == (3, 2)


def test_accesses_of_several_sectors() -> None:
    launch = count("read_large", numbers(1024), numbers(1024))
    assert launch.read_sectors == launch.written_sectors == 2 * 64
    assert (launch.longest, launch.longest_reads) == (2, 1)


def test_a_chain_of_reads() -> None:
    steps, following = 10, torch.arange(64, dtype=torch.int32).add(8).remainder(64)
    launch = count("read_chain", torch.zeros(128, dtype=torch.int32), following, steps)
    assert (launch.longest, launch.longest_reads) == (steps + 1, steps)
    assert launch.read_sectors == 2 * 2 * steps  # a warp of each block goes on by 2 sectors
    assert launch.sectors_read_by_block == 2 * 8
    assert launch.unique_read_sectors == 8
    assert launch.written_sectors == 2 * 8


def test_vectors_are_one_access() -> None:
    launch = count("read_vectors", numbers(256), numbers(256))
    assert (launch.longest, launch.longest_reads) == (2, 1)
    assert launch.read_sectors == launch.written_sectors == 256 * 4 // 32


def test_reductions() -> None:
    launch = count("add_to_one", numbers(1), numbers(64))
    assert launch.adds == 2 * 64
    assert launch.added_sectors == 2 * 2
    assert launch.unique_written_sectors == 1
    assert launch.read_sectors == 2 * 8 and launch.unique_read_sectors == 8
    assert launch.requested_bytes == 32 * (2 * 2 + 2 * 8)
    assert (launch.longest, launch.longest_reads) == (2, 1)


def test_atomics_that_return() -> None:
    places = torch.zeros(64, dtype=torch.int32)
    launch = count("take_places", places)
    assert (launch.adds, launch.added_sectors) == (64, 8)
    assert (launch.longest, launch.longest_reads, launch.written_sectors) == (1, 1, 0)
    launch = count("take_places", places)  # now each finds its place taken, and writes
    assert (launch.adds, launch.added_sectors, launch.written_sectors) == (64, 8, 8)
    assert (launch.longest, launch.longest_reads) == (2, 1)


def test_shared_memory_does_not_count() -> None:
    whole = torch.arange(64, dtype=torch.int32)
    launch = count("reverse_in_shared", whole.clone(), whole)
    assert (launch.read_sectors, launch.written_sectors) == (8, 8)
    assert (launch.longest, launch.longest_reads) == (2, 1)


def test_a_report_of_a_bad_index_does_not_count() -> None:
    weight, indices = torch.randn(10, 8), torch.arange(8)
    indices[3] = 10
    with counted() as launches:
        ops.embedding(weight, indices)
    with pytest.raises(IndexError):
        embed_ext.check_indices()
    (launch,) = launches
    assert (launch.adds, launch.written_sectors) == (0, 8)


def test_fills_and_sorts_are_launches() -> None:
    grad, indices = torch.ones(100, 8), torch.arange(100) % 7
    with counted() as launches:
        ops.embedding_dense_backward(grad, indices, 50)
    fills = [launch for launch in launches if launch.kernel == FILL]
    assert [fill.requested_bytes for fill in fills] == [50 * 8 * 4]
    many = torch.arange(3000) % 7
    with counted() as launches:
        ops.embedding_renorm_(torch.ones(50, 8), many, 1.0, 2.0)
    assert [launch.kernel for launch in launches].count(SORT) == 1
    with counted() as launches:
        ops.embedding_sparse_backward(torch.ones(3000, 8), many, 50, coalesced=True)
    libraries = [launch.kernel for launch in launches if launch.is_library]
    assert libraries == [SORT, SCAN]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_sparse_gradient_takes_two_kernels_and_a_selection(dtype: torch.dtype) -> None:
    grad, indices = torch.ones(100, 8), (torch.arange(100) % 7).to(dtype)
    with counted() as launches:
        ops.embedding_sparse_backward(grad, indices, 50)
    assert [launch.is_library for launch in launches] == [False, False]
    with counted() as launches:
        ops.embedding_sparse_backward(grad, indices, 50, 3)
    assert launches[0].kernel == SELECT
    assert [launch.is_library for launch in launches] == [True, False, False]


@pytest.mark.parametrize("op", list(dict.fromkeys(case.op for case in CASES)))
def test_no_op_asks_for_less_than_the_ideal(op: str) -> None:
    """Where no row is named twice and all begin with a sector."""
    dtype = "bfloat16" if op == GRAD_ADD else "float32"
    case = CountedCase(op, Case(50, 64, 40, PERMUTATION, dtype))
    counts = count_case(case)
    assert counts["name"] == case.name and counts["launches"]
    requested = sum(launch["requested_bytes"] for launch in counts["launches"])
    assert requested >= counts["ideal_bytes"] > 0


def test_nothing_is_counted_outside() -> None:
    with counted() as first:
        control.call("read_one", numbers(64), numbers(1))
    control.call("read_one", numbers(64), numbers(1))
    assert len(first) == 1
    with counted() as second:
        pass
    assert second == []


def test_only_what_runs_in_order_is_counted() -> None:
    with counted() as launches:
        control.set_seed(1)
        (report,) = control.call("read_one", numbers(64), numbers(1))
    assert "read_one" in report and "seed 0" in report
    assert launches == []
