"""Routing where others replace nn.functional.embedding, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from embed_ext import route, routed
from embed_ext.routing import is_routed
from tests.common import make_table
from tests.swapping import INDICES
from tests.test_routing import STOCK, takes_narrow


@pytest.fixture(autouse=True)
def nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test did, PyTorch is as it was afterwards, and no longer known as patched."""
    assert F.embedding is STOCK
    yield
    monkeypatch.undo()
    route(False)
    with routed():
        pass
    assert F.embedding is STOCK and not is_routed()


def patch_over(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Put a function in place that calls the one before it; return what it is called with."""
    calls: list[Tensor] = []
    inner: Callable[..., Tensor] = F.embedding

    def replacement(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(input)
        return inner(input, *args, **kwargs)

    monkeypatch.setattr(F, "embedding", replacement)
    return calls


def looks_up() -> bool:
    """Whether an ordinary lookup, of which each of the functions has its part, is right."""
    table = nn.Embedding(5, 3, _weight=make_table(5, 3))
    return bool(table(INDICES).equal(table.weight[INDICES]))


def test_whoever_replaced_the_function_stays_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def replacement(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return inner(*args, **kwargs)

    # Before: it serves what is not routed.
    inner = STOCK
    monkeypatch.setattr(F, "embedding", replacement)
    with routed():
        assert takes_narrow() and not calls
        with routed(False):
            nn.Embedding(5, 3)(INDICES)
        assert len(calls) == 1
    assert F.embedding is replacement
    monkeypatch.setattr(F, "embedding", STOCK)
    # In the middle: it is not thrown out, and routing still works below it.
    with routed():
        inner = F.embedding
        monkeypatch.setattr(F, "embedding", replacement)
    assert F.embedding is replacement and not takes_narrow()
    with routed():
        assert takes_narrow()
    assert F.embedding is replacement
    monkeypatch.setattr(F, "embedding", STOCK)
    with routed():
        assert takes_narrow()


def test_a_patch_made_while_routed_calls_us_and_we_do_not_call_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It keeps its place, with ours below it: to take it for PyTorch's would be a loop."""
    with routed():
        calls = patch_over(monkeypatch)
    for _ in range(2):
        assert looks_up() and len(calls) == 1
        calls.clear()
        for enabled in (True, False):
            with routed(enabled):
                assert looks_up() and len(calls) == 1
            calls.clear()


def test_a_patch_on_a_patch_made_while_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    with routed():
        first = patch_over(monkeypatch)
    second = patch_over(monkeypatch)
    with routed():
        assert looks_up() and takes_narrow()
    assert looks_up()
    assert len(first) == len(second) == 3
