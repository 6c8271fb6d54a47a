"""Swapping a model's lookups in place: what stays."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import embed_ext
from embed_ext import convert, revert
from tests.common import OPTIONS, assert_close, make_indices
from tests.swapping import INDICES, Tied, Watched


def test_only_the_class_changes() -> None:
    model = Tied()
    table: Any = model.words
    table.note = "mine"
    table.register_buffer("counts", torch.zeros(7))
    table.weight.requires_grad_(False)
    table.eval()
    before = {name: id(value) for name, value in vars(table).items()}
    reference = weakref.ref(table)
    shown = repr(model)
    convert(model)
    assert model.words is model.same is table is reference() and type(table) is embed_ext.Embedding
    assert {name: id(value) for name, value in vars(table).items()} == before
    assert not table.training and model.training and not table.weight.requires_grad
    assert model.out.weight is table.weight
    assert repr(model) == shown


@pytest.mark.parametrize("name", OPTIONS)
def test_options_stay(name: str, device: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, device=device, **OPTIONS[name]))
    twin = copy.deepcopy(model)
    convert(model)
    results = []
    for module in (model, twin):
        out = module(INDICES.to(device))
        out.square().sum().backward()
        grad: Any = module[0].weight.grad
        results.append((out, grad.to_dense() if grad.is_sparse else grad, grad.layout))
    assert_close(results[0][0], results[1][0])  # a norm is summed in another order
    assert "max_norm" in OPTIONS[name] or torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_every_kind_of_hook_stays() -> None:
    calls: list[str] = []

    def note(name: str, answer: Any = None) -> Callable[..., Any]:
        def hook(*_: Any, **__: Any) -> Any:
            calls.append(name)
            return answer

        return hook

    table = nn.Embedding(5, 3)
    handles = [
        table.register_forward_pre_hook(note("forward_pre")),
        table.register_forward_pre_hook(note("forward_pre_kwargs"), with_kwargs=True),
        table.register_forward_hook(note("forward")),
        table.register_forward_hook(note("forward_always"), always_call=True),
        table.register_full_backward_pre_hook(note("backward_pre")),
        table.register_full_backward_hook(note("backward")),
        table.register_state_dict_pre_hook(note("state_dict_pre")),
        table.register_state_dict_post_hook(note("state_dict")),
        table.register_load_state_dict_pre_hook(note("load_pre")),
        table.register_load_state_dict_post_hook(note("load")),
        table.weight.register_hook(note("grad")),
        table.weight.register_post_accumulate_grad_hook(note("accumulated")),
    ]

    def run() -> list[str]:
        calls.clear()
        table(INDICES).sum().backward()
        table.load_state_dict(OrderedDict(table.state_dict()))
        return sorted(calls)

    expected = run()
    assert len(expected) == len(handles)
    convert(table)
    assert run() == expected
    for handle in handles:
        handle.remove()
    assert run() == []


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_optimizer_goes_on_across_a_swap(kind: Any) -> None:
    torch.manual_seed(0)
    models = [Tied()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [kind(model.parameters(), lr=0.1) for model in models]
    for step in range(6):
        if step == 2:
            convert(models[0])
        if step == 4:
            revert(models[0])
        indices = make_indices((3, 5), 7, seed=step)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(indices).flatten(0, 1), indices.flatten()).backward()
            optimizer.step()
    for actual, expected in zip(*(model.parameters() for model in models), strict=True):
        assert_close(actual.detach(), expected.detach())


def test_device_dtype_and_state_dict_stay() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, dtype=torch.bfloat16, device="meta"))
    keys = list(model.state_dict())
    convert(model)
    weight = model[0].weight
    assert (weight.device.type, weight.dtype) == ("meta", torch.bfloat16)
    assert list(model.state_dict()) == keys
    assert type(model[0]) is embed_ext.Embedding


def test_table_without_gradient_of_any_dtype() -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.bool):
        table = nn.Embedding(5, 3, _weight=torch.zeros(5, 3).to(dtype), _freeze=True)
        expected = table(INDICES)
        assert len(convert(table).swapped) == 1
        assert torch.equal(table(INDICES).float(), expected.float())


def test_compiled_model_recompiles_and_finds_back() -> None:
    watched = Watched(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)))
    assert watched.served_across_swaps() == ["torch's", "ours", "torch's", "ours"]
    assert len(convert(watched.compiled).already) == 1


def test_copies_and_pickles_keep_the_class() -> None:
    model = Tied()
    convert(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.words) is embed_ext.Embedding and twin.words is twin.same
        assert twin.words.weight is twin.out.weight is not model.words.weight
        assert torch.equal(twin(INDICES), model(INDICES))


def test_pruned_and_weight_normed_tables_are_swapped() -> None:
    table = nn.Embedding(5, 3)
    prune.l1_unstructured(table, "weight", amount=0.4)
    expected = table(INDICES)
    assert len(convert(table).swapped) == 1
    assert torch.equal(table(INDICES), expected)
    prune.remove(table, "weight")
    assert isinstance(table.weight, nn.Parameter)
    assert torch.equal(table(INDICES), expected)
