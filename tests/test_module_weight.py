"""The table of a module is what `module.weight` is, wherever that comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embed_ext
from tests.swapping import INDICES


class Property(nn.Embedding):
    """Has a table that is made of its parameter."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        found: Any = nn.Module.__getattr__(self, "weight")
        return found * 2

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._parameters["weight"] = nn.Parameter(value)


class Answers(nn.Embedding):
    """Answers for what it does not have, and for more."""

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        return value * 2 if name == "weight" else value


class Reads(nn.Embedding):
    """Is asked for every attribute."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return value + 0 if name == "weight" else value


class Gathers(dict[str, Any]):
    """A mapping that does its work when it is subscripted, as DeepSpeed's does."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name) * 2


def shadowed() -> nn.Embedding:
    table = nn.Embedding(5, 3)
    object.__setattr__(table, "weight", torch.rand(5, 3))
    return table


def gathered() -> nn.Embedding:
    table = nn.Embedding(5, 3)
    table._parameters = Gathers(table._parameters)
    return table


MAKERS: dict[str, Callable[[], nn.Embedding]] = {
    "property": lambda: Property(5, 3),
    "getattr": lambda: Answers(5, 3),
    "getattribute": lambda: Reads(5, 3),
    "instance_attribute": shadowed,
    "mapping": gathered,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_converted_module_reads_the_weight_that_nn_embedding_reads(
    make: Callable[[], nn.Embedding],
) -> None:
    table = make()
    expected = table(INDICES)
    assert torch.equal(expected, table.weight[INDICES])
    assert len(embed_ext.convert(table).swapped) == 1
    assert torch.equal(table(INDICES), expected)


@contextmanager
def asked(calls: list[str]) -> Iterator[None]:
    """Notes for which attributes nn.Module.__getattr__ is asked within."""
    before = nn.Module.__getattr__

    def note(self: nn.Module, name: str) -> Any:
        calls.append(name)
        return before(self, name)

    nn.Module.__getattr__ = note  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__getattr__ = before  # type: ignore[method-assign]


def test_canary_an_ordinary_table_is_found_without_module_getattr() -> None:
    class Mine(embed_ext.Embedding):
        pass

    for module in (embed_ext.Embedding(5, 3), Mine(5, 3)):
        calls: list[str] = []
        with asked(calls):
            module(INDICES)
        assert calls == []
        object.__setattr__(module, "weight", torch.zeros(5, 3))
        assert not module(INDICES).any()
