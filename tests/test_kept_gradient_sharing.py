"""keep_grad_buffer where weights, modules, copies and threads come together."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import embed_ext
from embed_ext import _C
from tests.kept_gradients import (
    ROWS,
    TOKENS,
    WIDTH,
    Kept,
    assert_same_grad,
    backward,
    memory_of,
    tables,
)

pytestmark = pytest.mark.usefixtures("verified_gradients")


@pytest.mark.parametrize("both_keep", [True, False])
def test_tied_weights(both_keep: bool) -> None:
    def pair(keep: bool) -> tuple[Kept, Kept, nn.Linear]:
        first = embed_ext.Embedding(ROWS, WIDTH, keep_grad_buffer=keep)
        second = embed_ext.Embedding(ROWS, WIDTH, keep_grad_buffer=keep and both_keep)
        head = nn.Linear(WIDTH, ROWS, bias=False)
        second.weight = head.weight = first.weight
        return first, second, head

    torch.manual_seed(0)
    kept, plain = pair(True), pair(False)
    plain[0].load_state_dict(kept[0].state_dict())
    indices = torch.randint(ROWS, (2, TOKENS))
    for _ in range(4):
        for first, second, head in (kept, plain):
            first.zero_grad()
            head(first(indices[0]) + second(indices[1])).square().sum().backward()
        torch.testing.assert_close(kept[0].weight.grad, plain[0].weight.grad)


def test_a_table_looked_up_twice_in_one_graph() -> None:
    kept, plain = tables()
    for step in range(4):
        for module in (kept, plain):
            module.zero_grad()
            generator = torch.Generator().manual_seed(step)
            first, second = torch.randint(ROWS, (2, TOKENS), generator=generator)
            (module(first).sum() + 2 * module(second).sum()).backward()
        assert_same_grad(kept, plain)


def test_two_modules_of_one_shape_keep_their_own() -> None:
    (one, plain_one), (two, plain_two) = tables(), tables()
    for step in range(3):
        for module, seed in ((one, 0), (plain_one, 0), (two, 50), (plain_two, 50)):
            module.zero_grad()
            backward(module, seed + step)
        assert memory_of(one) != memory_of(two)
        assert_same_grad(one, plain_one)
        assert_same_grad(two, plain_two)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: torch.load(_saved(module), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "save"],
)
def test_a_copy_keeps_its_own(duplicate: Callable[[Kept], Kept]) -> None:
    kept, plain = tables()
    backward(kept, 0)
    kept.zero_grad()
    twin = duplicate(kept)
    assert twin.keep_grad_buffer and twin._kept_gradient.bytes == 0
    for module in (twin, plain, kept):
        backward(module, 1)
    assert memory_of(twin) != memory_of(kept)
    assert_same_grad(twin, plain)
    assert_same_grad(kept, plain)


def _saved(module: Kept) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_backwards_of_several_threads() -> None:
    kept, plain = tables()
    for module in (kept, plain):
        module.zero_grad()

    def work(seed: int) -> None:
        for step in range(20):
            backward(kept, 1000 * seed + step)

    for round_ in range(3):
        kept.zero_grad()
        plain.zero_grad()
        threads = [threading.Thread(target=work, args=(4 * round_ + t,)) for t in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for t in range(4):
            for step in range(20):
                backward(plain, 1000 * (4 * round_ + t) + step)
        assert_same_grad(kept, plain)


def test_gradients_of_several_threads_at_once() -> None:
    kept, plain = tables()
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(30):
            generator = torch.Generator().manual_seed(100 * seed + step)
            indices = torch.randint(ROWS, (TOKENS,), generator=generator)
            (grad,) = torch.autograd.grad(kept(indices).sum(), kept.weight)
            (expected,) = torch.autograd.grad(plain(indices).sum(), plain.weight)
            if not torch.equal(grad, expected):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_that_python_has_seen_while_another_thread_asks_for_its_size() -> None:
    kept, _ = tables()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            assert kept._kept_gradient.bytes >= 0

    thread = threading.Thread(target=ask)
    thread.start()
    # Of two sizes in turn: the memory is let go of each time.
    weights = [kept.weight, nn.Parameter(torch.zeros(2 * ROWS, WIDTH))]
    for step in range(300):
        kept.weight = weights[step % 2]
        backward(kept, step)
        kept.weight.grad.untyped_storage()
        kept.zero_grad()
    stop.set()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize("by", ["a gradient of another size", "drop"])
def test_what_python_runs_as_the_memory_goes_may_ask_for_its_size(by: str) -> None:
    kept, _ = tables()
    backward(kept, 0)
    asked: list[int] = []
    memory = kept.weight.grad.untyped_storage()
    weakref.finalize(memory, lambda: asked.append(kept._kept_gradient.bytes))
    del memory
    kept.zero_grad()
    assert asked == []
    kept.weight = nn.Parameter(torch.zeros(2 * ROWS, WIDTH))
    let_go = kept._kept_gradient.drop if by == "drop" else lambda: backward(kept, 1)
    thread = threading.Thread(target=let_go, daemon=True)  # it would wait for itself for good
    thread.start()
    thread.join(timeout=60)
    assert asked == [0 if by == "drop" else kept.weight.nbytes]


def test_create_graph_and_autograd_grad() -> None:
    kept, plain = tables()
    backward(kept, 0)
    for module in (kept, plain):
        module.zero_grad()
        loss = module(torch.arange(5)).pow(3).sum()
        (grad,) = torch.autograd.grad(loss, module.weight, create_graph=True)
        grad.square().sum().backward()
    assert_same_grad(kept, plain)
    first = torch.autograd.grad(kept(torch.arange(5)).sum(), kept.weight)[0]
    second = torch.autograd.grad(kept(torch.arange(5, 9)).sum(), kept.weight)[0]
    assert first[:5].eq(1).all() and first[5:].eq(0).all()
    assert second[5:9].eq(1).all() and second.sum() == 4 * WIDTH


def test_a_weight_that_is_no_leaf() -> None:
    kept, plain = tables()
    for step in range(3):
        for module in (kept, plain):
            module.zero_grad()
            weight = module.weight * 2
            torch.func.functional_call(
                module, {"weight": weight}, torch.arange(step, 9)
            ).sum().backward()
        assert_same_grad(kept, plain)


@pytest.mark.parametrize("shape", [(ROWS * 2, WIDTH // 2), (ROWS // 4, WIDTH * 4)])
def test_another_shape_of_as_many_bytes(shape: tuple[int, int]) -> None:
    kept, plain = tables()
    for module in (kept, plain):
        backward(module, 0)
        module.zero_grad()
        module.weight = nn.Parameter(torch.zeros(shape))
        module(torch.tensor([5, 7])).sum().backward()
    assert_same_grad(kept, plain)


def test_another_dtype_or_size_takes_new_memory() -> None:
    kept, plain = tables()
    for module in (kept, plain):
        backward(module, 0)
        module.zero_grad()
        module.double()
        backward(module, 1)
    assert_same_grad(kept, plain)
    for module in (kept, plain):
        module.weight = nn.Parameter(torch.zeros(ROWS + 7, WIDTH))
        backward(module, 2)
    assert_same_grad(kept, plain)


class Watched(_C.KeptGradient):
    """Unlike the compiled class, it takes weak references."""


@pytest.mark.parametrize("end", ["module", "attribute", "revert"])
def test_the_memory_goes_with_the_module_or_when_told(end: str) -> None:
    kept, _ = tables()
    kept._kept_gradient = Watched()
    dead: list[bool] = []
    weakref.finalize(kept._kept_gradient, dead.append, True)
    backward(kept, 1)
    assert kept._kept_gradient.bytes > 0
    if end == "module":
        del kept
    elif end == "attribute":
        kept.keep_grad_buffer = False
    else:
        embed_ext.revert(kept)
    gc.collect()
    assert dead == [True]


def test_drop_lets_go_of_the_memory() -> None:
    kept, plain = tables()
    backward(kept, 0)
    kept._kept_gradient.drop()
    assert kept._kept_gradient.bytes == 0
    kept.zero_grad()
    for module in (kept, plain):
        backward(module, 1)
    assert_same_grad(kept, plain)


def test_it_is_an_attribute_and_shows_in_repr() -> None:
    table = embed_ext.Embedding(10, 3, padding_idx=1)
    assert repr(table) == "Embedding(10, 3, padding_idx=1)"
    table.keep_grad_buffer = True
    assert repr(table) == "Embedding(10, 3, padding_idx=1, keep_grad_buffer=True)"
    kept = table._kept_gradient
    table.keep_grad_buffer = True
    assert table._kept_gradient is kept
    assert list(table.state_dict()) == ["weight"]
    table.keep_grad_buffer = False
    assert repr(table) == "Embedding(10, 3, padding_idx=1)"


def test_a_sparse_gradient_has_no_buffer() -> None:
    with pytest.raises(ValueError, match="keep_grad_buffer: a sparse gradient has no buffer"):
        embed_ext.Embedding(10, 3, sparse=True, keep_grad_buffer=True)


def test_scripted_and_compiled_modules_go_without() -> None:
    kept, plain = tables()
    compiled: Any = torch.compile(kept, backend="aot_eager")
    for module in (torch.jit.script(kept), compiled, plain):
        module.zero_grad()
        backward(module, 0)
        assert kept._kept_gradient.bytes == 0
    assert_same_grad(kept, plain)
