"""step() itself: arguments, closures, hooks, and the gradients that it takes away."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import embed_ext
from embed_ext import optim
from tests.common import assert_close, assert_same_bits
from tests.optim.common import (
    ALL_CASES,
    ROWS,
    TORCHS,
    WIDTH,
    Case,
    make_gradient,
    make_parameter,
    take_steps,
)

CLASSES = [vars(optim)[name] for name in optim.__all__ if name[0].isupper()]


@pytest.mark.parametrize("kind", TORCHS)
def test_arguments_are_torchs_and_two_more(kind: Any) -> None:
    ours = inspect.signature(kind).parameters
    theirs = inspect.signature(TORCHS[kind]).parameters
    assert [(p.name, p.default, p.kind) for p in ours.values()][:-2] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    assert list(ours)[-2:] == ["stochastic_rounding", "seed"]
    assert issubclass(kind, TORCHS[kind])


@pytest.mark.parametrize("kind", CLASSES)
def test_every_argument_reaches_the_groups(kind: Any) -> None:
    values = {"lr": 0.5, "betas": (0.25, 0.75), "nesterov": True, "momentum": 0.5, "eps": 0.25}
    values |= {"lr_decay": 0.5, "weight_decay": 0.25, "initial_accumulator_value": 0.75}
    values |= {"maximize": True, "foreach": True, "stochastic_rounding": True, "seed": 9}
    values |= {"amsgrad": True, "decoupled_weight_decay": True}
    names = inspect.signature(kind).parameters
    options = {name: value for name, value in values.items() if name in names}
    group = kind([make_parameter()], **options).param_groups[0]
    assert {name: group[name] for name in options} == options
    for name in ("fused", "differentiable", "capturable"):
        if name in names:
            assert kind([make_parameter()], **{name: True}).param_groups[0][name] is True


@pytest.mark.parametrize("kind", CLASSES)
def test_options_that_torch_refuses(kind: Any) -> None:
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        kind([make_parameter()], lr=-1)
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])
    with pytest.raises(TypeError, match="params argument"):
        kind(make_parameter())
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        kind([make_parameter()], fused=True, foreach=True)


def test_groups_with_options_of_their_own() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [make_parameter()], "seed": 7, "lr": 1.0},
        {"params": [make_parameter()], "stochastic_rounding": False},
    ]
    optimizer = optim.Adagrad(groups, stochastic_rounding=True, seed=3)
    optimizer.add_param_group({"params": [make_parameter()]})
    found = [(g["stochastic_rounding"], g["seed"], g["lr"]) for g in optimizer.param_groups]
    assert found == [(True, 7, 1.0), (False, 3, 1e-2), (True, 3, 1e-2)]


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_gradients_are_put_back(case: Case) -> None:
    kind, options = case
    table, dense = make_parameter(), make_parameter()
    table.grad, dense.grad = make_gradient([1, 1]), torch.ones(ROWS, WIDTH)
    there, before = (table.grad, dense.grad), table.grad.clone()
    kind([table, dense], **options).step()
    assert (table.grad, dense.grad) == there
    assert not table.grad.is_coalesced()
    assert_same_bits(table.grad._values(), before._values())


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_tables_without_a_gradient_are_left_alone(case: Case) -> None:
    kind, options = case
    table, other = make_parameter(), make_parameter()
    other.grad = make_gradient([1])
    optimizer = kind([table, other], **options)
    optimizer.step()
    assert_same_bits(table, make_parameter())
    assert table not in optimizer.state


@pytest.mark.parametrize("kind", CLASSES)
def test_the_closure_is_called_once_with_gradients_on(kind: Any) -> None:
    table = embed_ext.Embedding(ROWS, WIDTH, sparse=True)
    optimizer = kind(table.parameters(), lr=0.1)
    before, calls = table.weight.detach().clone(), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert calls == [True]
    assert_close(loss.detach(), before[[1, 2]].sum())
    assert (table.weight[[1, 2]] < before[[1, 2]]).all()
    assert optimizer.step() is None


@pytest.fixture(params=[False, True], ids=["torchs unused", "torchs in use"])
def instantiated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether somebody has made an optimizer of torch's own classes, which then run hooks."""
    for kind in TORCHS.values():
        plain = kind.step
        while getattr(plain, "hooked", False):
            plain = plain.__wrapped__
        monkeypatch.setattr(kind, "step", plain)
        if request.param:
            kind([make_parameter()])
            assert kind.step.hooked
    yield request.param


@pytest.mark.parametrize("kind", CLASSES)
def test_hooks_run_once(kind: Any, instantiated: bool) -> None:
    table, dense = make_parameter(), make_parameter()
    table.grad, dense.grad = make_gradient([1]), torch.ones(ROWS, WIDTH)
    optimizer, calls = kind([table, dense], lr=0.1), []

    def record(name: str) -> Callable[..., None]:
        return lambda *_: calls.append((name, table.grad is not None, bool(optimizer.state)))

    optimizer = kind([table, dense], **({"momentum": 0.5} if kind is optim.SGD else {}))
    optimizer.register_step_pre_hook(record("before"))
    optimizer.register_step_post_hook(record("after"))
    handles = [
        register_optimizer_step_pre_hook(record("global before")),
        register_optimizer_step_post_hook(record("global after")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [
        ("global before", True, False),
        ("before", True, False),
        ("after", True, True),
        ("global after", True, True),
    ]
    torchs = next(base for base in kind.__mro__ if base in TORCHS.values())
    assert not instantiated or torchs.step.hooked


def test_a_subclass_with_a_step_of_its_own() -> None:
    class Counting(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.count = getattr(self, "count", 0) + 1
            return super().step(closure)

    table, plain = make_parameter(), make_parameter()
    optimizer = Counting([table], lr=0.1)
    steps = [make_gradient([1, 2]), make_gradient([2])]
    assert_same_bits(
        take_steps(optimizer, table, steps), take_steps(optim.SGD([plain], lr=0.1), plain, steps)
    )
    assert optimizer.count == 2


@pytest.mark.parametrize("kind", [optim.Adagrad, optim.RowwiseAdagrad])
def test_the_dense_state_is_there_before_torchs_step(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.11 expects what its constructor has made."""
    model = nn.Sequential(embed_ext.Embedding(9, 2, sparse=True), nn.Linear(2, 1))
    optimizer = kind(model.parameters(), initial_accumulator_value=0.5)
    model(torch.tensor([1])).sum().backward()
    seen = []
    monkeypatch.setattr(
        torch.optim.Adagrad,
        "step",
        lambda self: seen.append(float(self.state[model[1].bias]["sum"])),
    )
    optimizer.step()
    assert seen == [0.5]


def test_every_class_is_found_below_torchs_of_its_name() -> None:
    # Some libraries look up optimizers by name among all subclasses, and want no name twice.
    own = [getattr(optim, name) for name in optim.__all__ if name[0].isupper()]
    direct = [cls for cls in Optimizer.__subclasses__() if cls.__module__.startswith("embed_ext")]
    assert direct == []
    assert all(issubclass(cls, Optimizer) for cls in own)
