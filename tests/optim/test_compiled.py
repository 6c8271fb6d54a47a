"""torch.compile around the forward of models with sparse tables; the step is left outside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import embed_ext
from embed_ext import optim
from tests.common import assert_close, assert_same_bits, make_indices

ROWS, WIDTH, STEPS = 30, 4, 4
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.5, "momentum": 0.9}),
    "RowwiseAdagrad": (optim.RowwiseAdagrad, {"lr": 0.1}),
    "AdamW": (optim.AdamW, {"lr": 0.1}),
}
TABLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "coalesced": {"coalesced": True},
    "padding": {"padding_idx": 3},
    "max_norm": {"max_norm": 1.0},
    "max_norm and padding, coalesced": {"max_norm": 1.0, "padding_idx": 3, "coalesced": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No test sees the graphs and guards of the one before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def empty_cache() -> Iterator[None]:
    """Nothing that an earlier build of the extension compiled to is used."""
    with fresh_cache():
        yield


class Model(nn.Module):
    """A table that is looked up `uses` times, and a layer; indices [N] -> loss."""

    def __init__(self, uses: int, kind: type[nn.Embedding], **options: Any) -> None:
        super().__init__()
        self.table = kind(ROWS, WIDTH, sparse=True, **options)
        self.layer = nn.Linear(WIDTH, 3)
        self.uses = uses
        self.tied = False

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.table(indices)
        for shift in range(1, self.uses):
            hidden = hidden * self.table((indices + shift) % ROWS)
        loss: Tensor = self.layer(hidden.tanh()).square().mean()
        return loss + (hidden @ self.table.weight.t()).square().mean() if self.tied else loss


def make_model(
    uses: int = 1, kind: type[nn.Embedding] = embed_ext.Embedding, **options: Any
) -> Model:
    torch.manual_seed(0)
    return Model(uses, kind, **options)


def train(model: Model, run: Callable[[Tensor], Tensor], name: str, parts: int = 1) -> None:
    """Some steps of the model by what runs it, of so many backwards each, with clipping."""
    kind, options = OPTIMIZERS[name]
    optimizer = kind(model.parameters(), **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            run(make_indices((8,), ROWS, seed=10 * step + part)).div(parts).backward()
        assert model.table.weight.grad.is_sparse != model.tied
        embed_ext.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def compare(model: Model, backend: str, name: str, parts: int = 1) -> None:
    """Train one eagerly and one compiled, as one graph."""
    eager = copy.deepcopy(model)
    train(eager, eager, name, parts)
    train(model, torch.compile(model, fullgraph=True, backend=backend), name, parts)
    check = assert_close if backend == "inductor" else assert_same_bits  # which sums in its order
    for actual, expected in zip(model.parameters(), eager.parameters(), strict=True):
        check(actual.detach(), expected.detach())


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("options", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_the_eager_ones(name: str, options: dict[str, Any], uses: int) -> None:
    compare(make_model(uses, **options), "aot_eager", name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_micro_batches(name: str) -> None:
    compare(make_model(uses=2, coalesced=True), "aot_eager", name, parts=2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_output_layer_that_shares_the_table(name: str) -> None:
    model = make_model()
    model.tied = True
    compare(model, "aot_eager", name)


def test_step_in_backward() -> None:
    models = [make_model(uses=2, coalesced=True) for _ in range(2)]
    for model, backend in zip(models, ("eager", "aot_eager"), strict=True):
        optimizer = optim.AdamW(model.parameters(), lr=0.1)
        optim.step_in_backward(optimizer)
        run = torch.compile(model, fullgraph=True, backend=backend)
        for step in range(STEPS):
            optimizer.zero_grad()
            run(make_indices((8,), ROWS, seed=step)).backward()
            assert model.table.weight.grad is None
            optimizer.step()
    for actual, expected in zip(*(model.parameters() for model in models), strict=True):
        assert_same_bits(actual.detach(), expected.detach())


@pytest.mark.slow
@pytest.mark.parametrize("options", TABLES.values(), ids=TABLES)
def test_inductor(empty_cache: None, options: dict[str, Any]) -> None:
    compare(make_model(**options), "inductor", "AdamW")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.Embedding, embed_ext.Embedding])
def test_inductor_cannot_add_sparse_gradients(empty_cache: None, kind: type[nn.Embedding]) -> None:
    """Not torch's own either; lookups that are kept out of the graph are what helps."""
    model = make_model(uses=2, kind=kind)
    expected = make_model(uses=2, kind=kind)
    run = torch.compile(model, backend="inductor")
    indices = make_indices((8,), ROWS)
    with pytest.raises(AssertionError, match="expected size 30==30, stride"):
        run(indices).backward()
    torch._dynamo.reset()
    table: Any = model.table
    table.forward = torch.compiler.disable(table.forward)
    torch.compile(model, backend="inductor")(indices).backward()
    expected(indices).backward()
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert_close(actual.grad.to_dense(), wanted.grad.to_dense())
