"""keep_grad_buffer: the gradients of nn.Embedding, in memory that is used again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import embed_ext
from tests.kept_gradients import (
    DTYPES,
    ROWS,
    TOKENS,
    WIDTH,
    assert_same_grad,
    backward,
    memory_of,
    tables,
)

pytestmark = pytest.mark.usefixtures("verified_gradients")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}])
def test_steps_use_one_memory_and_give_the_same_gradients(
    dtype: torch.dtype, options: dict[str, object]
) -> None:
    kept, plain = tables(dtype, **options)
    places = set()
    for step in range(6):
        for module in (kept, plain):
            module.zero_grad()
            backward(module, step, tokens=TOKENS * (step % 3))
        assert_same_grad(kept, plain)
        places.add(memory_of(kept))
    assert len(places) == 1
    assert kept._kept_gradient.bytes == kept.weight.nbytes


def test_a_large_table_whose_memory_is_mapped() -> None:
    kept = embed_ext.Embedding(200_000, 64, keep_grad_buffer=True)
    for step in range(3):
        kept.zero_grad()
        indices = torch.randint(200_000, (50,), generator=torch.Generator().manual_seed(step))
        kept(indices).backward(torch.ones(50, 64))
        expected = indices.bincount(minlength=200_000).float()
        assert torch.equal(kept.weight.grad[:, 0], expected)
        assert torch.equal(kept.weight.grad[:, 63], expected)


Change = Callable[[Tensor], object]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda grad: grad[5:9].add_(1), id="a view of it"),
        pytest.param(lambda grad: grad.detach().add_(1), id="detached"),
        pytest.param(lambda grad: torch._foreach_add_([grad], 1.0), id="foreach"),
        pytest.param(lambda grad: grad.copy_(torch.ones_like(grad)), id="copy_"),
        pytest.param(lambda grad: torch.add(grad, 1, out=grad), id="out="),
    ],
)
def test_in_place_changes_are_noticed(change: Change) -> None:
    kept, plain = tables()
    for step in range(4):
        for module in (kept, plain):
            module.zero_grad()
            backward(module, step)
        assert_same_grad(kept, plain)
        with torch.no_grad():
            change(kept.weight.grad)


def test_a_change_in_inference_mode_is_noticed() -> None:
    kept, plain = tables()
    for step in range(3):
        for module in (kept, plain):
            module.zero_grad()
            backward(module, step)
        assert_same_grad(kept, plain)
        with torch.inference_mode():
            kept.weight.grad.add_(1)


def test_clipping_the_gradient() -> None:
    kept, plain = tables()
    for step in range(4):
        for module in (kept, plain):
            module.zero_grad()
            backward(module, step)
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        assert_same_grad(kept, plain)


@pytest.mark.parametrize(
    "hold", [lambda grad: grad, lambda grad: grad.numpy(), lambda grad: grad[3]]
)
def test_a_gradient_that_is_still_held_is_left_alone(hold: Callable[[Tensor], object]) -> None:
    kept, _ = tables()
    backward(kept, 0)
    before = kept.weight.grad.clone()
    held, place = hold(kept.weight.grad), memory_of(kept)
    expected = copy.deepcopy(held)
    kept.zero_grad()
    backward(kept, 1)
    assert memory_of(kept) != place
    assert torch.equal(torch.as_tensor(held), torch.as_tensor(expected))
    assert not torch.equal(before, kept.weight.grad)


def test_writes_that_hide_are_found_by_the_search() -> None:
    kept, plain = tables()
    backward(kept, 0)
    kept.weight.grad.data.fill_(1)
    kept.zero_grad()
    with pytest.raises(RuntimeError, match=r"keep_grad_buffer: row \d+ of the kept gradient"):
        backward(kept, 1)
    for module in (kept, plain):
        module.zero_grad()
        backward(module, 1)
    assert_same_grad(kept, plain)  # said once, and put right


def test_increment_version_announces_such_a_write() -> None:
    kept, plain = tables()
    backward(kept, 0)
    kept.weight.grad.data.fill_(1)
    torch.autograd.graph.increment_version(kept.weight.grad)
    kept.zero_grad()
    for module in (kept, plain):
        backward(module, 1)
    assert_same_grad(kept, plain)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_over_micro_batches(set_to_none: bool) -> None:
    kept, plain = tables()
    for step in range(4):
        for module in (kept, plain):
            module.zero_grad(set_to_none=set_to_none)
            for micro in range(3):
                backward(module, 10 * step + micro)
        assert_same_grad(kept, plain)


@pytest.mark.parametrize("tokens", [40, 3 * ROWS])
def test_accumulation_into_an_alias_with_a_version_of_its_own(tokens: int) -> None:
    kept, plain = tables()
    for step in range(5):
        for micro_batch in range(3):
            for module in (kept, plain):
                backward(module, 10 * step + micro_batch, tokens)
                grad = module.weight.grad
                assert grad is not None
                module.weight.grad = grad.data
        assert_same_grad(kept, plain)
        for module in (kept, plain):
            module.weight.grad = None


@pytest.mark.parametrize("of_its_own", [False, True])
def test_accumulation_into_a_part_of_it_that_begins_with_another_row(of_its_own: bool) -> None:
    """Whether the part shares the version of the whole or has one of its own."""
    kept, plain = tables()
    whole = kept.weight
    backward(kept, 0)
    kept.weight = nn.Parameter(torch.zeros(ROWS // 2, WIDTH))
    kept.weight.grad = (whole.grad.data if of_its_own else whole.grad)[7 : 7 + ROWS // 2]
    kept(torch.tensor([0, 100])).sum().backward()  # rows 7 and 107 of the memory
    kept.weight, whole.grad = whole, None
    for module in (kept, plain):
        backward(module, 1)
    assert_same_grad(kept, plain)


def test_memory_that_its_storage_has_exchanged() -> None:
    """As who frees the memory of gradients between two steps does: nothing changes a version."""
    kept, plain = tables()
    backward(kept, 0)
    resize = torch.ops.inductor.resize_storage_bytes_
    size, place = kept.weight.grad.nbytes, memory_of(kept)
    resize(kept.weight.grad, 0)
    in_its_place = [torch.empty(size, dtype=torch.uint8) for _ in range(8)]
    resize(kept.weight.grad, size)
    assert memory_of(kept) != place
    kept.weight.grad.data.fill_(1)
    for module in (kept, plain):
        module.zero_grad()
        backward(module, 1)
    assert_same_grad(kept, plain)
    assert len(in_its_place) == 8


def test_accumulation_beyond_the_number_of_rows() -> None:
    kept, plain = tables()
    for step in range(3):
        for module in (kept, plain):
            module.zero_grad()
            for micro in range(20):
                backward(module, 100 * step + micro)
        assert_same_grad(kept, plain)


def test_a_backward_in_inference_mode() -> None:
    kept, plain = tables()
    for step in range(3):
        for module in (kept, plain):
            module.zero_grad()
            output = module(torch.arange(step, 9))
            with torch.inference_mode(step == 1):
                output.backward(torch.ones(9 - step, WIDTH))
        assert torch.equal(kept.weight.grad, plain.weight.grad)
