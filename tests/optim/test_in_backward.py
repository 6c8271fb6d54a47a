"""Tables that are updated by the backward: the same training, and no gradient that is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import embed_ext
from embed_ext import optim
from tests.common import assert_same_bits, generator

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adagrad": lambda parameters: optim.Adagrad(parameters, lr=0.1),
    "RowwiseAdagrad": lambda parameters: optim.RowwiseAdagrad(parameters, lr=0.1),
    "AdamW": lambda parameters: optim.AdamW(parameters, lr=0.1),
}


def make_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "heads": embed_ext.Embedding(50, 6, sparse=True, padding_idx=0),
            "tails": embed_ext.Embedding(40, 6, sparse=True, coalesced=True),
            "out": nn.Linear(6, 3),
        }
    )


def loss_of(model: nn.ModuleDict, seed: int) -> Tensor:
    """A step's loss, in which one table is used twice."""
    heads = torch.randint(50, (2, 30), generator=generator(seed))
    tails = torch.randint(40, (30,), generator=generator(seed + 1))
    hidden = model["heads"](heads).sum(0) * model["tails"](tails)
    return model["out"](hidden).square().mean()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_as_without(name: str) -> None:
    kept = make_model()
    updated = copy.deepcopy(kept)
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (kept, updated)]
    optim.step_in_backward(optimizers[1])
    for step in range(4):
        for model, optimizer in zip((kept, updated), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, 10 * step).backward()
            if model is updated:
                assert model["heads"].weight.grad is model["tails"].weight.grad is None
                assert model["out"].weight.grad is not None
            optimizer.step()
        for actual, expected in zip(updated.parameters(), kept.parameters(), strict=True):
            assert_same_bits(actual.detach(), expected.detach())
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][number][key]))


def test_one_gradient_exists_at_a_time() -> None:
    model = make_model()
    optim.step_in_backward(optim.SGD(model.parameters(), lr=0.1))
    seen: list[list[tuple[int, ...]]] = []

    def note(table: Tensor) -> None:
        tables = [parameter for parameter in model.parameters() if parameter.shape[1:] == (6,)]
        seen.append([tuple(t.shape) for t in tables if t.grad is not None])

    for parameter in model.parameters():  # after the hook that updates
        parameter.register_post_accumulate_grad_hook(note)
    loss_of(model, 0).backward()
    assert len(seen) == 4
    assert all(shape == (3, 6) for shapes in seen for shape in shapes)


def test_a_second_backward_is_refused_before_anything_changes() -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optim.step_in_backward(optimizer)
    loss_of(model, 0).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="a second backward before optimizer.step"):
        loss_of(model, 1).backward()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    optimizer.zero_grad()
    optimizer.step()
    loss_of(model, 1).backward()


def test_clipping_by_the_norm_of_all_is_refused() -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    handle = optim.step_in_backward(optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="a table is updated in the backward"):
        embed_ext.clip_grad_norm_(model.parameters(), 1.0)
    embed_ext.clip_grad_norm_(model["out"].parameters(), 1.0)
    optimizer.step()
    handle.remove()
    loss_of(model, 1).backward()
    assert model["heads"].weight.grad is not None
    embed_ext.clip_grad_norm_(model.parameters(), 1.0)


def test_a_dense_gradient_waits_for_the_step() -> None:
    table = embed_ext.Embedding(5, 2)
    optimizer = optim.SGD(table.parameters(), lr=0.1)
    optim.step_in_backward(optimizer)
    before = table.weight.detach().clone()
    for _ in range(2):
        table(torch.tensor([1])).sum().backward()
    assert_same_bits(table.weight.detach(), before)
    optimizer.step()
    torch.testing.assert_close(table.weight[1].detach(), before[1] - 0.2)


def test_only_for_these_optimizers() -> None:
    table = embed_ext.Embedding(5, 2, sparse=True)
    with pytest.raises(TypeError, match="of embed_ext.optim, but got torch.optim.sgd.SGD"):
        optim.step_in_backward(torch.optim.SGD(table.parameters(), lr=0.1))


def test_clipping_by_value_is_refused() -> None:
    model = make_model()
    optim.step_in_backward(optim.SGD(model.parameters(), lr=0.1))
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="clip_grad_value_: .*updated in the backward"):
        embed_ext.clip_grad_value_(model.parameters(), 1.0)
