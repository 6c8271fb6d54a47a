"""What the tests of optimizers share: cases, gradients, and the reference to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from embed_ext import optim, reference
from tests.common import assert_close, generator, make_table

ROWS, WIDTH = 12, 5
LOW_PRECISION = (torch.bfloat16, torch.float16)
Case = tuple[Any, dict[str, Any]]  # a class of optimizers and its options
# Each class, with its options at their defaults and at others.
CASES: dict[str, Case] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd_decay": (optim.SGD, {"lr": 0.1, "weight_decay": 0.25}),
    "sgd_momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.5, "maximize": True}),
    "sgd_dampening": (optim.SGD, {"lr": 0.1, "momentum": 0.5, "dampening": 0.25}),
    "sgd_nesterov": (
        optim.SGD,
        {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.25},
    ),
    "adagrad": (optim.Adagrad, {"lr": 0.1}),
    "adagrad_options": (
        optim.Adagrad,
        {
            "lr": 0.1,
            "lr_decay": 0.5,
            "weight_decay": 0.25,
            "initial_accumulator_value": 0.5,
            "eps": 1e-3,
            "maximize": True,
        },
    ),
    "adam": (optim.Adam, {"lr": 0.1}),
    "adam_options": (
        optim.Adam,
        {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.25, "maximize": True},
    ),
    "adamw": (optim.AdamW, {"lr": 0.1}),
    "adamw_options": (
        optim.AdamW,
        {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.25, "maximize": True},
    ),
}
ROWWISE: dict[str, Case] = {
    "rowwise_adagrad": (optim.RowwiseAdagrad, {"lr": 0.1}),
    "rowwise_adagrad_options": (optim.RowwiseAdagrad, CASES["adagrad_options"][1]),
    "rowwise_adam": (optim.RowwiseAdam, {"lr": 0.1}),
    "rowwise_adam_options": (
        optim.RowwiseAdam,
        {**CASES["adam_options"][1], "decoupled_weight_decay": True},
    ),
}
ALL_CASES = {**CASES, **ROWWISE}
TORCHS: dict[Any, Any] = {
    optim.SGD: torch.optim.SGD,
    optim.Adagrad: torch.optim.Adagrad,
    optim.Adam: torch.optim.Adam,
    optim.AdamW: torch.optim.AdamW,
}


def make_parameter(
    dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> nn.Parameter:
    """A table [ROWS, WIDTH]."""
    return nn.Parameter(make_table(ROWS, WIDTH, dtype, device, seed))


def make_gradient(
    rows: list[int], dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> Tensor:
    """A sparse gradient [ROWS, WIDTH] of these rows in this order; its sums are exact."""
    eighths = torch.randint(-8, 9, (len(rows), WIDTH), generator=generator(seed))
    indices = torch.tensor(rows, dtype=torch.int64).unsqueeze(0)
    return torch.sparse_coo_tensor(
        indices.to(device), (eighths / 8).to(dtype).to(device), (ROWS, WIDTH)
    )


def some_rows(seed: int, count: int = 9) -> list[int]:
    """Rows in no order, of which some come twice and others not."""
    return torch.randint(ROWS, (count,), generator=generator(seed)).tolist()


def some_gradients(
    dtype: torch.dtype = torch.float32, start: int = 0, stop: int = 3
) -> list[Tensor]:
    """Sparse gradients [ROWS, WIDTH] of some rows, for the steps from `start` to `stop`."""
    return [make_gradient(some_rows(seed), dtype, seed) for seed in range(start, stop)]


def all_rows(seed: int) -> list[int]:
    """All rows in no order, of which some come twice."""
    return [*torch.randperm(ROWS, generator=generator(seed)).tolist(), *some_rows(seed, 4)]


def take_steps(optimizer: Optimizer, parameter: Tensor, gradients: list[Tensor]) -> Tensor:
    """Step with each gradient; return the parameter's values."""
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


def assert_same_states(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare what two optimizers keep of a parameter."""
    assert actual.keys() == expected.keys()
    for key, state in actual.items():
        assert_close(state, expected[key])


class Reference:
    """What the steps of a table ought to do, by embed_ext.reference."""

    def __init__(self, kind: Any, table: Tensor, options: dict[str, Any]) -> None:
        defaults = kind([nn.Parameter(table.clone())], **options).defaults
        self.kind, self.options = kind, defaults
        self.weight = table.detach().clone()  # [V, D]
        wide = torch.float64 if table.dtype == torch.float64 else torch.float32
        per_row = kind in (optim.RowwiseAdagrad, optim.RowwiseAdam)
        self.first = torch.zeros(table.shape, dtype=wide, device=table.device)
        self.second = torch.zeros_like(self.first[:, 0] if per_row else self.first)
        self.second += defaults.get("initial_accumulator_value", 0)
        self.steps = 0

    def step(self, gradient: Tensor) -> None:
        """Step with a sparse gradient [V, D]."""
        self.steps += 1
        rows, places = gradient._indices()[0].unique(return_inverse=True)
        values = self.first.new_zeros(len(rows), gradient.size(1))
        values.index_add_(0, places, gradient._values().to(values.dtype))
        self.update(rows, values.to(gradient.dtype))

    def update(self, rows: Tensor, values: Tensor) -> None:
        """Step with the parts of a coalesced gradient, [U] and [U, D]."""
        options, kind = self.options, self.kind
        lr, decay, maximize = options["lr"], options["weight_decay"], options["maximize"]
        if kind is optim.SGD:
            momentum = options["momentum"]
            reference.embedding_sgd_(
                self.weight,
                self.first if momentum else None,
                rows,
                values,
                lr,
                decay,
                momentum,
                options["dampening"] if self.steps > 1 else 0.0,
                options["nesterov"],
                maximize,
            )
        elif kind in (optim.Adagrad, optim.RowwiseAdagrad):
            lr /= 1 + (self.steps - 1) * options["lr_decay"]
            reference.embedding_adagrad_(
                self.weight, self.second, rows, values, lr, decay, options["eps"], maximize
            )
        else:
            beta1, beta2 = options["betas"]
            reference.embedding_adam_(
                self.weight,
                self.first,
                self.second,
                rows,
                values,
                lr,
                beta1,
                beta2,
                options["eps"],
                decay,
                options["decoupled_weight_decay"],
                self.steps,
                maximize,
            )
