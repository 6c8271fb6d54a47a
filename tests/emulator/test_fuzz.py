"""Random cases of the lookup's five ops, each on random schedules, against the reference.

A case follows from its number. EMULATOR_CASES says how many there are of each op (40), and
EMULATOR_SEED which: it is added to the number, and to the seed of each test's schedules.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import embed_ext
from embed_ext import reference
from tests.common import (
    COMPLEX_DTYPES,
    FROZEN_DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    assert_close,
    assert_same_bits,
    make_table,
)
from tests.cuda.common import deterministic
from tests.emulator import control
from tests.emulator.cases import MOST_ELEMENTS, ROWS, WIDTHS, every_case

pytestmark = pytest.mark.emulated

ops = torch.ops.embed_ext

TOKENS = (0, 1, 2, 31, 32, 33, 63, 64, 65, 129, 257, 500, 2047, 2048, 2049, 2112, 4100, 4200)


@dataclass
class Case:
    """Everything that the ops have in common."""

    rng: random.Random
    indices: Tensor  # [N], some of them bad
    is_bad: Tensor  # [N]
    rows: int
    width: int
    padding_idx: int
    scale: bool

    def grad(self, dtype: torch.dtype) -> Tensor:
        """[N, D] of whole numbers, whose sums are exact, in one of several layouts."""
        values = self.rng.choices(range(-3, 4), k=4099)
        count = self.indices.numel() * self.width
        flat = torch.tensor(values).repeat(count // len(values) + 1)[:count]
        return self.layout(flat.view(self.indices.numel(), self.width).to(dtype))

    def layout(self, table: Tensor) -> Tensor:
        return LAYOUTS[self.rng.choice(list(LAYOUTS))](table)

    def sums(self, grad: Tensor) -> Tensor:
        """The dense gradient [V, D] in float64 or complex128."""
        wide = grad.to(torch.complex128 if grad.is_complex() else torch.float64)
        good = ~self.is_bad
        return reference.embedding_dense_backward(
            wide[good], self.indices.long()[good], self.rows, self.padding_idx, self.scale
        )

    @property
    def options(self) -> tuple[int, int, bool]:
        return self.rows, self.padding_idx, self.scale


def make_case(op: str, number: int) -> Case:
    rng = random.Random(f"{op} {number}")
    width = rng.choice(WIDTHS)
    count = rng.choice([n for n in TOKENS if n * width <= MOST_ELEMENTS])
    rows = rng.choice([v for v in ROWS if v * width <= MOST_ELEMENTS])
    used = rng.choice(
        [1, min(2, rows), max(1, rows // 3), rows]
    )  # few rows used often, or all of them
    values = [rng.randrange(used) for _ in range(count)]
    if rng.random() < 0.3:
        values.sort(reverse=rng.random() < 0.5)
    dtype = rng.choice([d for d in INDEX_DTYPES if rows <= torch.iinfo(d).max])
    bad = [v for v in (rows, rows + 7, -1, torch.iinfo(dtype).max) if v <= torch.iinfo(dtype).max]
    bad = [v for v in bad if v >= torch.iinfo(dtype).min and not 0 <= v < rows]
    share = rng.choice([0, 0, 0.02, 1]) if bad else 0
    is_bad = torch.tensor([rng.random() < share for _ in range(count)], dtype=torch.bool)
    indices = torch.tensor(values, dtype=torch.int64)
    replaced = rng.choices(bad or [0], k=int(is_bad.sum()))
    indices[is_bad] = torch.tensor(replaced, dtype=torch.int64)
    padding_idx = rng.choice([-1, -1, 0, rng.randrange(rows)])
    return Case(rng, indices.to(dtype), is_bad, rows, width, padding_idx, rng.random() < 0.25)


def take_report(case: Case) -> None:
    """A bad index is reported, and nothing else is."""
    if case.is_bad.any():
        with pytest.raises(IndexError, match="out of range"):
            embed_ext.check_indices()
    else:
        embed_ext.check_indices()


def assert_sums(actual: Tensor, expected: Tensor, case: Case) -> None:
    """Sums of whole numbers are exact, and then rounded once; means are not."""
    if case.scale:
        assert_close(actual, expected.to(actual.dtype))
    else:
        assert torch.equal(actual, expected.to(actual.dtype))


@every_case
def test_embedding(number: int) -> None:
    case = make_case("embedding", number)
    dtype = case.rng.choice([*REAL_DTYPES, *COMPLEX_DTYPES, *FROZEN_DTYPES])
    weight = case.layout(make_table(case.rows, case.width, dtype))
    actual = ops.embedding(weight, case.indices)
    take_report(case)
    expected = weight[torch.where(case.is_bad, 0, case.indices.long())].contiguous()
    expected.view(torch.uint8)[case.is_bad] = 0
    assert_same_bits(actual, expected)


@every_case
def test_dense_backward(number: int) -> None:
    case = make_case("dense", number)
    grad = case.grad(case.rng.choice([*REAL_DTYPES, *COMPLEX_DTYPES]))
    with deterministic(case.rng.random() < 0.5):
        actual = ops.embedding_dense_backward(grad, case.indices, *case.options)
    take_report(case)
    assert_sums(actual, case.sums(grad), case)


@every_case
def test_sparse_backward(number: int) -> None:
    case = make_case("sparse", number)
    grad = case.grad(case.rng.choice([*REAL_DTYPES, *COMPLEX_DTYPES]))
    coalesced = case.rng.random() < 0.6
    actual = ops.embedding_sparse_backward(grad, case.indices, *case.options, coalesced)
    take_report(case)
    rows, counted = case.indices.long(), case.indices.long() != case.padding_idx
    if coalesced:
        used = rows[counted & ~case.is_bad].unique()
        assert torch.equal(actual._indices()[0], used)
        assert_sums(actual._values(), case.sums(grad)[used], case)
    else:
        assert torch.equal(actual._indices()[0], torch.where(case.is_bad, 0, rows)[counted])
        if not case.scale:
            entries = torch.where(case.is_bad[:, None], torch.zeros_like(grad), grad)
            assert torch.equal(actual._values(), entries[counted])


@every_case
def test_grad_add(number: int) -> None:
    case = make_case("add", number)
    grad = case.grad(case.rng.choice([*REAL_DTYPES, *COMPLEX_DTYPES]))
    widened = grad.dtype.itemsize == 2 and case.rng.random() < 0.5
    table = torch.randint(-50, 50, (case.rows, case.width + 3)).to(
        torch.float32 if widened else grad.dtype
    )
    around, start = table.clone(), case.rng.randrange(4)
    target = table[:, start : start + case.width]
    exact = target.to(torch.complex128 if grad.is_complex() else torch.float64) + case.sums(grad)
    ops.embedding_grad_add_(target, grad, case.indices, case.padding_idx, case.scale)
    take_report(case)
    assert_sums(target, exact, case)
    around[:, start : start + case.width] = target
    assert_same_bits(table, around)


@every_case
def test_renorm(number: int) -> None:
    case = make_case("renorm", number)
    dtype = case.rng.choice([*REAL_DTYPES, *COMPLEX_DTYPES])
    weight = case.layout(make_table(case.rows, case.width, dtype))
    norm_type = case.rng.choice([2.0, 2.0, 1.0, 3.0, float("inf")])
    expected = weight.to(torch.complex128 if dtype.is_complex else torch.float64, copy=True)
    good = case.indices.long()[~case.is_bad]
    reference.embedding_renorm_(expected, good, 1.0, norm_type)
    ops.embedding_renorm_(weight, case.indices, 1.0, norm_type)
    take_report(case)
    assert_close(weight.contiguous(), expected.to(dtype).contiguous())


@every_case
def test_same_bits_on_every_schedule(number: int) -> None:
    """In deterministic mode, of numbers whose sums depend on the order."""
    case = make_case("bits", number)
    dtype = case.rng.choice(REAL_DTYPES)
    grad = case.layout(make_table(case.indices.numel(), case.width, dtype))
    results = []
    for seed in (0, 2 * number + 1, 2 * number + 2):
        control.set_seed(seed)
        with deterministic(True):
            dense = ops.embedding_dense_backward(grad, case.indices, *case.options)
        take_report(case)
        sparse = ops.embedding_sparse_backward(grad, case.indices, *case.options, True)
        take_report(case)
        results.append((dense, sparse._values()))
    for dense, values in results[1:]:
        assert_same_bits(dense, results[0][0])
        assert_same_bits(values, results[0][1])
