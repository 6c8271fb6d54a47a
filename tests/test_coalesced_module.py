"""coalesced=True as an option of the module: where it is refused, shown, kept and dropped."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import embed_ext
from embed_ext import Embedding
from tests.common import assert_close, make_indices
from tests.test_coalesced import (
    NUM_ROWS,
    WIDTH,
    assert_coalesced,
    gradient,
    loss,
    some_indices,
    tables,
)


def test_without_sparse_it_is_refused() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"^coalesced: only a sparse gradient has .*sparse=True$"):
        Embedding(5, 3, coalesced=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_is_shown_where_it_is_not_the_default() -> None:
    ours, theirs = tables(padding_idx=3)
    assert repr(ours) == repr(theirs)[:-1] + ", coalesced=True)"
    ours.coalesced = False
    assert repr(ours) == repr(theirs)
    assert repr(Embedding(5, 3, keep_grad_buffer=True)) == "Embedding(5, 3, keep_grad_buffer=True)"


def test_is_read_at_each_call() -> None:
    module = Embedding(NUM_ROWS, WIDTH, sparse=True)
    assert not module.coalesced
    for coalesced in (False, True, False):
        module.coalesced = coalesced
        module.zero_grad()
        loss(module, some_indices()).backward()
        assert gradient(module).is_coalesced() == coalesced


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copies_have_it_too(copied: Callable[[Embedding], Embedding]) -> None:
    ours, _ = tables()
    twin = copied(ours)
    assert twin.coalesced and repr(twin) == repr(ours)
    loss(twin, some_indices()).backward()
    assert gradient(twin).is_coalesced()


def test_modules_saved_before_there_was_such_a_thing() -> None:
    module = Embedding(NUM_ROWS, WIDTH, sparse=True)
    assert "coalesced" not in vars(module)
    twin = pickle.loads(pickle.dumps(module))
    loss(twin, some_indices()).backward()
    assert not twin.coalesced and not gradient(twin).is_coalesced()


def test_converting_and_reverting() -> None:
    model = nn.Sequential(nn.Embedding(NUM_ROWS, WIDTH, sparse=True))
    embed_ext.convert(model)
    table: Any = model[0]
    assert table.coalesced is False
    table.coalesced = True
    loss(table, some_indices()).backward()
    assert gradient(table).is_coalesced()
    embed_ext.revert(model)
    assert not hasattr(table, "coalesced")
    embed_ext.convert(model)
    assert table.coalesced is False


def test_max_norm_beside_it() -> None:
    ours, theirs = tables(max_norm=0.5)
    for table in (ours, theirs):
        loss(table, some_indices()).backward()
    assert_close(ours.weight.detach(), theirs.weight.detach())
    assert_coalesced(gradient(ours), gradient(theirs))


@pytest.mark.parametrize("coalesced", [False, True])
def test_scripted_saved_and_loaded(coalesced: bool) -> None:
    module = Embedding(NUM_ROWS, WIDTH, sparse=True, coalesced=coalesced)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    loaded(some_indices()).sum().backward()
    assert loaded.weight.grad.is_coalesced() == coalesced
    assert loaded.weight.grad._nnz() < 40 or not coalesced


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    torch._dynamo.reset()
    ours, theirs = tables(padding_idx=3)
    run = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((4, 9), (5, 11)):
        indices = make_indices(shape, NUM_ROWS)
        for table, call in ((ours, run), (theirs, theirs)):
            table.zero_grad()
            call(indices).pow(3).sum().backward()
        assert_coalesced(gradient(ours), gradient(theirs))


def test_compiled_module_notices_a_change() -> None:
    torch._dynamo.reset()
    module = Embedding(NUM_ROWS, WIDTH, sparse=True)
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    for coalesced in (False, True, False):
        module.coalesced = coalesced
        module.zero_grad()
        run(some_indices()).sum().backward()
        assert gradient(module).is_coalesced() == coalesced


def test_jagged_indices() -> None:
    ours, theirs = tables()
    parts = [make_indices((length,), NUM_ROWS, seed=length) for length in (9, 1, 12)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    ours(jagged).values().pow(3).sum().backward()
    loss(theirs, torch.cat(parts)).backward()
    assert_coalesced(gradient(ours), gradient(theirs))
