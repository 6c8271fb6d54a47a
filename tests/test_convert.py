"""Swapping a model's lookups in place: what stays, what is left, and the way back."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import embed_ext
from embed_ext import ConversionReport, convert, revert
from tests.common import OPTIONS, assert_close, make_indices

INDICES = torch.tensor([[1, 4], [4, 0]])


class Tied(nn.Module):
    """Words and positions in, words out; `same` and `words` are one module, `out` shares weights.

    indices [B, L] -> logits [B, L, V]
    """

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.positions = nn.Embedding(9, 4)
        self.same = self.words
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, indices: Tensor) -> Tensor:
        positions = self.positions(torch.arange(indices.shape[1]))
        hidden = self.words(indices) + self.same(indices.flip(1)) + positions
        return self.out(hidden)  # type: ignore[no-any-return]


class Inherits(nn.Embedding):
    """A subclass that looks up as nn.Embedding does."""


class Scaled(nn.Embedding):
    """A subclass that scales what it looks up."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Wrapped(Tensor):
    """A tensor subclass that this project has never heard of."""


def names(entries: tuple[Any, ...]) -> list[tuple[str, ...]]:
    return [entry.names for entry in entries]


def only_left(module: nn.Module) -> str:
    """Convert a module that is to be left; the reason why."""
    before = type(module)
    report = convert(nn.Sequential(module))
    assert type(module) is before
    assert not report.swapped and not report.already
    (entry,) = report.left
    assert entry.names == ("0",)
    return str(entry.reason)


# What stays.


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
def test_options_stay(name: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, **OPTIONS[name]))
    twin = copy.deepcopy(model)
    convert(model)
    results = []
    for module in (model, twin):
        out = module(INDICES)
        out.square().sum().backward()
        grad: Any = module[0].weight.grad
        results.append((out, grad.to_dense() if grad.is_sparse else grad, grad.layout))
    assert_close(results[0][0], results[1][0])  # a norm is summed in another order
    assert "max_norm" in OPTIONS[name] or torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
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
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        ops = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]

        def run(*args: Any) -> Any:
            ran.append("ours" if "embed_ext.embedding" in ops else "torch's")
            return graph.forward(*args)

        return run

    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = compiled(INDICES)
    for swap in (convert, revert, convert):
        swap(model)
        assert torch.equal(compiled(INDICES), expected)
    assert ran == ["torch's", "ours", "torch's", "ours"]
    assert len(convert(compiled).already) == 1


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


# Report, idempotence, selection.


def test_report_reads_like_one() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5, 3, padding_idx=1), "b": Scaled(4, 2)})
    model["c"] = model["a"]
    model["d"] = embed_ext.Embedding(2, 2)
    report = convert(model)
    assert isinstance(report, ConversionReport)
    text = """\
embed_ext.convert: 1 swapped, 1 already there, 1 left
swapped:
  a = c: Embedding(5, 3, padding_idx=1)
already:
  d: Embedding(2, 2)
left:
  b: Scaled(4, 2)
    its class tests.test_convert.Scaled has a forward of its own; embed_ext.routed() serves what \
it looks up through nn.functional.embedding"""
    assert str(report) == repr(report) == text
    assert str(revert(model)).startswith("embed_ext.revert: 2 swapped, 1 already there, 0 left")


def test_the_model_itself_may_be_one() -> None:
    table = nn.Embedding(5, 3)
    assert names(convert(table).swapped) == [("",)]
    assert "(the model itself)" in str(revert(table))
    assert type(table) is nn.Embedding


def test_both_are_idempotent_and_undo_each_other() -> None:
    model = Tied()
    expected = model(INDICES)
    assert names(convert(model).swapped) == [("words", "same"), ("positions",)]
    assert names(convert(model).already) == [("words", "same"), ("positions",)]
    assert torch.equal(model(INDICES), expected)
    assert names(revert(model).swapped) == [("words", "same"), ("positions",)]
    assert names(revert(model).already) == [("words", "same"), ("positions",)]
    assert {type(model.words), type(model.positions)} == {nn.Embedding}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, ["words", "positions"]),
        ("*", ["words", "positions"]),
        ("pos*", ["positions"]),
        ("same", ["words"]),
        (["word?", "nothing"], ["words"]),
        ([], []),
        ("WORDS", []),
        (lambda name, module: module.num_embeddings == 9, ["positions"]),
        (lambda name, module: name == "same", ["words"]),
    ],
)
def test_where_selects(where: Any, expected: list[str]) -> None:
    model = Tied()
    report = convert(model, where=where)
    assert [entry.names[0] for entry in report.swapped] == expected
    assert {entry.reason for entry in report.left} <= {"not selected by `where`"}
    assert len(report.swapped) + len(report.left) == 2
    convert(model)
    reverted = revert(model, where=where)
    assert [entry.names[0] for entry in reverted.swapped] == expected
    assert isinstance(model.words, embed_ext.Embedding) == ("words" not in expected)


def test_anything_but_a_module_is_refused() -> None:
    for swap in (convert, revert):
        with pytest.raises(TypeError, match="expected an nn.Module, but got Tensor"):
            swap(INDICES)


# What is left.


def test_subclasses_are_left() -> None:
    assert "Inherits is kept; embed_ext.routed() serves it as it is" in only_left(Inherits(5, 3))
    assert "Scaled has a forward of its own; embed_ext.routed()" in only_left(Scaled(5, 3))


def test_parametrised_is_left_and_may_come_after() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    table = nn.Embedding(5, 3)
    parametrize.register_parametrization(table, "weight", Doubled())
    expected = table(INDICES)
    assert "parametrized" in only_left(table)
    parametrize.remove_parametrizations(table, "weight", leave_parametrized=True)
    convert(table)
    assert torch.equal(table(INDICES), expected)
    parametrize.register_parametrization(table, "weight", Doubled())
    assert torch.equal(table(INDICES), 2 * expected)
    assert len(convert(table).already) == 1
    assert "remove the parametrization first" in revert(table).left[0].reason


def test_patched_forward_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    table = nn.Embedding(5, 3)
    table.forward = lambda input: torch.ones(1)  # type: ignore[method-assign]
    assert "replaced on the instance" in only_left(table)
    table.forward = table.__class__.forward.__get__(nn.Embedding(5, 3))  # type: ignore[method-assign]
    assert "replaced on the instance" in only_left(table)
    stock = nn.Embedding.forward
    monkeypatch.setattr(nn.Embedding, "forward", lambda self, input: stock(self, input) * 3)
    assert "nn.Embedding.forward itself was replaced" in only_left(nn.Embedding(5, 3))


def test_forward_that_was_put_back_is_no_patch() -> None:
    table = nn.Embedding(5, 3)
    for swap, kind in ((convert, embed_ext.Embedding), (revert, nn.Embedding)):
        table.forward = table.forward  # type: ignore[method-assign]
        assert "forward" in vars(table)
        assert len(swap(table).swapped) == 1
        assert table.forward.__func__ is kind.forward  # type: ignore[attr-defined]


def test_patched_forward_is_not_reverted() -> None:
    table = embed_ext.Embedding(5, 3)
    forward = table.forward
    table.forward = lambda input: forward(input)  # type: ignore[method-assign]
    assert "replaced on the instance" in revert(table).left[0].reason


def test_tables_that_the_ops_do_not_take_are_left() -> None:
    table = nn.Embedding(5, 3)
    table.weight = nn.Parameter(torch.rand(5, 3).as_subclass(Wrapped))
    assert "is of type Wrapped, for which embed_ext has no rules" in only_left(table)
    table = nn.Embedding(5, 3, _freeze=True)
    table.weight = nn.Parameter(torch.rand(5, 3).to_sparse(), requires_grad=False)
    assert "layout torch.sparse_coo" in only_left(table)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_quantized_table_is_left() -> None:
    weight = torch.quantize_per_tensor(torch.rand(5, 3), 0.1, 0, torch.qint8)
    table = nn.Embedding(5, 3, _weight=weight, _freeze=True)
    assert "quantized dtype torch.qint8" in only_left(table)
    assert torch.equal(table(INDICES).dequantize(), weight.dequantize()[INDICES])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_left() -> None:
    assert "TorchScript" in only_left(torch.jit.script(nn.Embedding(5, 3)))


def test_subclass_of_ours_is_not_reverted() -> None:
    class Mine(embed_ext.Embedding):
        pass

    (entry,) = revert(Mine(5, 3)).left
    assert "Mine is a subclass of embed_ext.Embedding" in entry.reason


def test_table_without_weight_is_swapped() -> None:
    table = nn.Embedding(5, 3)
    table.register_parameter("weight", None)
    assert len(convert(table).swapped) == 1
