"""GradScaler: its unscale_, and what it leaves to optimizers that are fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import embed_ext
from embed_ext import optim
from tests.common import assert_close, assert_same_bits

ROWS, WIDTH = 10, 4
CLASSES = [vars(optim)[name] for name in optim.__all__ if name[0].isupper()]


def make_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(embed_ext.Embedding(ROWS, WIDTH, sparse=True), nn.Linear(WIDTH, 2))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    indices = torch.tensor([[1, 4, 4, step], [0, step, 7, 1]])
    loss: torch.Tensor = model(indices).square().mean()
    return loss


def make_scaler() -> Any:
    return GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)


def poison(model: Any, where: str) -> None:
    """Put an infinity into a gradient."""
    grads = {"table": model[0].weight.grad._values(), "dense": model[1].weight.grad}
    grads[where].view(-1)[0] = torch.inf


@pytest.mark.parametrize("unscale", ["by step", "by hand"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_scaled_steps_are_steps(kind: Any, fused: bool | None, unscale: str) -> None:
    ours, plain = make_model(), make_model()
    optimizer = kind(ours.parameters(), lr=0.1, fused=fused)
    expected = kind(plain.parameters(), lr=0.1, fused=fused)
    scaler = make_scaler()
    for step in range(3):
        optimizer.zero_grad()
        expected.zero_grad()
        loss_of(plain, step).backward()
        expected.step()
        scaler.scale(loss_of(ours, step)).backward()
        if unscale == "by hand":
            scaler.unscale_(optimizer)
            assert_close(ours[0].weight.grad.to_dense(), plain[0].weight.grad.to_dense())
        scaler.step(optimizer)
        scaler.update()
    for parameter, wanted in zip(ours.parameters(), plain.parameters(), strict=True):
        assert_close(parameter.detach(), wanted.detach())
    assert scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("where", ["table", "dense"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_an_infinity_anywhere_skips_the_step(kind: Any, fused: bool | None, where: str) -> None:
    model = make_model()
    optimizer, scaler = kind(model.parameters(), lr=0.1, fused=fused), make_scaler()
    for step, bad in enumerate([False, True, False]):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if bad:
            poison(model, where)
        scaler.step(optimizer)
        scaler.update()
        for parameter, values in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, values) == bad
    if kind is not optim.SGD:
        assert [optimizer.state[p]["step"].item() for p in model.parameters()] == [2, 2, 2]
    assert scaler.get_scale() == 2.0**9


def test_a_first_step_that_is_skipped_makes_no_state() -> None:
    model = make_model()
    optimizer, scaler = optim.Adam(model.parameters(), fused=True), make_scaler()
    scaler.scale(loss_of(model, 0)).backward()
    poison(model, "table")
    scaler.step(optimizer)
    assert model[0].weight not in optimizer.state


def make_table(dtype: torch.dtype) -> embed_ext.Embedding:
    return embed_ext.Embedding(
        ROWS, WIDTH, sparse=True, _weight=torch.ones(ROWS, WIDTH, dtype=dtype)
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_a_float16_table_is_refused_before_its_small_gradients_are_lost(kind: Any) -> None:
    table = make_table(torch.float16)
    optimizer, scaler = kind(table.parameters(), lr=0.5, fused=True), make_scaler()
    scaler.scale(table(torch.tensor([1, 2, 2])).sum()).backward()
    # Whoever would unscale it refuses. A scaler of torch 2.11 leaves that to no Adagrad.
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        refused = pytest.raises(RuntimeError, match="in float16, where what it is for would be 0")
    else:
        refused = pytest.raises(ValueError, match="Attempting to unscale FP16 gradients")
    with refused:
        scaler.step(optimizer)
    assert torch.equal(table.weight, torch.ones_like(table.weight))


def test_scaled_gradients_of_bfloat16() -> None:
    tables = [make_table(torch.bfloat16) for _ in range(2)]
    optimizer = optim.SGD(tables[0].parameters(), lr=0.5, fused=True)
    expected = optim.SGD(tables[1].parameters(), lr=0.5)
    scaler = make_scaler()
    for table in tables:
        loss = table(torch.tensor([1, 2, 2])).sum()
        (scaler.scale(loss) if table is tables[0] else loss).backward()
    scaler.step(optimizer)
    expected.step()
    assert_same_bits(tables[0].weight, tables[1].weight)
