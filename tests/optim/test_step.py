"""step() itself: closures, hooks, errors, gradients, the scaler; and what is passed to torch."""

from __future__ import annotations

import inspect
import re
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
from embed_ext.optim._row_step import step_seed
from tests.common import assert_close, assert_same_bits
from tests.optim.common import (
    ALL_CASES,
    ROWS,
    TORCHS,
    WIDTH,
    Case,
    make_gradient,
    make_parameter,
    some_rows,
    take_steps,
)

CLASSES = [vars(optim)[name] for name in optim.__all__ if name[0].isupper()]


def states(optimizer: Optimizer) -> dict[Any, dict[str, Any]]:
    """A copy of all that the optimizer keeps."""
    return {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}


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
    assert getattr(TORCHS.get(kind, optim.SGD).step, "hooked", False) or not instantiated


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


# What is refused; nothing is written then.

VALUES = torch.ones(2, WIDTH)
REFUSED: dict[str, tuple[Any, dict[str, Any], Tensor, Tensor, str]] = {
    "amsgrad": (
        optim.AdamW,
        {"amsgrad": True},
        make_parameter(),
        make_gradient([1]),
        r"optim\.AdamW: amsgrad=True is not for sparse gradients .*parameter 1 of group 0.*\(12, 5",
    ),
    "capturable": (
        optim.RowwiseAdam,
        {"capturable": True},
        make_parameter(),
        make_gradient([1]),
        r"optim\.RowwiseAdam: capturable=True is not for sparse gradients",
    ),
    "differentiable": (
        optim.SGD,
        {"differentiable": True},
        make_parameter(),
        make_gradient([1]),
        r"optim\.SGD: differentiable=True is not for sparse gradients",
    ),
    "two sparse dimensions": (
        optim.Adagrad,
        {},
        make_parameter(),
        torch.eye(ROWS, WIDTH).to_sparse(),
        r"Adagrad: expected a gradient with 1 sparse and 1 dense dimension, but got 2 and 0",
    ),
    "one dimension": (
        optim.SGD,
        {},
        nn.Parameter(torch.ones(3)),
        torch.ones(3).to_sparse(),
        r"SGD: expected a gradient with 1 sparse and 1 dense dimension, but got 1 and 0",
    ),
    "three dimensions": (
        optim.Adam,
        {},
        nn.Parameter(torch.ones(3, 2, 2)),
        torch.ones(3, 2, 2).to_sparse(1),
        r"Adam: expected a gradient with 1 sparse and 1 dense dimension, but got 1 and 2",
    ),
    "complex": (
        optim.RowwiseAdagrad,
        {},
        nn.Parameter(torch.ones(3, 2, dtype=torch.complex64)),
        torch.ones(3, 2, dtype=torch.complex64).to_sparse(1),
        r"RowwiseAdagrad: expected a table of dtype float32, .*but got torch\.complex64",
    ),
    "a row that is not there": (
        optim.SGD,
        {},
        make_parameter(),
        torch.sparse_coo_tensor([[3, ROWS]], VALUES, (ROWS, WIDTH), check_invariants=False),
        r"indices\[1\] is 12",
    ),
    "seed": (
        optim.SGD,
        {"seed": 0.5},
        make_parameter(),
        make_gradient([1]),
        r"SGD: expected seed to be an int, but got 0\.5",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_nothing_is_written_after_an_error(what: str) -> None:
    kind, options, table, gradient, message = REFUSED[what]
    fine, dense = make_parameter(seed=1), make_parameter(seed=2)
    optimizer = kind([fine, table, dense], **options)
    fine.grad = make_gradient([1]) if not options else None
    dense.grad, table.grad = torch.ones(ROWS, WIDTH), gradient
    before = [parameter.detach().clone() for parameter in (fine, table, dense)]
    with pytest.raises((RuntimeError, IndexError), match=message):
        optimizer.step()
    for parameter, values in zip((fine, table, dense), before, strict=True):
        assert_same_bits(parameter, values)
    assert len(optimizer.state) == 0
    assert table.grad is gradient


def test_an_error_names_a_parameter_that_has_a_name() -> None:
    table = make_parameter()
    table.grad = make_gradient([1])
    optimizer = optim.Adam([("words.weight", table)], amsgrad=True)
    with pytest.raises(RuntimeError, match=re.escape("the gradient of words.weight")):
        optimizer.step()


def test_a_tensor_subclass_is_refused() -> None:
    class Mine(nn.Parameter):
        pass

    table = Mine(torch.ones(ROWS, WIDTH))
    table.grad = make_gradient([1])
    with pytest.raises(RuntimeError, match="SGD: its weight is of type Mine"):
        optim.SGD([table]).step()


def test_gradients_come_back_after_an_error_in_torchs_step() -> None:
    table, dense = make_parameter(), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    table.grad, dense.grad = make_gradient([1]), torch.ones(3, dtype=torch.complex64)
    there = table.grad
    with pytest.raises(RuntimeError, match="fused=True"):
        optim.Adam([table, dense], fused=True).step()
    assert table.grad is there
    assert_same_bits(table, make_parameter())


def test_a_coalesced_mark_that_is_not_true() -> None:
    """The op refuses it; the table's state is as if the step had not been."""
    table = make_parameter()
    gradient = make_gradient([4, 2])._coalesced_(True)
    optimizer = optim.Adam([table])
    table.grad = gradient
    with pytest.raises(IndexError, match="strictly ascending"):
        optimizer.step()
    assert table not in optimizer.state and table.grad is gradient
    assert_same_bits(table, make_parameter())


# Numbers that are tensors.


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


# Seeds.


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
