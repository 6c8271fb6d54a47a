"""convert() and subclasses of nn.Embedding: what is served, and what stays."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import embed_ext
from embed_ext import convert, revert
from tests.common import assert_close
from tests.subclasses import SERVED, ByBase, ByFunction, CallsOther, Indexes
from tests.swapping import INDICES, Inherits, Scaled, Watched

each_class = pytest.mark.parametrize("kind", SERVED, ids=lambda kind: kind.__name__)
STOCK = F.embedding


def make_pair(kind: type[nn.Embedding]) -> tuple[nn.Embedding, nn.Embedding]:
    """A converted module and one as it was, of the same weights [5, 3]."""
    torch.manual_seed(0)
    theirs = kind(5, 3)
    ours = kind(5, 3)
    ours.load_state_dict(theirs.state_dict())
    assert len(convert(ours).swapped) == 1
    return ours, theirs


def is_served(module: nn.Module) -> bool:
    """Whether it takes indices that PyTorch's lookup does not take."""
    try:
        module(INDICES.to(torch.int16))
    except RuntimeError:
        return False
    return True


@each_class
def test_subclass_is_served_by_convert(kind: type[nn.Embedding]) -> None:
    ours, theirs = make_pair(kind)
    assert is_served(ours) and not is_served(theirs)
    for module in (ours, theirs):
        module(INDICES).square().sum().backward()
    assert torch.equal(ours(INDICES), theirs(INDICES))
    assert_close(ours.weight.grad, theirs.weight.grad)
    assert F.embedding is STOCK


@each_class
def test_report_says_how_it_is_served(kind: type[nn.Embedding]) -> None:
    model = nn.Sequential(kind(5, 3))
    report = convert(model)
    (entry,) = report.swapped
    assert entry.served == SERVED[kind] and f"    served {SERVED[kind]}" in str(report)
    assert len(convert(model).already) == 1
    with embed_ext.routed():
        assert convert(nn.Sequential(kind(5, 3))).swapped == (entry,)


@each_class
def test_class_is_the_users_and_ours(kind: type[nn.Embedding]) -> None:
    ours, theirs = make_pair(kind)
    made = type(ours)
    assert all(isinstance(ours, base) for base in (kind, nn.Embedding, embed_ext.Embedding))
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(made, name) == getattr(kind, name)
    assert repr(ours) == repr(theirs) and repr(made) == repr(kind)
    assert type(make_pair(kind)[0]) is made
    assert isinstance(made(6, 2), kind) and is_served(made(6, 2))
    (entry,) = revert(ours).swapped
    assert type(ours) is kind and not is_served(ours) and entry.served == ""
    assert vars(ours).keys() == vars(theirs).keys()


@each_class
def test_copies_and_pickles_are_converted_too(kind: type[nn.Embedding]) -> None:
    ours, theirs = make_pair(kind)
    expected = theirs(INDICES)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    twins = [copy.copy(ours), copy.deepcopy(ours), torch.load(file, weights_only=False)]
    twins += [pickle.loads(pickle.dumps(ours, protocol)) for protocol in range(2, 6)]
    stock_twin = copy.copy(theirs)
    for twin in twins:
        assert type(twin) is type(ours) and twin is not ours
        assert torch.equal(twin(INDICES), expected) and is_served(twin)
        assert vars(twin).keys() == vars(stock_twin).keys()
    assert twins[1].weight is not ours.weight
    revert(twins[1])
    assert type(twins[1]) is kind
    assert b"embed_ext" not in pickle.dumps(twins[1])


@each_class
def test_compiled(kind: type[nn.Embedding]) -> None:
    watched = Watched(nn.Sequential(kind(5, 3), nn.Linear(3, 2)))
    assert watched.served_across_swaps() == ["torch's", "ours", "torch's", "ours"]


@pytest.mark.parametrize("kind", [Inherits, Scaled, ByFunction, ByBase])
@pytest.mark.parametrize("strict", [False, True])
def test_exported(kind: type[nn.Embedding], strict: bool) -> None:
    ours, theirs = make_pair(kind)
    dynamic = {"input": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(ours, (INDICES,), strict=strict, dynamic_shapes=dynamic)
    ops = [str(node.target) for node in program.graph.nodes]
    assert "embed_ext.embedding.default" in ops and "aten.embedding.default" not in ops
    assert torch.equal(program.module()(INDICES), theirs(INDICES))


@each_class
def test_parametrised_after_convert(kind: type[nn.Embedding]) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    pair = make_pair(kind)
    made = type(pair[0])
    for module in pair:
        parametrize.register_parametrization(module, "weight", Doubled())
    assert torch.equal(pair[0](INDICES), pair[1](INDICES)) and is_served(pair[0])
    assert torch.equal(copy.deepcopy(pair[0])(INDICES), pair[1](INDICES))
    assert "remove the parametrization first" in revert(pair[0]).left[0].reason
    for module in pair:
        parametrize.remove_parametrizations(module, "weight")
    assert type(pair[0]) is made
    assert torch.equal(pair[0](INDICES), pair[1](INDICES))


def test_options_of_embed_ext_are_the_modules() -> None:
    ours: Any = make_pair(Scaled)[0]
    ours.keep_grad_buffer = True
    ours(INDICES).sum().backward()
    assert ours.keep_grad_buffer and repr(ours) == "Scaled(5, 3, keep_grad_buffer=True)"
    assert copy.deepcopy(ours).keep_grad_buffer
    revert(ours)
    assert not hasattr(ours, "keep_grad_buffer") and "_kept_gradient" not in vars(ours)


def test_one_may_call_another() -> None:
    class Decoupled(ByFunction):
        def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
            super().__init__(num_embeddings, embedding_dim)
            self.others = nn.ModuleList([Scaled(5, 3), ByBase(5, 3), nn.Embedding(5, 3)])

        def forward(self, input: Tensor) -> Tensor:
            return F.embedding(input, self.weight) + sum(other(input) for other in self.others)

    theirs = Decoupled(5, 3)
    ours = copy.deepcopy(theirs)
    assert len(convert(ours).swapped) == 4
    assert torch.equal(ours(INDICES), theirs(INDICES)) and is_served(ours)
    assert Watched(ours)() == "ours"


def test_error_within_forward_leaves_nothing_behind() -> None:
    ours = make_pair(ByFunction)[0]
    for bad in (torch.tensor([9]), torch.tensor([1.5]), "no tensor"):
        with pytest.raises((IndexError, RuntimeError, TypeError)):
            ours(bad)
    assert torch.overrides._get_current_function_mode() is None
    assert is_served(ours) and not is_served(ByFunction(5, 3))


def test_table_that_is_not_taken_later_gets_torchs_lookup() -> None:
    ours = make_pair(ByFunction)[0]
    weight = torch.rand(5, 3)
    ours.weight = nn.Parameter(weight.to_sparse(), requires_grad=False)
    assert torch.equal(ours(INDICES[0]).to_dense(), 2 * weight[INDICES[0]])


def test_class_is_made_once_and_not_kept() -> None:
    class Local(Scaled):
        pass

    tables = [Local(5, 3), Local(5, 3)]
    convert(nn.ModuleList(tables))
    assert type(tables[0]) is type(tables[1])
    classes = [weakref.ref(Local), weakref.ref(type(tables[0]))]
    del Local, tables
    gc.collect()
    assert [cls() for cls in classes] == [None, None]


def test_hook_for_new_subclasses_is_not_called() -> None:
    class Registers(nn.Embedding):
        known: list[str] = []

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            cls.known.append(cls.__name__)

    class Mine(Registers):
        pass

    table = Mine(5, 3)
    convert(table)
    assert is_served(table) and Registers.known == ["Mine"]


def test_slots() -> None:
    class Slotted(Scaled):
        __slots__ = ("note",)

    table: Any = Slotted(5, 3)
    table.note = "kept"
    assert len(convert(table).swapped) == 1
    assert table.note == "kept" and is_served(table)
    assert len(revert(table).swapped) == 1 and table.note == "kept"


# What is left.


def only_reason(module: nn.Module) -> str:
    before = type(module)
    report = convert(module)
    assert type(module) is before and not report.swapped
    return report.left[0].reason


class Meta(type):
    """A metaclass that might do anything."""


def unusual(**members: Any) -> Callable[[], nn.Module]:
    return lambda: type("Unusual", (nn.Embedding,), members)(5, 3)


def lazy() -> nn.Module:
    return type("Lazy", (nn.modules.lazy.LazyModuleMixin, nn.Embedding), {})(5, 3)


def patched() -> nn.Module:
    table = Scaled(5, 3)
    table.forward = lambda input: input  # type: ignore[method-assign]
    return table


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "indexes": (lambda: Indexes(5, 3), "Indexes has a forward of its own, which is not seen"),
    "calls_other": (lambda: CallsOther(5, 3), "CallsOther has a forward of its own"),
    "no_function": (unusual(forward=torch.relu), "has a forward of its own"),
    "new": (unusual(__new__=lambda cls, *_: object.__new__(cls)), "has a __new__ of its own"),
    "torchs": (unusual(__module__="torch.ao"), "is PyTorch's own"),
    "metaclass": (lambda: Meta("Made", (Scaled,), {})(5, 3), "by a metaclass of its own, Meta"),
    "lazy": (lazy, "is lazy"),
    "patched": (patched, "its forward was replaced on the instance"),
    "option": (unusual(coalesced=True), "its attribute coalesced would be an option"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT.keys())
def test_left(make: Callable[[], nn.Module], reason: str) -> None:
    text = only_reason(make())
    assert reason in text and "embed_ext.routed() serves" in text


def test_parametrised_before_convert_is_left() -> None:
    table = Scaled(5, 3)
    parametrize.register_parametrization(table, "weight", nn.Identity())
    assert "it is parametrized" in only_reason(table)


def test_subclass_of_a_converted_class_is_somebodys_own() -> None:
    made = type(make_pair(Scaled)[0])
    table = type("Further", (made,), {})(5, 3)
    assert "Further is a subclass of embed_ext.Embedding" in revert(table).left[0].reason
