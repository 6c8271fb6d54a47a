"""Large CPU memory that the next step uses again: zero where it must be, and bounded."""

from __future__ import annotations

import ctypes
import gc
import os
import textwrap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import embed_ext
from embed_ext import Embedding
from embed_ext.functional import embedding
from tests.common import run_python

MIB = 2**20
WIDTH = 64
MADV_DONTNEED = 4


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    gc.collect()
    embed_ext.empty_cache()
    yield
    embed_ext.empty_cache()


def gradient(num_rows: int, rows: tuple[int, ...] = (1, 5)) -> Tensor:
    weight = torch.ones(num_rows, WIDTH, requires_grad=True)
    embedding(torch.tensor(rows), weight).sum().backward()
    assert weight.grad is not None
    return weight.grad


def assert_is_gradient(grad: Tensor, rows: tuple[int, ...] = (1, 5)) -> None:
    expected = torch.zeros_like(grad)
    expected[list(rows)] = 1
    assert torch.equal(grad, expected)


def assert_runs(code: str) -> None:
    done = run_python(textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("num_rows", [4096, 5001, 131_072, 200_000], ids=lambda n: f"{n} rows")
def test_the_next_gradient_is_made_where_the_last_one_was(num_rows: int) -> None:
    grad = gradient(num_rows)
    assert_is_gradient(grad)
    address = grad.data_ptr()
    grad.fill_(float("nan"))
    del grad
    assert embed_ext.cached_bytes() >= num_rows * WIDTH * 4
    again = gradient(num_rows, rows=(7,))
    assert again.data_ptr() == address
    assert embed_ext.cached_bytes() == 0
    assert_is_gradient(again, rows=(7,))


@pytest.mark.parametrize("num_rows", [100_001, 2_796_203], ids=lambda n: f"{n} rows")
@pytest.mark.parametrize("kept", [False, True], ids=["default", "kept"])
def test_memory_that_ends_within_a_cache_line_is_cleared_to_its_end(
    num_rows: int, kept: bool
) -> None:
    table = embed_ext.Embedding(num_rows, 3, keep_grad_buffer=kept)
    for row in (num_rows - 1, 7):  # the second leaves what is at the end to the clearing
        table.zero_grad()
        table(torch.tensor([row])).sum().backward()  # type: ignore[no-untyped-call]
        grad = table.weight.grad
        assert grad is not None
        assert grad.count_nonzero() == 3 and bool((grad[row] == 1).all())
        grad.fill_(float("nan"))
        del grad


def test_small_gradients_are_left_to_malloc() -> None:
    gradient(4095)
    assert embed_ext.cached_bytes() == 0


def test_a_block_serves_what_is_a_little_smaller_and_nothing_else() -> None:
    address = gradient(10_000).data_ptr()
    smaller = gradient(8200)
    assert smaller.data_ptr() == address
    assert smaller.untyped_storage().nbytes() == 8200 * WIDTH * 4
    assert_is_gradient(smaller)
    del smaller
    assert gradient(7000).data_ptr() != address


def test_outputs_of_one_size_take_turns() -> None:
    weight = torch.randn(1000, WIDTH)
    indices = torch.randint(1000, (200_000,))
    out = embedding(indices, weight)
    address = out.data_ptr()
    assert torch.equal(out, weight[indices])
    del out
    out = embedding(indices.flip(0), weight)
    assert out.data_ptr() == address
    assert torch.equal(out, weight[indices.flip(0)])


def test_what_waits_and_what_is_used_is_bounded_by_what_was_used() -> None:
    used = [gradient(50_000), gradient(60_000)]
    most = sum(grad.nbytes for grad in used)
    used.clear()
    for num_rows in range(5000, 100_000, 7000):
        grad = gradient(num_rows)
        most = max(most, grad.nbytes)
        # a block is a whole number of pages, and may be a quarter larger
        assert embed_ext.cached_bytes() + grad.nbytes <= most + 2 * 4096 + grad.nbytes // 4
        del grad


def test_empty_cache_gives_back_what_waits_and_says_how_much() -> None:
    held = gradient(50_000)
    gradient(60_000)
    waiting = embed_ext.cached_bytes()
    assert waiting == 60_000 * WIDTH * 4
    assert embed_ext.empty_cache() == waiting
    assert embed_ext.cached_bytes() == 0
    assert_is_gradient(held)
    assert_is_gradient(gradient(60_000))


def test_pages_that_the_system_took_meanwhile_are_zero_or_what_they_were() -> None:
    grad = gradient(200_000)
    address, size = grad.data_ptr(), grad.nbytes
    grad.fill_(3)
    del grad
    libc = ctypes.CDLL(None, use_errno=True)
    half = ctypes.c_void_p(address + size // 8192 * 4096)
    assert libc.madvise(half, ctypes.c_size_t(size // 4), MADV_DONTNEED) == 0
    again = gradient(200_000)
    assert again.data_ptr() == address
    assert_is_gradient(again)


def test_the_storage_is_like_any_other() -> None:
    grad = gradient(50_000)
    storage = grad.untyped_storage()
    storage.resize_(2 * storage.nbytes())
    assert_is_gradient(grad)
    storage.resize_(0)
    storage.resize_(50_000 * WIDTH * 4)
    grad.zero_()
    grad.share_memory_()
    assert grad.is_shared()
    assert not grad.any()


def test_the_profiler_sees_as_much_go_as_come() -> None:
    size = 50_000 * WIDTH * 4
    with torch.profiler.profile(profile_memory=True) as profiler:
        for _ in range(2):
            gradient(50_000)
    changes = [event.self_cpu_memory_usage for event in profiler.events()]
    little = 10_000  # what an event holds beside the gradient, or beside the table of ones
    assert sum(change > size - little for change in changes) == 4
    assert abs(sum(changes)) < little


def test_memory_that_cannot_be_had_is_an_error_and_what_waits_is_given_up_first() -> None:
    assert_runs(
        """
        import resource
        import torch
        import embed_ext

        torch.set_num_threads(1)

        def gradient(num_rows, device="cpu"):
            table = torch.empty(1, 64).expand(num_rows, 64).requires_grad_()
            out = embed_ext.functional.embedding(torch.tensor([1]), table)
            return torch.autograd.grad(out.sum(), table)[0]

        gradient(10)
        limit = int(open("/proc/self/statm").read().split()[0]) * 4096 + 900 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        first = gradient(2**21)  # 512 MiB
        del first
        assert embed_ext.cached_bytes() == 2**29
        second = gradient(3 * 2**20)  # 768 MiB: only without the first
        assert second[1].sum() == 64
        assert embed_ext.cached_bytes() == 0
        try:
            gradient(2**24)
        except torch.OutOfMemoryError as error:
            assert "could not map 4294967296 bytes" in str(error)
        else:
            raise AssertionError("4 GiB of memory under a limit of 900 MiB")
        assert second[1].sum() == 64
        """
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_parent_and_child_do_not_share_what_waits() -> None:
    assert_runs(
        """
        import os
        import torch
        import embed_ext

        torch.set_num_threads(1)
        table = embed_ext.Embedding(50_000, 64)

        def step(row):
            table.weight.grad = None
            table(torch.tensor([row])).sum().backward()
            return table.weight.grad.nonzero()[:, 0].unique().tolist()

        assert step(3) == [3]
        table.weight.grad = None
        child = os.fork()
        if child == 0:
            os._exit(int(step(4) != [4] or step(5) != [5]))
        assert step(6) == [6]
        assert os.waitpid(child, 0)[1] == 0
        assert step(7) == [7]
        """
    )


def test_tables_of_one_size_share_what_waits_and_not_what_is_used() -> None:
    tables = [Embedding(20_000, WIDTH) for _ in range(3)]
    for step in range(3):
        for table in tables:
            table.zero_grad()
        for number, table in enumerate(tables):
            table(torch.tensor([number + step])).sum().backward()
        for number, table in enumerate(tables):
            assert table.weight.grad is not None
            assert_is_gradient(table.weight.grad, rows=(number + step,))


def test_a_size_that_no_number_holds_is_refused_as_torch_refuses_it() -> None:
    grad, indices = torch.ones(1, 1), torch.tensor([5])
    num_rows = 2**62 + 2**18
    messages = []
    for op in (torch.ops.aten, torch.ops.embed_ext):
        with pytest.raises(RuntimeError) as raised:
            op.embedding_dense_backward(grad, indices, num_rows, -1, False)
        messages.append(str(raised.value).splitlines()[0])
    assert messages[0] == messages[1]


def test_a_lazy_clone_copies_on_write() -> None:
    grad = gradient(50_000)
    clone = torch._lazy_clone(grad)
    clone.fill_(2)
    assert_is_gradient(grad)


def test_a_peak_long_ago_does_not_count() -> None:
    many = [gradient(5000) for _ in range(30)]
    del many
    for _ in range(400):
        gradient(5000)
    assert embed_ext.cached_bytes() <= 2 * 5000 * WIDTH * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_while_other_threads_take_memory() -> None:
    assert_runs(
        """
        import os
        import signal
        import threading
        import torch
        import embed_ext

        torch.set_num_threads(1)
        done = threading.Event()

        def gradient(num_rows):
            return torch.ops.embed_ext.embedding_dense_backward(
                torch.ones(1, 64), torch.tensor([1]), num_rows, -1, False
            )

        def take_and_give_back():
            while not done.is_set():
                for num_rows in (4096, 6000, 9000):
                    gradient(num_rows)

        many = [gradient(4096) for _ in range(2000)]  # a long list to look through
        del many
        threads = [threading.Thread(target=take_and_give_back) for _ in range(3)]
        for thread in threads:
            thread.start()
        ends = []
        for _ in range(40):
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # ends a deadlock
                gradient(4096)
                os._exit(0)
            ends.append(os.waitpid(child, 0)[1])
        done.set()
        for thread in threads:
            thread.join()
        assert not any(ends), ends
        """
    )
