"""Backwards of several threads that add to one .grad, and threads that take it away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embed_ext import Embedding
from tests.joined_gradients import Uses, integers

NUM_ROWS, WIDTH, TOKENS, STEPS, THREADS = 64, 256, 512, 30, 4


def in_threads(works: list[Callable[[], object]]) -> None:
    """Run them all at once; raise the first error."""
    barrier = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def start(work: Callable[[], object]) -> None:
        barrier.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def steps(look_up: Callable[[Tensor], Tensor], seed: int, count: int = STEPS) -> list[Tensor]:
    """Graphs that are ready for their backward; their rows and their numbers are of each thread."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(count):
        indices = torch.randint(NUM_ROWS, (TOKENS,), generator=generator)
        losses.append((look_up(indices) * integers(TOKENS, WIDTH, seed=seed)).sum())
    return losses


def run_all(losses: list[Tensor]) -> None:
    for loss in losses:
        loss.backward()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("stock", [0, 2], ids=["ours alone", "beside torch's lookups"])
def test_canary_no_update_of_a_gradient_that_is_there_is_lost(stock: int, keep: bool) -> None:
    table = Embedding(NUM_ROWS, WIDTH, dtype=torch.float64, keep_grad_buffer=keep)
    twin = nn.Embedding(NUM_ROWS, WIDTH, dtype=torch.float64)
    table.weight.grad = there = torch.zeros(NUM_ROWS, WIDTH, dtype=torch.float64)

    def lookup_of(number: int) -> Callable[[Tensor], Tensor]:
        return (lambda i: F.embedding(i, table.weight)) if number < stock else table

    losses = [steps(lookup_of(number), number) for number in range(THREADS)]
    in_threads([lambda mine=mine: run_all(mine) for mine in losses])
    for number in range(THREADS):
        run_all(steps(twin, number))
    assert table.weight.grad is there
    assert torch.equal(there, twin.weight.grad)


@pytest.mark.parametrize("keep", [False, True])
def test_backwards_of_several_uses_at_once(keep: bool) -> None:
    """Each thread has a graph task, and so a sum, of its own."""
    table = Embedding(60, 8, dtype=torch.float64, keep_grad_buffer=keep)
    table.weight.grad = torch.zeros_like(table.weight)
    graphs = [[Uses(table).weighed_lookups(5) for _ in range(STEPS)] for _ in range(THREADS)]
    (once,) = torch.autograd.grad(Uses(table).weighed_lookups(5), table.weight)
    in_threads([lambda mine=mine: run_all(mine) for mine in graphs])
    assert torch.equal(table.weight.grad, THREADS * STEPS * once)


@pytest.mark.parametrize("keep", [False, True])
def test_one_graph_of_several_threads(keep: bool) -> None:
    table = Embedding(60, 8, dtype=torch.float64, keep_grad_buffer=keep)
    table.weight.grad = torch.zeros_like(table.weight)
    loss = Uses(table).weighed_lookups(5)
    (once,) = torch.autograd.grad(loss, table.weight, retain_graph=True)

    def work() -> None:
        for _ in range(STEPS):
            loss.backward(retain_graph=True)

    in_threads([work] * THREADS)
    assert torch.equal(table.weight.grad, THREADS * STEPS * once)


@pytest.mark.parametrize("keep", [False, True])
def test_a_thread_that_takes_the_gradient_away(keep: bool) -> None:
    """What it took and what is left are together all that was added, and nothing raises.

    One lookup a backward: torch's own addition, which follows several, reads .grad twice.
    """
    table = Embedding(4, 2, dtype=torch.float64, keep_grad_buffer=keep)
    count = 10_000  # to meet the moment in which the backward looks at .grad
    losses = [table(torch.tensor([0, 1, 1])).sum() for _ in range(count)]
    once = torch.tensor([[1], [2], [0], [0]]).expand(4, 2)
    taken: list[Tensor] = []  # holds each, so that none goes while the backward adds to it
    done = threading.Event()

    def take() -> None:
        while not done.is_set():
            grad = table.weight.grad
            if grad is not None:
                taken.append(grad)
                table.weight.grad = None
            time.sleep(0)  # hands the GIL on

    def add() -> None:
        try:
            run_all(losses)
        finally:
            done.set()

    in_threads([take, add])
    left = [] if table.weight.grad is None else [table.weight.grad]
    assert len(taken) > 1
    assert torch.equal(torch.stack(taken + left).sum(0).long(), count * once)
