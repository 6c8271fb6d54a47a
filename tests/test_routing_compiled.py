"""Routing and torch.compile: compiled code notices every change."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embed_ext import route, routed, routing
from tests.common import run_python
from tests.swapping import INDICES, Scaled, Watched

STOCK = F.embedding


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    """Whatever a test did, PyTorch is as it was afterwards."""
    yield
    route(False)
    assert F.embedding is STOCK


@pytest.fixture
def watched() -> Watched:
    return Watched(nn.Sequential(Scaled(5, 3), nn.Linear(3, 2)))


def test_compiled_follows_the_context(watched: Watched) -> None:
    seen = [watched()]
    for _ in range(2):
        with routed():
            seen.append(watched())
            with routed(False):
                seen.append(watched())
        seen.append(watched())
    assert seen == ["torch's"] + ["ours", "torch's", "torch's"] * 2


def test_compiled_first_within_the_context(watched: Watched) -> None:
    with routed():
        assert watched() == "ours"
    assert watched() == "torch's"


def test_compiled_follows_the_switch(watched: Watched) -> None:
    seen = []
    for enabled in (True, False, True, False):
        route(enabled)
        seen.append(watched())
    assert seen == ["ours", "torch's", "ours", "torch's"]


def test_compiled_follows_its_thread(watched: Watched) -> None:
    with ThreadPoolExecutor(1) as other:
        with routed():
            seen = [watched(), other.submit(watched).result(), watched()]
        route(True)
        seen.append(other.submit(watched).result())
    assert seen == ["ours", "torch's", "ours", "ours"]


def test_compiled_under_a_mode(watched: Watched) -> None:
    with torch.device("cpu"):
        assert watched() == "torch's"
        with routed():
            assert watched() == "ours"


def test_context_within_what_is_compiled() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Scaled(5, 3)

        def forward(self, indices: Tensor) -> Tensor:
            with routed():
                return self.table(indices)  # type: ignore[no-any-return]

    watched = Watched(Inside(), fullgraph=False)
    assert [watched(), watched()] == ["ours", "ours"]
    assert F.embedding is STOCK and routing._num_users == 0


def test_dynamo_imported_while_routed() -> None:
    """In a new process, since Dynamo makes its list of functions when it is imported."""
    result = run_python(
        """
import torch, embed_ext, sys
assert "torch._dynamo" not in sys.modules
embed_ext.route(True)
ran = []
def backend(graph, _):
    ops = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    def run(*args):
        ran.extend(ops)
        return graph.forward(*args)
    return run
table = torch.compile(torch.nn.Embedding(5, 3), backend=backend, fullgraph=True)
table(torch.tensor([1]))
embed_ext.route(False)
table(torch.tensor([1]))
print([op.split(" at ")[0] for op in ran])
"""
    )
    assert result.stdout == "['embed_ext.embedding', '<function embedding']\n", result.stderr


def test_export_records_the_op() -> None:
    table = Scaled(5, 3)
    with routed():
        program = torch.export.export(table, (INDICES,))
    assert "torch.ops.embed_ext.embedding" in program.graph_module.code
    assert torch.equal(program.module()(INDICES), table(INDICES))
