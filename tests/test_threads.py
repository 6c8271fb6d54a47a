"""Lookups from several Python threads, after a fork, and with any number of kernel threads."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from embed_ext import Embedding
from tests.common import make_indices, make_table, run_python

NUM_THREADS = 4
NUM_ROWS, WIDTH = 5000, 64
LARGE = (200, 100)  # tokens enough that the kernels share the work among threads


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Floats whose sums are exact, so that the order of addition cannot show."""
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed)).float()


def step(module: Embedding, seed: int) -> tuple[Tensor, Tensor]:
    """Output and gradient of one step; leaves `weight.grad` alone."""
    indices = make_indices(LARGE, NUM_ROWS, seed=seed)
    out = module(indices)
    (grad,) = torch.autograd.grad(out, module.weight, whole_numbers(*out.shape, seed=seed))
    return out.detach(), grad


def in_threads(work: Callable[[int], object]) -> list[object]:
    """Run work(0), work(1), ... at the same time; return the results or raise the first error."""
    barrier = threading.Barrier(NUM_THREADS)

    def start_together(number: int) -> object:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(start_together, range(NUM_THREADS)))


@pytest.mark.parametrize("sparse", [False, True])
def test_one_module_for_each_thread(sparse: bool) -> None:
    modules = [Embedding(NUM_ROWS, WIDTH, sparse=sparse) for _ in range(NUM_THREADS)]
    expected = [step(module, number) for number, module in enumerate(modules)]

    def repeat(number: int) -> None:
        for _ in range(3):
            out, grad = step(modules[number], number)
            assert torch.equal(out, expected[number][0])
            assert torch.equal(grad.to_dense(), expected[number][1].to_dense())

    in_threads(repeat)


def test_one_module_for_all_threads() -> None:
    module = Embedding(NUM_ROWS, WIDTH, padding_idx=3)
    lock = threading.Lock()
    module.weight.grad = None
    steps_each = 3
    total = sum(
        (step(module, seed)[1] for seed in range(NUM_THREADS * steps_each)),
        start=torch.zeros(NUM_ROWS, WIDTH),
    )

    def accumulate(number: int) -> None:
        for seed in range(number * steps_each, (number + 1) * steps_each):
            out = module(make_indices(LARGE, NUM_ROWS, seed=seed))
            loss = (out * whole_numbers(*out.shape, seed=seed)).sum()
            with lock:  # autograd adds to one .grad from several threads without a lock of its own
                loss.backward()

    in_threads(accumulate)
    assert module.weight.grad is not None
    assert torch.equal(module.weight.grad, total)


def test_errors_stay_in_the_thread_that_made_them() -> None:
    module = Embedding(NUM_ROWS, WIDTH)
    expected = step(module, 0)

    def work(number: int) -> None:
        for _ in range(20):
            if number % 2:
                with pytest.raises(IndexError, match=rf"indices\[1\] is {NUM_ROWS + number}, "):
                    module(torch.tensor([0, NUM_ROWS + number]))
            else:
                out, grad = step(module, 0)
                assert torch.equal(out, expected[0]) and torch.equal(grad, expected[1])

    in_threads(work)


@contextmanager
def only_voluntary_switches() -> Iterator[None]:
    """Python threads change only where the running one blocks or releases the GIL by itself."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.skipif(
    hasattr(sys, "_is_gil_enabled") and not sys._is_gil_enabled(), reason="this Python has no GIL"
)
def test_other_python_threads_run_during_a_lookup() -> None:
    module = Embedding(NUM_ROWS, 1024).requires_grad_(False)
    indices = make_indices((20_000,), NUM_ROWS)
    rounds = 0
    stop = False

    def count() -> None:
        nonlocal rounds
        while not stop:
            rounds += 1
            time.sleep(0)  # hands the GIL on

    thread = threading.Thread(target=count)
    with only_voluntary_switches():
        thread.start()
        try:
            # A busy machine may give the other thread no processor during one lookup.
            for _ in range(50):
                before = rounds
                module(indices)
                if rounds > before:
                    break
            else:
                pytest.fail("the other thread never ran: the lookup holds the GIL")
        finally:
            stop = True
            thread.join()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, scale_grad_by_freq: bool, sparse: bool
) -> None:
    weight = make_table(NUM_ROWS, WIDTH, dtype)
    indices = make_indices(LARGE, NUM_ROWS // 50)  # rows that many tokens share
    grad_output = torch.randn(*LARGE, WIDTH).to(dtype)
    results = []
    previous = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 8):
            torch.set_num_threads(num_threads)
            module = Embedding(
                NUM_ROWS,
                WIDTH,
                padding_idx=3,
                max_norm=4.0,
                scale_grad_by_freq=scale_grad_by_freq,
                sparse=sparse,
                _weight=weight.clone(),
            )
            out = module(indices)
            out.backward(grad_output)
            assert module.weight.grad is not None
            results.append((out.detach(), module.weight.detach(), module.weight.grad.to_dense()))
    finally:
        torch.set_num_threads(previous)
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert torch.equal(actual, expected)


# Forks. Each runs in its own interpreter, so that a deadlock ends that one and fails the test.

USE_BEFORE_FORK = f"""
import torch, embed_ext

torch.set_num_threads(2)
module = embed_ext.Embedding({NUM_ROWS}, {WIDTH})
# Starts threads, which a fork does not copy. Without autograd's engine: where there are GPUs,
# torch refuses to run that one in a child of a process that has used it.
indices = (torch.arange({LARGE[0] * LARGE[1]}) % {NUM_ROWS}).view{LARGE}
grad_output = torch.ones(*indices.shape, {WIDTH})
expected = (
    module(indices).detach(),
    torch.ops.embed_ext.embedding_dense_backward(grad_output, indices, {NUM_ROWS}),
)
"""


def run_to_the_end(code: str) -> None:
    result = run_python(USE_BEFORE_FORK + code, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "done"


def test_forked_process_can_look_up_and_go_backward() -> None:
    run_to_the_end(
        """
import os

def same_as_before():
    module.weight.grad = None
    out = module(indices)
    out.backward(grad_output)
    return torch.equal(out, expected[0]) and torch.equal(module.weight.grad, expected[1])

pid = os.fork()
if pid == 0:
    status = 1
    try:
        torch.set_num_threads(1)  # as the workers of a DataLoader do
        status = 0 if same_as_before() else 2
    finally:
        os._exit(status)
assert os.waitpid(pid, 0)[1] == 0
assert same_as_before()
print("done")
"""
    )


def test_dataloader_workers_can_look_up() -> None:
    run_to_the_end(
        """
from torch.utils.data import DataLoader, Dataset

table = embed_ext.Embedding.from_pretrained(module.weight.detach())

class Rows(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, item):
        return torch.arange(item, item + 500)

def look_up(batch):
    return table(torch.stack(batch))

loader = DataLoader(Rows(), batch_size=10, num_workers=2, collate_fn=look_up,
                    multiprocessing_context="fork")
for number, batch in enumerate(loader):
    indices = torch.stack([torch.arange(i, i + 500) for i in range(10 * number, 10 * number + 10)])
    assert torch.equal(batch, table.weight[indices])
assert number == 3
print("done")
"""
    )


def test_multiprocessing_children_can_train() -> None:
    run_to_the_end(
        """
import multiprocessing

def train(queue):
    torch.set_num_threads(1)
    module(torch.tensor([1, 1, 2])).sum().backward()
    queue.put(module.weight.grad[:4, 0].tolist())

context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
children = [context.Process(target=train, args=(queue,)) for _ in range(2)]
for child in children:
    child.start()
for _ in children:
    assert queue.get() == [0.0, 2.0, 1.0, 0.0]
for child in children:
    child.join()
    assert child.exitcode == 0
print("done")
"""
    )
