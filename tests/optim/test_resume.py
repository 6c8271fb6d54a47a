"""Training that is cut off, saved, and gone on with by new objects: the same bits as without."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, StepLR

import embed_ext
from embed_ext import optim
from tests.common import assert_same_bits, make_indices
from tests.optim.common import ALL_CASES, Case

ROWS, WIDTH, HALF = 40, 4, 3


def one_cycle(optimizer: Any) -> LRScheduler:
    """Where the optimizer has momentum or betas, these change too."""
    cycle = not {"momentum", "betas"}.isdisjoint(optimizer.defaults)
    return OneCycleLR(optimizer, max_lr=0.2, total_steps=2 * HALF + 1, cycle_momentum=cycle)


SCHEDULERS: dict[str, Callable[[Any], LRScheduler]] = {
    "step": lambda it: StepLR(it, step_size=2, gamma=0.5),
    "cosine": lambda it: CosineAnnealingLR(it, T_max=2 * HALF),
    "one cycle": one_cycle,
}
CATCHING_UP = ("sgd_decay", "sgd_momentum", "sgd_nesterov", "adamw_options")


class Model(nn.Module):
    """Tables of two dtypes with sparse gradients, one with dense ones, a layer; [N] -> loss."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"sparse": True, "coalesced": True}
        self.narrow = embed_ext.Embedding(ROWS, WIDTH, dtype=torch.bfloat16, **options)
        self.wide = embed_ext.Embedding(ROWS, WIDTH, padding_idx=2, max_norm=2.0, **options)
        self.dense = embed_ext.Embedding(ROWS, WIDTH)
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.narrow(indices).float() * self.wide(indices) + self.dense(indices)
        loss: Tensor = self.layer(hidden.tanh()).square().mean()
        return loss


class Run:
    """A model in training."""

    def __init__(self, case: Case, scheduler: str, seed: int, catching_up: bool = False) -> None:
        kind, options = case
        torch.manual_seed(seed)
        self.model = Model()
        groups: list[Any] = [
            {"params": self.model.narrow.parameters(), "stochastic_rounding": True, "seed": 7},
            {"params": [*self.model.wide.parameters(), *self.model.dense.parameters()]},
            {"params": self.model.layer.parameters()},
        ]
        self.optimizer: Any = kind(groups, **options)
        if catching_up:
            optim.catch_up(self.optimizer, self.model)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def train(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            self.optimizer.zero_grad()
            self.model(make_indices((12,), ROWS, seed=step)).backward()
            self.optimizer.step()
            self.scheduler.step()

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def saved(self) -> bytes:
        """The contents of a checkpoint file."""
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, checkpoint: bytes) -> None:
        states = torch.load(io.BytesIO(checkpoint), weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(states[name])


def assert_same_runs(actual: Run, expected: Run) -> None:
    """Compare all parameters and states bit by bit, and the options of the groups."""
    parameters = zip(actual.model.parameters(), expected.model.parameters(), strict=True)
    for parameter, wanted in parameters:
        assert_same_bits(parameter, wanted)
        own, other = actual.optimizer.state[parameter], expected.optimizer.state[wanted]
        assert own.keys() == other.keys()
        for key, state in own.items():
            assert (key, state is None) == (key, other[key] is None)
            if state is not None:
                assert_same_bits(state, other[key])
    groups = [run.optimizer.state_dict()["param_groups"] for run in (actual, expected)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ALL_CASES)
def test_a_resumed_run_ends_as_one_that_was_not_cut_off(name: str, scheduler: str) -> None:
    whole, first, second = (Run(ALL_CASES[name], scheduler, seed) for seed in (0, 0, 1))
    whole.train(0, 2 * HALF)
    first.train(0, HALF)
    second.load(first.saved())
    second.train(HALF, 2 * HALF)
    assert_same_runs(second, whole)


@pytest.mark.parametrize("name", CATCHING_UP)
def test_a_resumed_run_that_catches_up(name: str) -> None:
    """Saving brings all rows up to date: a run that was saved is what the resumed one is like."""
    first, second = (Run(ALL_CASES[name], "cosine", seed, catching_up=True) for seed in (0, 1))
    first.train(0, HALF)
    second.load(first.saved())
    for run in (first, second):
        run.train(HALF, 2 * HALF)
    assert_same_runs(second, first)
