"""One optimizer for a whole model: tables of all sorts beside everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, StepLR

import embed_ext
from embed_ext import optim
from tests.common import assert_close, assert_same_bits, make_indices
from tests.optim.common import ALL_CASES, CASES, TORCHS, Case

ROWS, WIDTH, STEPS = 12, 4, 4
# Where the rows that are not in use stay, under torch's dense steps too.
LAZY_IS_DENSE = {name: CASES[name] for name in ("sgd", "adagrad")}


class Model(nn.Module):
    """Two lookups of one table, one of another, and a layer; indices [N] -> loss."""

    def __init__(self, sparse: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = embed_ext.Embedding(ROWS, WIDTH, sparse=sparse, **options)
        self.places = embed_ext.Embedding(ROWS, WIDTH, sparse=False)
        self.layer = nn.Linear(WIDTH, 3)

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.words(indices) * self.words(indices.flip(0)) + self.places(indices)
        loss: Tensor = self.layer(hidden.tanh()).square().mean()
        return loss


def batch(step: int, everything: bool = False) -> Tensor:
    rows = make_indices((8,), ROWS, seed=step)
    return torch.cat([rows, torch.arange(ROWS)]) if everything else rows


def train(
    model: Model,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    everything: bool = False,
) -> list[Tensor]:
    """The parameters after some steps."""
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step, everything)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [parameter.detach() for parameter in model.parameters()]


def assert_same_parameters(actual: list[Tensor], expected: list[Tensor]) -> None:
    for parameter, wanted in zip(actual, expected, strict=True):
        assert_close(parameter, wanted)


def compare(
    case: Case, options: dict[str, Any], everything: bool, **model_options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """A model with sparse gradients and ours, and one with dense gradients and torch's."""
    kind, kind_options = case
    ours, theirs = Model(**model_options), Model(sparse=False, **model_options)
    optimizer = kind(ours.parameters(), **{**kind_options, **options})
    torchs = TORCHS[kind](theirs.parameters(), **{**kind_options, **options})
    return train(ours, optimizer, None, everything), train(theirs, torchs, None, everything)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_rows_in_use(case: Case, options: dict[str, Any]) -> None:
    assert_same_parameters(*compare(case, options, everything=True))


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("table", [{"padding_idx": 3}, {"max_norm": 0.5}, {}], ids=str)
@pytest.mark.parametrize("case", LAZY_IS_DENSE.values(), ids=LAZY_IS_DENSE)
def test_some_rows_in_use(case: Case, table: dict[str, Any], coalesced: bool) -> None:
    kind, options = case
    ours, theirs = Model(**table), Model(sparse=False, **table)
    ours.words.coalesced = coalesced
    actual = train(ours, kind(ours.parameters(), **options))
    expected = train(theirs, TORCHS[kind](theirs.parameters(), **options))
    assert_same_parameters(actual, expected)


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_the_padding_row_stays(case: Case) -> None:
    kind, options = case
    model = Model(padding_idx=3)
    with torch.no_grad():
        model.words.weight[3] = 2.0
    actual = train(model, kind(model.parameters(), **options), everything=True)
    assert_same_bits(actual[0][3], torch.full((WIDTH,), 2.0))


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_the_dense_rest_is_torchs_bit_by_bit(case: Case) -> None:
    """The table's gradient is zero, so that the rest sees the same numbers."""
    kind, options = case
    base = {optim.RowwiseAdagrad: optim.Adagrad, optim.RowwiseAdam: optim.Adam}.get(kind, kind)

    def run(make: Any, with_table: bool) -> list[Tensor]:
        torch.manual_seed(0)
        table, layer = embed_ext.Embedding(ROWS, WIDTH, sparse=True), nn.Linear(WIDTH, 3)
        tables = list(table.parameters()) if with_table else []
        optimizer = make([*layer.parameters(), *tables], **options)
        for step in range(STEPS):
            optimizer.zero_grad()
            torch.manual_seed(step)
            out = layer(torch.randn(5, WIDTH)).square().mean()
            (out + 0 * table(batch(step)).sum() if with_table else out).backward()
            optimizer.step()
        return [parameter.detach() for parameter in layer.parameters()]

    for actual, expected in zip(run(kind, True), run(TORCHS[base], False), strict=True):
        assert_same_bits(actual, expected)


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "step": lambda it: StepLR(it, step_size=1, gamma=0.5),
    "cosine": lambda it: CosineAnnealingLR(it, T_max=STEPS),
    "one cycle": lambda it: OneCycleLR(it, max_lr=0.2, total_steps=STEPS + 1),  # momentum, betas
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["sgd_momentum", "adam", "adamw_options"])
def test_schedulers(name: str, scheduler: str) -> None:
    kind, options = CASES[name]
    ours, theirs = Model(), Model(sparse=False)
    optimizer = kind(ours.parameters(), **options)
    torchs = TORCHS[kind](theirs.parameters(), **options)
    make = SCHEDULERS[scheduler]
    actual = train(ours, optimizer, make(optimizer), everything=True)
    assert_same_parameters(actual, train(theirs, torchs, make(torchs), everything=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_groups_of_their_own(case: Case) -> None:
    kind, options = case
    results = []
    for model, make in ((Model(), kind), (Model(sparse=False), TORCHS[kind])):
        others = [*model.places.parameters(), model.layer.weight]
        optimizer = make([{"params": others}, {"params": [model.layer.bias], "lr": 0.5}], **options)
        train(model, optimizer, everything=True)  # the table comes later
        optimizer.add_param_group({"params": [model.words.weight], "lr": 0.25})
        if make is torch.optim.Adagrad:  # torch 2.11 makes state in the constructor alone
            optimizer.state.update(make([model.words.weight], **options).state)
        results.append(train(model, optimizer, everything=True))
    assert_same_parameters(*results)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_of_two_batches(case: Case) -> None:
    kind, options = case
    results = []
    for model, make in ((Model(), kind), (Model(sparse=False), TORCHS[kind])):
        optimizer = make(model.parameters(), **options)
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in (0, 1):
                model(batch(2 * step + part, everything=True)).div(2).backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    assert_same_parameters(*results)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_table_that_an_output_layer_shares(case: Case) -> None:
    """Its gradient is sparse where the layer is not used, dense where it is."""
    kind, options = case
    results = []
    for sparse, make in ((True, kind), (False, TORCHS[kind])):
        torch.manual_seed(0)
        table = embed_ext.Embedding(ROWS, WIDTH, sparse=sparse)
        optimizer = make(table.parameters(), **options)
        for step in range(STEPS):
            optimizer.zero_grad()
            hidden = table(batch(step, everything=True)).tanh()
            loss = hidden.square().mean()
            if step % 2:
                loss = loss + (hidden @ table.weight.t()).square().mean()
            loss.backward()
            assert table.weight.grad.is_sparse == (sparse and not step % 2)
            optimizer.step()
        results.append([table.weight.detach()])
    assert_same_parameters(*results)


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_a_gradient_that_has_a_graph(case: Case) -> None:
    kind, options = case
    results = []
    for create_graph in (False, True):
        torch.manual_seed(0)
        table = embed_ext.Embedding(ROWS, WIDTH, sparse=True)
        optimizer = kind(table.parameters(), **options)
        table(batch(0)).square().sum().backward(create_graph=create_graph)
        optimizer.step()
        results.append([table.weight.detach()])
    assert_same_parameters(*results)


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_tables_of_torchs_own_module(case: Case) -> None:
    kind, options = case
    results = []
    for module in (embed_ext.Embedding, nn.Embedding):
        torch.manual_seed(0)
        table = module(ROWS, WIDTH, sparse=True)
        optimizer = kind(table.parameters(), **options)
        for step in range(STEPS):
            optimizer.zero_grad()
            table(batch(step)).square().sum().backward()
            optimizer.step()
        results.append([table.weight.detach()])
    assert_same_parameters(*results)


def test_the_first_loss_of_a_model_falls() -> None:
    for kind, options in ALL_CASES.values():
        model = Model()
        indices, maximize = batch(0, everything=True), options.get("maximize", False)
        before = model(indices).item()
        train(model, kind(model.parameters(), **{**options, "lr": 0.02}), everything=True)
        assert (model(indices).item() > before) == maximize


def test_a_compiled_step() -> None:
    results = []
    for compiled in (False, True):
        model = Model()
        optimizer = optim.Adam(model.parameters(), lr=0.1)
        step = torch.compile(lambda o=optimizer: o.step(), backend="eager")
        for number in range(2):
            optimizer.zero_grad()
            model(batch(number)).backward()
            step() if compiled else optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    assert_same_parameters(*results)
