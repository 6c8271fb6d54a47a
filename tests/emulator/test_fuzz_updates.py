"""Random updates of rows by each op, each on random schedules, against the reference.

Cases are numbered as in test_fuzz.py. What is rounded at random is compared bit by bit with the
definition of that rounding, in plain integers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import embed_ext
from embed_ext import reference
from tests.common import LAYOUTS, REAL_DTYPES, assert_close, assert_same_bits, make_table
from tests.emulator import control
from tests.emulator.cases import MOST_ELEMENTS, ROWS, WIDTHS, every_case

pytestmark = pytest.mark.emulated

MASK = (1 << 32) - 1
Options = dict[str, Any]


def random_bits(seed: int, rows: Tensor, width: int) -> Tensor:
    """What each element [U, D] is rounded by, from 0 to 2**32 - 1, for rows [U]."""
    columns = torch.arange(width)
    found = []
    for row in rows.tolist():
        key = (seed + row * 0x9E3779B97F4A7C15) % (1 << 64)
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB % (1 << 64)
        key ^= key >> 31
        x = columns * 0x9E3779B9 + (key & MASK) & MASK
        x = (x ^ (x >> 16)) * 0x7FEB352D + (key >> 32) & MASK
        x = (x ^ (x >> 15)) * 0x846CA68B & MASK
        found.append(x ^ (x >> 16))
    return torch.stack(found) if found else torch.zeros(0, width, dtype=torch.int64)


def rounded_at_random(exact: Tensor, dtype: torch.dtype, drawn: Tensor) -> Tensor:
    """exact [U, D] float32, finite and not near the largest number, by the bits drawn [U, D]."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    bits = exact.contiguous().view(torch.int32).long() & MASK
    moved = (bits + (drawn & ((1 << dropped) - 1))) >> dropped << dropped
    result = torch.where(moved >= 1 << 31, moved - (1 << 32), moved).int().view(torch.float32)
    if dtype == torch.float16:
        steps = (exact.abs() * 2.0**24 + (drawn >> 8).float() * 2.0**-24).long().float()
        small = torch.copysign(steps * 2.0**-24, exact)
        result = torch.where(exact.abs() < 2.0**-14, small, result)
    return result.to(dtype)


@dataclass
class Case:
    """The arguments of one call; all but the indices are in one of several layouts."""

    rng: random.Random
    weight: Tensor  # [V, D]
    indices: Tensor  # [U]
    values: Tensor  # [U, D]
    options: Options
    seed: int | None

    def state(self, per_row: bool = False) -> Tensor:
        """A state that may be a second moment: [V, D], or [V]."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        rows, width = self.weight.shape
        state = make_table(rows, width, wide, seed=self.rng.randrange(100)).abs()
        if not per_row:
            return layout(self.rng, state)
        return state.sum(1) if self.rng.random() < 0.5 else state.repeat(1, 2)[:, 0]

    @property
    def with_exact_squares(self) -> bool:
        """Whether the sums of squares are the same in every order."""
        return not self.options["weight_decay"]


def layout(rng: random.Random, table: Tensor) -> Tensor:
    return LAYOUTS[rng.choice(list(LAYOUTS))](table)


def make_case(op: str, number: int) -> Case:
    """Some rows of a table, none or all of them; whole numbers where squares are to be exact."""
    rng = random.Random(f"{op} {number}")
    width = rng.choice([*WIDTHS, 2100])
    rows = rng.choice([v for v in ROWS if v * width <= MOST_ELEMENTS])
    count = rng.choice([0, 1, rng.randint(0, rows), rows // 2, rows])
    indices = torch.tensor(sorted(rng.sample(range(rows), count)), dtype=torch.int64)
    dtype = rng.choice(REAL_DTYPES)
    seeded = dtype.itemsize == 2 and rng.random() < 0.7
    values = make_table(count, width, dtype, seed=number + 1)
    if seeded:
        values = (values.float() * 3).round().to(dtype)
    small = seeded and rng.random() < 0.3  # where float16 has fewer bits
    weight = make_table(rows, width, dtype, seed=number) * (2.0**-15 if small else 1)
    options: Options = {
        "lr": 2.0**-16 if small else 0.1,
        "weight_decay": 0.0 if small else rng.choice([0.0, 0.03]),
        "maximize": rng.random() < 0.3,
    }
    if rng.random() < 0.3:
        indices = indices.repeat_interleave(2)[::2]
    seed = rng.choice([0, 7, -3, 2**63 - 1]) if seeded else None
    return Case(rng, layout(rng, weight), indices, layout(rng, values), options, seed)


def clones(arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> list[Any]:
    """The same numbers in other memory; those that are not indices as another dtype, if given."""
    return [
        x if x is None else x.to(dtype if x.is_floating_point() and dtype else x.dtype, copy=True)
        for x in arguments
    ]


def memory_around(tensor: Tensor) -> Callable[[], None]:
    """Returns what checks that nothing but the tensor itself has changed in its memory since."""
    storage, values = tensor.untyped_storage(), tensor.clone()
    before = torch.empty(0, dtype=torch.uint8).set_(storage.clone())

    def check() -> None:
        after = storage.clone()
        own = torch.empty(0, dtype=tensor.dtype).set_(
            after, tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        own.copy_(values)
        assert torch.equal(torch.empty(0, dtype=torch.uint8).set_(after), before)

    return check


def run(op: str, case: Case, states: list[Tensor | None], row_wise: bool = False) -> None:
    """Call the op and compare it with the reference, and what is rounded at random bit by bit."""
    arguments = (case.weight, *states, case.indices, case.values)
    others = torch.ones(len(case.weight), dtype=torch.bool)
    others[case.indices] = False
    expected, old_rows = clones(arguments), case.weight[others]
    getattr(reference, op)(*expected, **case.options)
    in_float32 = clones(arguments, torch.float32)
    written = [(x, y) for x, y in zip(arguments[:-2], expected, strict=False) if x is not None]
    checks = [memory_around(actual) for actual, _ in written]
    getattr(torch.ops.embed_ext, op)(*arguments, **case.options, seed=case.seed)
    embed_ext.check_indices()
    for check in checks:
        check()
    assert_same_bits(case.weight[others], old_rows)
    for actual, wanted in written:
        assert_close(actual.contiguous(), wanted.contiguous())
    if case.seed is not None and (not row_wise or case.with_exact_squares):
        getattr(torch.ops.embed_ext, op)(*in_float32, **case.options)
        exact, rows = in_float32[0][case.indices], case.weight[case.indices]
        drawn = random_bits(case.seed, case.indices, rows.size(1))
        assert_same_bits(rows, rounded_at_random(exact, rows.dtype, drawn))


@every_case
def test_sgd(number: int) -> None:
    case = make_case("sgd", number)
    buffer = case.state() if case.rng.random() < 0.6 else None
    if buffer is not None:
        case.options |= {
            "momentum": 0.9,
            "dampening": case.rng.choice([0.0, 0.25]),
            "nesterov": case.rng.random() < 0.5,
        }
    run("embedding_sgd_", case, [buffer])


@every_case
def test_adagrad(number: int) -> None:
    case = make_case("adagrad", number)
    row_wise = case.rng.random() < 0.5
    case.options["eps"] = case.rng.choice([1e-10, 1e-3])
    run("embedding_adagrad_", case, [case.state(row_wise)], row_wise)


@every_case
def test_adam(number: int) -> None:
    case = make_case("adam", number)
    row_wise = case.rng.random() < 0.5
    case.options |= {
        "beta1": case.rng.choice([0.0, 0.9]),
        "beta2": 0.99,
        "eps": 1e-8,
        "decoupled": case.rng.random() < 0.5,
        "step": case.rng.choice([1, 3, 100_000]),
    }
    run("embedding_adam_", case, [case.state(), case.state(row_wise)], row_wise)


@every_case
def test_adagrad_same_bits_on_every_schedule(number: int) -> None:
    """Sums of squares that depend on the order."""
    case = make_case("bits", number)
    total = case.state(per_row=True)
    results = []
    for seed in (0, 2 * number + 1, 2 * number + 2):
        control.set_seed(seed)
        weight, sums = case.weight.clone(), total.clone()
        torch.ops.embed_ext.embedding_adagrad_(
            weight, sums, case.indices, case.values, 0.1, 0.03, seed=case.seed
        )
        results.append((weight, sums))
    for weight, sums in results[1:]:
        assert_same_bits(weight, results[0][0])
        assert_same_bits(sums, results[0][1])
