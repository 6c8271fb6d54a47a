"""torch.load(weights_only=True), which loads a whole module if its class is allowed by name."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import embed_ext
from embed_ext import _C

INDICES = torch.tensor([[1, 4], [4, 0]])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"keep_grad_buffer": True},
    {"add_to_main_grad": True},
    {"sparse": True, "coalesced": True},
]


def saved(value: object) -> io.BytesIO:
    """The file, as from its start."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_whole_module_needs_its_class_and_no_other(options: dict[str, Any]) -> None:
    module = embed_ext.Embedding(5, 3, padding_idx=0, **options)
    module.weight.main_grad = torch.zeros(5, 3)  # type: ignore[attr-defined]
    module(INDICES).sum().backward()
    del module.weight.main_grad  # type: ignore[attr-defined]
    with pytest.raises(pickle.UnpicklingError, match="embed_ext.modules.Embedding"):
        torch.load(saved(module), weights_only=True)
    with torch.serialization.safe_globals([embed_ext.Embedding]):
        twin = torch.load(saved(module), weights_only=True)
    assert type(twin) is embed_ext.Embedding and repr(twin) == repr(module)
    assert torch.equal(twin.weight, module.weight)


def test_a_model_needs_every_class_of_it() -> None:
    stock = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with torch.serialization.safe_globals([nn.Sequential, nn.Embedding, nn.Linear]):
        assert torch.equal(torch.load(saved(stock))(INDICES), stock(INDICES))
    embed_ext.convert(stock)
    with torch.serialization.safe_globals([nn.Sequential, embed_ext.Embedding, nn.Linear]):
        assert torch.equal(torch.load(saved(stock))(INDICES), stock(INDICES))


def test_a_module_that_was_saved_with_the_class_of_its_kept_gradient() -> None:
    """As earlier versions saved it."""
    module = embed_ext.Embedding(5, 3, keep_grad_buffer=True)
    state = vars(module).copy()
    assert type(state["_kept_gradient"]) is _C.KeptGradient
    twin = embed_ext.Embedding.__new__(embed_ext.Embedding)
    twin.__setstate__(state)
    assert twin.keep_grad_buffer and twin._kept_gradient is not module._kept_gradient
