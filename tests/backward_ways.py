"""Ways to get a program's gradient with respect to the table that it uses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from tests.joined_gradients import ROWS, WIDTH, gradient, integers

# (table, a run of the program -> its loss) -> gradient [V, D]
Way = Callable[[nn.Embedding, Callable[[], Tensor]], Tensor]


def _backward(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    run().backward()
    return gradient(table)


def _steps(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    for _ in range(3):
        table.zero_grad()
        run().backward()
    return gradient(table)


def _asked_for(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    (grad,) = torch.autograd.grad(run(), table.weight)
    assert table.weight.grad is None
    return grad


def _asked_for_beside_a_gradient(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    table.weight.grad = there = integers(ROWS, WIDTH, seed=5, dtype=table.weight.dtype)
    before = there.clone()
    (grad,) = torch.autograd.grad(run(), table.weight)
    assert table.weight.grad is there and torch.equal(there, before)
    return grad


def _inputs(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    run().backward(inputs=[table.weight])
    return gradient(table)


def _retained(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    loss = run()
    loss.backward(retain_graph=True)
    loss.backward()
    return gradient(table)


def _onto_a_gradient(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    table.weight.grad = there = integers(ROWS, WIDTH, seed=5, dtype=table.weight.dtype)
    run().backward()
    assert gradient(table) is there
    return there


def _zeroed(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    for _ in range(3):
        table.zero_grad(set_to_none=False)
        run().backward()
    return gradient(table)


def _checkpointed(use_reentrant: bool) -> Way:
    def way(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
        one = torch.ones((), dtype=table.weight.dtype, requires_grad=True)
        loss = checkpoint(lambda one: run() * one, one, use_reentrant=use_reentrant)
        (loss + run()).backward()  # and beside it
        return gradient(table)

    return way


class Nested(torch.autograd.Function):
    """Differentiates a program in a backward of its own."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, run: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.loss = run()
        return ctx.loss.detach() * one

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            ctx.loss.backward()
        return grad, None


def _nested(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    one = torch.ones((), dtype=table.weight.dtype, requires_grad=True)
    before = run()
    (before + Nested.apply(one, run) + run()).backward()
    return gradient(table)


def _anomaly(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    with torch.autograd.set_detect_anomaly(True):
        return _backward(table, run)


def _saved_elsewhere(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    with save_on_cpu():
        loss = run()
    loss.backward()
    return gradient(table)


def _another_thread(table: nn.Embedding, run: Callable[[], Tensor]) -> Tensor:
    thread = threading.Thread(target=run().backward)
    thread.start()
    thread.join()
    return gradient(table)


WAYS: dict[str, Way] = {
    "backward": _backward,
    "steps": _steps,
    "autograd.grad": _asked_for,
    "autograd.grad beside a gradient": _asked_for_beside_a_gradient,
    "inputs": _inputs,
    "retained": _retained,
    "onto a gradient": _onto_a_gradient,
    "zeroed": _zeroed,
    "reentrant checkpoint": _checkpointed(use_reentrant=True),
    "checkpoint": _checkpointed(use_reentrant=False),
    "nested": _nested,
    "anomaly mode": _anomaly,
    "saved elsewhere": _saved_elsewhere,
    "another thread": _another_thread,
}
