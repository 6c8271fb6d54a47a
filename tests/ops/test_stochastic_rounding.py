"""Rounding at random: to a neighbour, as often as it is near, and the same for the same seed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.common import assert_same_bits
from tests.ops.updates import METHODS, make_update

LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def rounded(exact: Tensor, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    """exact [V, D] float32 by way of momentum, which is float32: weight 0, minus -exact."""
    weight = torch.zeros_like(exact, dtype=dtype, device=device)
    buffer = -exact.to(device)
    indices = torch.arange(len(exact), device=device)
    torch.ops.embed_ext.embedding_sgd_(
        weight, buffer, indices, torch.zeros_like(weight), 1.0, 0.0, 1.0, seed=seed
    )
    return weight


def neighbours(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of `dtype` next to each element, itself twice if it is one, in float64."""
    nearest = exact.to(dtype)
    bits = nearest.view(torch.int16)
    step = torch.where(nearest.double().abs() > exact.double().abs(), -1, 1).to(torch.int16)
    other = (bits + step).view(dtype).double()
    nearest = nearest.double()
    other = torch.where(nearest == exact.double(), nearest, other)
    return torch.minimum(nearest, other), torch.maximum(nearest, other)


def samples() -> Tensor:
    """Floats of all sizes that float16 has, and beyond [600, 8]."""
    generator = torch.Generator().manual_seed(3)
    exponent = torch.randint(-26, 16, (600, 8), generator=generator)
    return torch.ldexp(torch.rand(600, 8, generator=generator) * 2 - 1, exponent)


@LOW_PRECISION
def test_to_a_neighbour(device: str, dtype: torch.dtype) -> None:
    exact = samples()
    low, high = neighbours(exact, dtype)
    for seed in range(5):
        actual = rounded(exact, dtype, seed, device).cpu().double()
        assert ((actual == low) | (actual == high)).all()


@LOW_PRECISION
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("size", [1.0, -3.0, 2.0**-20])
def test_as_often_as_it_is_near(device: str, size: float, share: float, dtype: torch.dtype) -> None:
    low, count = torch.tensor(size).to(dtype), 40_000
    high = (low.view(torch.int16) + 1).view(dtype)
    exact = torch.lerp(low.double(), high.double(), torch.tensor(share).double()).float()
    for shape in ((1, count), (count, 1)):
        actual = rounded(exact.expand(shape).contiguous(), dtype, 11, device)
        found = (actual.cpu() == high).double().mean().item()
        assert found == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count))


@LOW_PRECISION
def test_the_seed_decides(device: str, dtype: torch.dtype) -> None:
    exact = samples()
    first = rounded(exact, dtype, 7, device)
    assert_same_bits(rounded(exact, dtype, 7, device), first)
    assert not torch.equal(rounded(exact, dtype, 8, device), first)


@LOW_PRECISION
def test_a_row_is_rounded_as_such_whatever_rows_are_beside_it(
    device: str, dtype: torch.dtype
) -> None:
    update = make_update(METHODS["adagrad"], 60, 40, 60, dtype, device)
    whole = update.clone()
    whole.run(seed=5)
    some = torch.arange(0, 60, 3, device=device)
    part = type(update)(
        update.method, update.weight, update.states, update.indices[some], update.values[some]
    ).clone()
    part.run(seed=5)
    assert_same_bits(part.weight[some], whole.weight[some])


@LOW_PRECISION
def test_what_has_no_neighbour(device: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    exact = torch.tensor([[math.inf, -math.inf, math.nan, 0.0, -0.0, largest, -largest, 1.5]])
    for seed in range(3):
        actual = rounded(exact, dtype, seed, device).cpu()
        torch.testing.assert_close(actual, exact.to(dtype), rtol=0, atol=0, equal_nan=True)
    beyond = torch.full((1, 999), largest * (1 + 2.0**-12))
    assert (rounded(beyond, dtype, 1, device).cpu() == beyond.to(dtype)).all()


@LOW_PRECISION
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_right_on_average(device: str, dtype: torch.dtype, name: str) -> None:
    update = make_update(METHODS[name], 7, 12, 5, dtype, device)
    exact = update.wide().run_reference()[0]
    count = 400
    mean = torch.zeros_like(exact)
    for seed in range(count):
        mean += update.clone().run(seed=seed)[0].double() / count
    step = exact.abs() * torch.finfo(dtype).eps
    assert ((mean - exact).abs() <= step * 5 / math.sqrt(count) / 2 + 1e-7).all()
