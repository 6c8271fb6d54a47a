"""Clipping between a backward and the optimizer: in whose memory, and what the step makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.profiler import ProfilerActivity, profile

import embed_ext
from embed_ext import Embedding
from tests.common import OpLog, assert_close, make_indices

NUM_ROWS, WIDTH = 20, 4
SUM, COALESCE = "embed_ext.embedding_sparse_backward.default", "aten._coalesce.default"
CLIPS: dict[str, Callable[..., Any]] = {
    "norm": lambda of, parameters: of.clip_grad_norm_(parameters, 0.5),
    "value": lambda of, parameters: of.clip_grad_value_(parameters, 0.05),
}
each_clip = pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)


class Model(nn.Module):
    """Two lookups in one table, weighed by a dense layer."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self.weigh = nn.Linear(WIDTH, WIDTH)

    def forward(self, indices: Tensor) -> Tensor:
        return self.weigh(self.table(indices) * self.table(indices.flip(0)))


def models(**options: Any) -> tuple[Model, Model]:
    """Of equal weights: the table's gradient is sparse in the first, and dense in torch's."""
    ours = Model(Embedding(NUM_ROWS, WIDTH, **{"sparse": True, **options}))
    theirs = Model(nn.Embedding(NUM_ROWS, WIDTH))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def backward(model: nn.Module, seed: int = 1) -> None:
    model(make_indices((5, 3), NUM_ROWS, seed=seed)).square().sum().backward()


def table_with_grad(coalesced: bool, num_rows: int = NUM_ROWS, width: int = WIDTH) -> Embedding:
    table = Embedding(num_rows, width, sparse=True, coalesced=coalesced)
    table(make_indices((12,), num_rows)).pow(3).sum().backward()
    return table


# In whose memory.


@each_clip
def test_a_coalesced_gradient_is_clipped_where_it_is(clip: Callable[..., Any]) -> None:
    weight = table_with_grad(coalesced=True).weight
    grad, version = weight.grad, weight.grad._version
    places = [part.data_ptr() for part in (grad.indices(), grad.values())]
    before = grad.to_dense()
    clip(embed_ext, weight)
    assert weight.grad is grad and grad.is_coalesced() and grad._version > version
    assert places == [part.data_ptr() for part in (grad.indices(), grad.values())]
    expected = nn.Parameter(torch.zeros(NUM_ROWS, WIDTH))
    expected.grad = before
    clip(utils, expected)
    assert_close(grad.to_dense(), expected.grad)


@each_clip
def test_another_gradient_is_coalesced_once(clip: Callable[..., Any]) -> None:
    weight = table_with_grad(coalesced=False).weight
    before = weight.grad
    values = before._values().clone()
    with OpLog() as log:
        clip(embed_ext, weight)
    assert weight.grad is not before and weight.grad.is_coalesced()
    assert log.calls.count(SUM) == 1 and COALESCE not in log.calls
    assert torch.equal(before._values(), values)
    with OpLog() as log:
        clip(embed_ext, weight)
    assert SUM not in log.calls and COALESCE not in log.calls


@each_clip
@pytest.mark.parametrize("coalesced", [False, True])
def test_no_tensor_of_the_tables_size_is_made(clip: Callable[..., Any], coalesced: bool) -> None:
    table = table_with_grad(coalesced, num_rows=50_000, width=64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        clip(embed_ext, table.weight)
        embed_ext.get_total_norm(table.weight.grad, -torch.inf)
    events = recorded.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert 0 < max(sizes) < 50_000


@each_clip
def test_dense_gradients_are_torchs_to_clip(clip: Callable[..., Any]) -> None:
    calls = []
    for model, of in zip(models(sparse=False), (embed_ext, utils), strict=True):
        backward(model)
        before = [parameter.grad for parameter in model.parameters()]
        with OpLog() as log:
            clip(of, model.parameters())
        after = [parameter.grad for parameter in model.parameters()]
        assert all(grad is other for grad, other in zip(after, before, strict=True))
        calls.append(log.calls)
    assert calls[0] == calls[1] != []


@pytest.mark.parametrize("coalesced", [False, True])
def test_a_gradient_that_has_a_graph(coalesced: bool) -> None:
    """torch's functions take it, so these do."""
    grads = []
    for model, of in zip(models(coalesced=coalesced), (embed_ext, utils), strict=True):
        loss = model(make_indices((5, 3), NUM_ROWS)).square().sum()
        loss.backward(create_graph=True)
        of.clip_grad_norm_(model.parameters(), 0.5)
        grads.append([parameter.grad.detach().to_dense() for parameter in model.parameters()])
    for grad, other in zip(*grads, strict=True):
        assert_close(grad, other)


# What becomes of the step.


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


@each_clip
@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("kind", [sgd, torch.optim.Adagrad])
def test_a_table_used_twice_trains_as_with_a_dense_gradient(
    clip: Callable[..., Any], coalesced: bool, kind: Callable[..., torch.optim.Optimizer]
) -> None:
    pair = models(coalesced=coalesced)
    for model, of in zip(pair, (embed_ext, utils), strict=True):
        optimizer = kind(model.parameters())
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, seed)
            clip(of, model.parameters())
            optimizer.step()
    ours, theirs = (dict(model.named_parameters()) for model in pair)
    for name, parameter in ours.items():
        assert_close(parameter.detach(), theirs[name].detach())


@each_clip
def test_sparse_adam_finds_it_coalesced(clip: Callable[..., Any]) -> None:
    """Its step is that with the gradient that torch clips, made sparse again."""
    ours, theirs = (table_with_grad(coalesced=False).weight for _ in range(2))
    theirs.data.copy_(ours.detach())
    rows = ours.grad.coalesce().indices()[0]
    theirs.grad = ours.grad.to_dense()
    clip(embed_ext, ours)
    clip(utils, theirs)
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        theirs.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), theirs.grad[rows], ours.shape)
    with OpLog() as log:
        torch.optim.SparseAdam([ours]).step()
    torch.optim.SparseAdam([theirs]).step()
    assert COALESCE not in log.calls
    assert_close(ours.detach(), theirs.detach())


def test_a_tied_table() -> None:
    """A sparse and a dense gradient have a dense sum."""
    grads = []
    for model, of in zip(models(), (embed_ext, utils), strict=True):
        indices = make_indices((5,), NUM_ROWS)
        (model.table(indices) @ model.table.weight.t()).square().sum().backward()
        norm = of.clip_grad_norm_(model.parameters(), 0.5)
        assert model.table.weight.grad.layout is torch.strided
        grads.append((norm, model.table.weight.grad))
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected)
