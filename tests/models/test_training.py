"""PyG's random walks and PyKEEN's pipeline, with sparse gradients and ``embed_ext.optim``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import embed_ext
from tests.common import generator
from tests.models.sparse_training import assert_same_parameters, steps, with_sparse_gradients
from tests.models.test_pykeen import make_factory

NODES, EDGES, BETA = 40, 160, 0.999
pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries say of themselves


# --- PyG: random walks, whose examples train with SparseAdam -------------------------------------


def random_walk(
    rowptr: Tensor, col: Tensor, start: Tensor, length: int, p: float, q: float
) -> Tensor:
    """Nodes [B, length + 1], as by pyg-lib, which the tests do not install, for p = q = 1."""
    assert p == q == 1
    walk = [start]
    for _ in range(length):
        first, degree = rowptr[walk[-1]], rowptr[walk[-1] + 1] - rowptr[walk[-1]]
        walk.append(col[first + (torch.rand(len(start)) * degree).long()])
    return torch.stack(walk, dim=1)


def make_walker(torch_geometric: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Node2Vec or MetaPath2Vec as its documentation has it, of a graph without isolated nodes."""
    torch.manual_seed(0)
    ring = torch.arange(NODES)
    edges = torch.randint(NODES, (2, EDGES), generator=generator(1))
    edges = torch.cat([edges, torch.stack([ring, ring.roll(1)])], dim=1)
    options = {"embedding_dim": 8, "walk_length": 6, "context_size": 4, "walks_per_node": 4}
    if name == "MetaPath2Vec":
        path = [("author", "writes", "paper"), ("paper", "written_by", "author")]
        graph = {path[0]: edges, path[1]: edges.flip(0)}
        return torch_geometric.nn.MetaPath2Vec(graph, metapath=path, sparse=True, **options)
    node2vec = import_module("torch_geometric.nn.models.node2vec")
    if not node2vec.WITH_PYG_LIB:
        monkeypatch.setattr(node2vec, "WITH_PYG_LIB", True)
        monkeypatch.setattr(torch.ops.pyg, "random_walk", random_walk, raising=False)
    return torch_geometric.nn.Node2Vec(edges, sparse=True, **options)


def walk_and_train(model: Any, optimizer: Any, begin: Callable[[int], None]) -> list[float]:
    """Three epochs over the same walks; the losses. ``begin`` is told each step's number."""
    losses: list[float] = []
    torch.manual_seed(2)
    for _ in range(3):
        for positive, negative in model.loader(batch_size=8, shuffle=True):
            begin(len(losses) + 1)
            optimizer.zero_grad()
            loss = model.loss(positive, negative)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def nothing(_: int) -> None:
    pass


@pytest.fixture(params=["Node2Vec", "MetaPath2Vec"])
def walkers(request: Any, torch_geometric: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A converted model and a stock one of the same weights."""
    theirs = make_walker(torch_geometric, request.param, monkeypatch)
    ours = copy.deepcopy(theirs)
    with_sparse_gradients(ours)
    yield ours, theirs


@pytest.mark.parametrize("coalesced", [False, True])
def test_walks_with_sgd(walkers: Any, coalesced: bool) -> None:
    ours, theirs = walkers
    ours.embedding.coalesced = coalesced
    actual = walk_and_train(ours, embed_ext.optim.SGD(ours.parameters(), lr=5.0), nothing)
    expected = walk_and_train(theirs, torch.optim.SGD(theirs.parameters(), lr=5.0), nothing)
    assert expected[-1] < 0.9 * expected[0]
    assert actual == pytest.approx(expected, rel=1e-5)
    assert_same_parameters(ours, theirs)


@pytest.mark.parametrize("eps", [1e-15, 1e-3])
def test_walks_with_sparse_adam(walkers: Any, eps: float) -> None:
    """SparseAdam adds eps before it corrects the second moment, and so corrects eps as well."""
    ours, theirs = walkers
    optimizer = embed_ext.optim.Adam(ours.parameters(), lr=0.05, betas=(0.9, BETA), eps=eps)

    def move_eps(step: int) -> None:
        if eps == 1e-3:  # the other is nothing beside any second moment here
            optimizer.param_groups[0]["eps"] = eps / (1 - BETA**step) ** 0.5

    actual = walk_and_train(ours, optimizer, move_eps)
    sparse_adam = torch.optim.SparseAdam(theirs.parameters(), lr=0.05, betas=(0.9, BETA), eps=eps)
    expected = walk_and_train(theirs, sparse_adam, nothing)
    assert expected[-1] < 0.99 * expected[0]
    assert actual == pytest.approx(expected, rel=1e-5)


# --- PyKEEN: its pipeline, which looks optimizers up by name --------------------------------------


def run_pipeline(model: Any, factory: Any, optimizer: Any, options: Any) -> Any:
    """The result of three epochs; what is drawn is the same for every call."""
    return import_module("pykeen.pipeline").pipeline(
        training=factory,
        testing=factory,
        model=model,
        optimizer=optimizer,
        optimizer_kwargs=options,
        training_kwargs={"num_epochs": 3, "batch_size": 16, "use_tqdm": False},
        evaluation_kwargs={"use_tqdm": False},
        random_seed=3,
        device="cpu",
    )


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
@pytest.mark.parametrize("kind", ["TransE", "DistMult"])
def test_pipeline(pykeen: Any, kind: str, name: str) -> None:
    factory = make_factory(pykeen)
    theirs = getattr(pykeen.models, kind)(triples_factory=factory, embedding_dim=8, random_seed=0)
    ours = copy.deepcopy(theirs)
    tables = with_sparse_gradients(ours)
    options = {"lr": 0.1}
    expected = run_pipeline(theirs, factory, name, options)
    with steps() as seen:
        actual = run_pipeline(ours, factory, getattr(embed_ext.optim, name), options)
    assert set(seen) == {(getattr(embed_ext.optim, name), (torch.sparse_coo,) * len(tables))}
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    assert_same_parameters(ours, theirs)


@pytest.mark.parametrize("library", [torch, embed_ext])
def test_the_pipeline_has_no_adamw(pykeen: Any, library: Any) -> None:
    factory = make_factory(pykeen)
    model = pykeen.models.TransE(triples_factory=factory, embedding_dim=8, random_seed=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'decoupled_weight_decay'"):
        run_pipeline(model, factory, library.optim.AdamW, {"lr": 0.1})


def test_a_name_is_torchs_and_a_class_is_itself(pykeen: Any) -> None:
    resolver = import_module("pykeen.optimizers").optimizer_resolver
    for name in ("SGD", "Adagrad", "Adam", "AdamW"):
        assert resolver.lookup(name.lower()) is getattr(torch.optim, name)
        ours = getattr(embed_ext.optim, name)
        assert resolver.lookup(ours) is ours
