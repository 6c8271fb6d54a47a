"""Numbers that are tensors, and seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from embed_ext import optim
from embed_ext.optim._state import step_seed
from tests.common import assert_same_bits
from tests.optim.common import (
    ALL_CASES,
    Case,
    make_gradient,
    make_parameter,
    some_rows,
    take_steps,
)


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_a_learning_rate_that_is_a_tensor(case: Case) -> None:
    kind, options = case
    table, plain = make_parameter(), make_parameter()
    steps = [make_gradient(some_rows(seed), seed=seed) for seed in range(3)]
    rate = torch.tensor(0.25, dtype=torch.float64)
    optimizer = kind([table], **{**options, "lr": rate})
    expected = kind([plain], **{**options, "lr": 0.25})
    assert_same_bits(take_steps(optimizer, table, steps), take_steps(expected, plain, steps))
    rate.fill_(0.125)
    expected.param_groups[0]["lr"] = 0.125
    assert_same_bits(take_steps(optimizer, table, steps), take_steps(expected, plain, steps))


def test_betas_and_a_decay_that_are_tensors() -> None:
    steps = [make_gradient(some_rows(seed), seed=seed) for seed in range(3)]
    for kind, tensors, numbers in (
        (optim.SGD, {"weight_decay": torch.tensor(0.25)}, {"weight_decay": 0.25}),
        (
            optim.Adam,
            {"betas": (torch.tensor(0.5), torch.tensor([0.75]))},
            {"betas": (0.5, 0.75)},
        ),
    ):
        table, plain = make_parameter(), make_parameter()
        actual = take_steps(kind([table], **tensors), table, steps)
        assert_same_bits(actual, take_steps(kind([plain], **numbers), plain, steps))


def test_each_step_and_table_has_a_seed_of_its_own() -> None:
    seeds = {
        step_seed(seed, position, step)
        for seed in (0, 1, 2, -1, 2**63, 2**64 + 5)
        for position in range(20)
        for step in range(1, 200)
    }
    assert len(seeds) == 6 * 20 * 199
    assert min(seeds) >= -(2**63) and max(seeds) < 2**63
    halves = sum(seed & 1 for seed in seeds) / len(seeds)
    assert abs(halves - 0.5) < 0.02


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_what_is_drawn_follows_from_seed_position_and_step(case: Case) -> None:
    kind, options = case

    def run(dtype: torch.dtype = torch.bfloat16, **more: Any) -> list[Tensor]:
        tables = [make_parameter(dtype) for _ in range(2)]
        optimizer = kind([{"params": [table]} for table in tables], **options, **more)
        for seed in range(3):
            for table in tables:
                table.grad = make_gradient(some_rows(seed), dtype, seed)
            optimizer.step()
        return [table.detach() for table in tables]

    first, second = run(stochastic_rounding=True, seed=1)
    again = run(stochastic_rounding=True, seed=1)
    assert_same_bits(first, again[0])
    assert_same_bits(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, run(stochastic_rounding=True, seed=2)[0])
    plain, twin = run()
    assert_same_bits(plain, twin)
    assert not torch.equal(plain, first)
    wide = run(torch.float32, stochastic_rounding=True)[0]
    assert_same_bits(wide, run(torch.float32)[0])
