"""keep_grad_buffer and writes that neither change the version of .grad nor hold it: by default they
are searched for, and a find ends the trust with one warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from tests.kept_gradients import (
    DTYPES,
    ROWS,
    WIDTH,
    Kept,
    assert_same_grad,
    backward,
    memory_of,
    tables,
)

FOUND = "keep_grad_buffer: row"


class DecaysThroughData(torch.optim.Optimizer):
    """As optimizers from before torch.no_grad() do it."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.data.add_(p.data, alpha=0.1)
                p.data.sub_(p.grad.data, alpha=0.5)


def warnings_of(run: Callable[[], object]) -> int:
    """How many of the warnings that run() raises tell of a find."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return sum(str(warning.message).startswith(FOUND) for warning in caught)


def next_gradients(kept: Kept, plain: Kept, seed: int) -> int:
    """Clear both, and run a backward of each; return the number of warnings."""
    for module in (kept, plain):
        module.zero_grad()
    backward(plain, seed)
    return warnings_of(lambda: backward(kept, seed))


def write_hidden(module: Kept, rows: Any = slice(None), value: float = 1.0) -> None:
    module.weight.grad.data[rows] = value


def unused_rows(module: Kept) -> list[int]:
    return module.weight.grad.any(1).logical_not().nonzero().view(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_through_data_trains_as_without_keeping(dtype: torch.dtype) -> None:
    kept, plain = tables(dtype)
    optimizers = [DecaysThroughData(module.parameters()) for module in (kept, plain)]
    told = []
    for step in range(40):
        told.append(next_gradients(kept, plain, step))
        assert_same_grad(kept, plain)
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(kept.weight, plain.weight)
    assert told == [0, 1] + [0] * 38


def test_one_optimizer_of_two_tables_is_told_of_for_each() -> None:
    pairs = [tables() for _ in range(2)]
    for step in range(3):
        for kept, plain in pairs:
            assert next_gradients(kept, plain, step) == (step == 1)
            assert_same_grad(kept, plain)
            write_hidden(kept)


@pytest.mark.parametrize("begin", [20, 21, 50])
def test_dense_writes_that_begin_late_are_found_at_the_next_step(begin: int) -> None:
    kept, plain = tables()
    for step in range(begin + 20):
        assert next_gradients(kept, plain, step) == (step == begin + 1)
        assert_same_grad(kept, plain)
        if step >= begin:
            write_hidden(kept)


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reuses", [0, 1, 3])
def test_a_single_number_is_found_among_the_first_gradients(
    reuses: int, dtype: torch.dtype, which: int
) -> None:
    kept, plain = tables(dtype)
    for step in range(reuses + 1):
        assert next_gradients(kept, plain, step) == 0
    row = unused_rows(plain)[which]
    kept.weight.grad.data[row, WIDTH - 1] = 2
    assert next_gradients(kept, plain, reuses + 1) == 1
    assert_same_grad(kept, plain)


def test_the_last_number_of_the_table_is_found() -> None:
    kept, plain = tables()
    for module in (kept, plain):
        module(torch.arange(4)).sum().backward()
    kept.weight.grad.data[-1, -1] = 2  # a float whose last byte alone is not zero
    assert next_gradients(kept, plain, 1) == 1
    assert_same_grad(kept, plain)


def test_a_single_row_is_found_later_by_the_samples() -> None:
    kept, plain = tables()
    for step in range(20):
        assert next_gradients(kept, plain, step) == 0
    told = 0
    for step in range(20, 120):
        write_hidden(kept, rows=77)
        told += next_gradients(kept, plain, step)
    assert told == 1
    assert_same_grad(kept, plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-40])
def test_any_number_is_found(value: float) -> None:
    kept, plain = tables()
    next_gradients(kept, plain, 0)
    write_hidden(kept, value=value)
    assert next_gradients(kept, plain, 1) == 1
    assert_same_grad(kept, plain)


def test_after_a_find_single_rows_are_cleared_too_and_nothing_more_is_said() -> None:
    kept, plain = tables()
    next_gradients(kept, plain, 0)
    write_hidden(kept)
    assert next_gradients(kept, plain, 1) == 1
    place = memory_of(kept)
    for step in range(2, 40):
        write_hidden(kept, rows=step)
        assert next_gradients(kept, plain, step) == 0
        assert_same_grad(kept, plain)
        assert memory_of(kept) == place
        backward(kept, 1000 + step)
        backward(plain, 1000 + step)
        assert_same_grad(kept, plain)


def test_a_find_in_a_backward_of_several_uses() -> None:
    kept, plain = tables()
    for step in range(4):
        for module in (kept, plain):
            module.zero_grad()

        def both(module: Kept = kept, step: int = step) -> None:
            (module(torch.arange(step, 9)).sum() + 2 * module(torch.arange(4)).sum()).backward()

        assert warnings_of(both) == (step == 1)
        both(plain)
        assert_same_grad(kept, plain)
        write_hidden(kept)


def test_a_warning_that_is_an_error_leaves_the_next_gradient_right() -> None:
    kept, plain = tables()
    next_gradients(kept, plain, 0)
    write_hidden(kept)
    kept.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=FOUND):
            backward(kept, 1)
    for step in range(2, 5):
        assert next_gradients(kept, plain, step) == 0
        assert_same_grad(kept, plain)


@pytest.mark.usefixtures("verified_gradients")
@pytest.mark.parametrize("steps", [1, 20])
def test_verify_raises_at_any_step_and_for_any_row(steps: int) -> None:
    kept, plain = tables()
    for step in range(steps):
        next_gradients(kept, plain, step)
    row = unused_rows(plain)[-1]
    write_hidden(kept, rows=row)
    kept.zero_grad()
    with pytest.raises(RuntimeError, match=rf"{FOUND} {row} of the kept gradient"):
        backward(kept, steps)
    for step in range(3):
        assert next_gradients(kept, plain, step) == 0
        assert_same_grad(kept, plain)


@pytest.mark.parametrize("step", [0, 15])
def test_increment_version_announces_a_write_and_keeps_the_trust(step: int) -> None:
    kept, plain = tables()
    for earlier in range(step + 1):
        next_gradients(kept, plain, earlier)
    write_hidden(kept)
    torch.autograd.graph.increment_version(kept.weight.grad)
    assert next_gradients(kept, plain, 100) == 0
    assert_same_grad(kept, plain)
    write_hidden(kept)  # and this one is not announced
    assert next_gradients(kept, plain, 101) == 1
    assert_same_grad(kept, plain)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_version_that_changed_between_two_backwards_into_one_gradient(hidden: bool) -> None:
    kept, plain = tables()
    for module in (kept, plain):
        backward(module, 1)
    kept.weight.grad.add_(1)
    backward(kept, 2)  # adds its rows, and raises the version again
    if hidden:
        write_hidden(kept)
    assert next_gradients(kept, plain, 3) == 0
    assert_same_grad(kept, plain)


# Several uses.


@pytest.mark.usefixtures("verified_gradients")
@pytest.mark.parametrize("uses", [2, 4])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_uses_keep_one_memory(micro_batches: int, uses: int) -> None:
    kept, plain = tables()
    places = set()
    for step in range(8):
        for module in (kept, plain):
            module.zero_grad()
            for micro in range(micro_batches):
                generator = torch.Generator().manual_seed(10 * step + micro)
                indices = torch.randint(ROWS, (uses, 30), generator=generator)
                outs = [(use + 1) * module(some).sum() for use, some in enumerate(indices)]
                torch.stack(outs).sum().backward()
        assert_same_grad(kept, plain)
        places.add(memory_of(kept))
    if micro_batches == 1:  # the sum of a second backward takes memory of its own
        assert len(places) == 1
    assert kept._kept_gradient.bytes == kept.weight.nbytes


@pytest.mark.usefixtures("verified_gradients")
def test_an_output_layer_and_lookups_of_changing_number() -> None:
    kept, plain = tables(torch.float64)
    for step in range(12):
        for module in (kept, plain):
            module.zero_grad()
            outs = [module(torch.arange(step + use, 20)) for use in range(step % 4 + 1)]
            loss = torch.stack([out.sum() for out in outs]).sum()
            if step % 3 == 1:
                loss = loss + (torch.ones(2, WIDTH).double() @ module.weight.t()).sum()
            loss.backward()
        assert_same_grad(kept, plain)


def test_a_module_that_is_never_written_to_is_never_told_of() -> None:
    kept, plain = tables()
    for step in range(100):
        assert next_gradients(kept, plain, step) == 0
        assert_same_grad(kept, plain)
    assert kept._kept_gradient.bytes == kept.weight.nbytes
