"""Each kind of mistake is seen, and what is right is not taken for one.

The kernels of kernels/ make one mistake each if they are told to. A schedule that shows a wrong
result need not be met for that: what is checked is whether it could have been.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.emulator import control
from tests.emulator.control import call

pytestmark = pytest.mark.emulated

SEEDS = (0, 1, 2, 3)


@pytest.fixture(params=SEEDS, autouse=True)
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    """Every mistake is seen under every schedule."""
    control.set_seed(request.param)
    yield request.param


def assert_seen(reports: list[str], what: str, kernel: str) -> None:
    """One of the reports is of this kind, and says where it was."""
    pattern = rf"{what}.*: {kernel}, block \d+, thread \d+"
    assert any(re.match(pattern, line) for line in reports), reports


def floats(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)


def ints(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


def test_global_memory_out_of_bounds() -> None:
    numbers, out = floats(100), torch.zeros(100)
    assert call("double_each", out, numbers, 100, False) == []
    assert torch.equal(out, 2 * numbers)
    reports = call("double_each", out, numbers, 100, True)
    assert_seen(reports, r"out of bounds \(read of 4 bytes\): global", "double_each")


def test_shared_memory_out_of_bounds() -> None:
    numbers, out = floats(64), torch.zeros(64)
    assert call("shift_in_block", out, numbers, False) == []
    assert torch.equal(out, numbers.roll(-1))
    reports = call("shift_in_block", out, numbers, True)
    assert_seen(reports, r"out of bounds \(read of 4 bytes\): shared", "shift_in_block")


def test_misaligned() -> None:
    numbers, out = floats(20), torch.zeros(16)
    assert call("copy_vectors", out, numbers, False) == []
    assert torch.equal(out, numbers[:16])
    assert_seen(
        call("copy_vectors", out, numbers, True), r"misaligned \(read of 16", "copy_vectors"
    )


def test_global_memory_never_written() -> None:
    out = torch.zeros(100)
    reports = call("double_each", out, torch.empty(100), 100, False)
    assert_seen(reports, r"never written \(4 bytes\): global", "double_each")
    assert call("double_each", torch.empty(100), floats(100), 100, False) == []


def test_shared_memory_never_written() -> None:
    out = torch.zeros(64)
    assert call("read_shared", out, False) == []
    assert torch.equal(out, floats(64))
    assert_seen(call("read_shared", out, True), r"never written \(8 bytes\): shared", "read_shared")


def test_divergence_because_lanes_have_ended() -> None:
    out = ints(1)
    assert call("sum_warp", out, ints(20), 20, False) == []
    assert out.item() == sum(range(20))
    assert_seen(call("sum_warp", out, ints(20), 20, True), "divergence .*end", "sum_warp")


def test_divergence_into_another_collective() -> None:
    out = ints(1)
    assert call("count_odd", out, False) == []
    assert out.item() == 16
    assert_seen(call("count_odd", out, True), "divergence .* a (ballot|match)", "count_odd")


def test_divergence_from_the_mask() -> None:
    out = ints(1)
    assert call("vote_of_half", out, False) == []
    assert out.item() == 0xFFFF
    assert_seen(call("vote_of_half", out, True), "divergence .* leaves it out", "vote_of_half")


def test_unfinished() -> None:
    out = ints(1)
    assert call("wait_for_each_other", out, False) == []
    (report,) = call("wait_for_each_other", out, True)
    assert report.startswith("unfinished (deadlock)")
    assert "thread 0 of block 0 is in __syncthreads" in report
    assert "thread 1 of block 0 waits for lanes 1" in report
    assert "wait_for_each_other" in report


@pytest.mark.parametrize("kernel", ["reverse_block", "reverse_warps"])
def test_race_in_shared_memory(kernel: str) -> None:
    out = ints(64)
    assert call(kernel, out, ints(64), False) == []
    expected = ints(64).flip(0) if kernel == "reverse_block" else ints(64).view(2, 32).flip(1)
    assert torch.equal(out, expected.reshape(-1))
    reports = call(kernel, out, ints(64), True)
    assert any(re.match("race in shared|never written .*: shared", line) for line in reports)
    assert_seen(reports, r"race in shared memory \((read|write), after a (read|write)", kernel)


def test_race_in_global_memory() -> None:
    numbers, total = floats(128), torch.zeros(1)
    assert call("sum_all", total, numbers, False) == []
    assert total.item() == numbers.sum().item()
    assert_seen(call("sum_all", total, numbers, True), "race in global memory", "sum_all")


def test_race_between_blocks() -> None:
    numbers = torch.zeros(128, dtype=torch.int32)
    assert call("pass_on", numbers, False) == []
    assert torch.equal(numbers[64:], numbers[:64].flip(0))
    assert_seen(call("pass_on", numbers, True), "race in global memory", "pass_on")


def test_the_same_bytes_are_no_race() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    assert call("write_one_place", out, False) == []
    assert out.item() == 1
    assert_seen(call("write_one_place", out, True), "race in global memory", "write_one_place")


def test_race_for_a_report() -> None:
    slot = torch.zeros(2, dtype=torch.int32)
    assert call("report_once", slot, False) == []
    assert slot[0].item() == 2


def test_race_for_a_report_that_is_not_atomic() -> None:
    """Only a schedule on which two threads find the slot free shows it: some do."""
    seen = []
    for seed in range(1, 40):
        control.set_seed(seed)
        seen += call("report_once", torch.zeros(2, dtype=torch.int32), True)
    assert_seen(seen, "race in global memory", "report_once")


def test_a_report_names_the_line() -> None:
    reports = call("double_each", torch.zeros(100), floats(100), 100, True)
    assert re.search(r"accesses\.cu:\d+$", reports[0]), reports
