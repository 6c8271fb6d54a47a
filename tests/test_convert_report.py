"""convert() and revert(): the report, what can be selected, what is left and why."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import embed_ext
from embed_ext import ConversionReport, convert, revert
from tests.subclasses import Indexes
from tests.swapping import INDICES, Scaled, Tied


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


# Report, idempotence, selection.


def test_report_reads_like_one() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5, 3, padding_idx=1), "b": Indexes(4, 2)})
    model["c"] = model["a"]
    model["d"] = embed_ext.Embedding(2, 2)
    model["e"] = Scaled(4, 2)
    report = convert(model)
    assert isinstance(report, ConversionReport)
    text = """\
embed_ext.convert: 2 swapped, 1 already there, 1 left
swapped:
  a = c: Embedding(5, 3, padding_idx=1)
  e: Scaled(4, 2)
    served by its super().forward
already:
  d: Embedding(2, 2)
left:
  b: Indexes(4, 2)
    its class tests.subclasses.Indexes has a forward of its own, which is not seen to call a \
lookup; embed_ext.routed() serves what it looks up through nn.functional.embedding"""
    assert str(report) == repr(report) == text
    assert str(revert(model)).startswith("embed_ext.revert: 3 swapped, 1 already there, 0 left")


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


@pytest.mark.parametrize("name", ["coalesced", "add_to_main_grad", "keep_grad_buffer"])
def test_attribute_of_the_name_of_an_option_is_left(name: str) -> None:
    table = nn.Embedding(5, 3)
    setattr(table, name, "mine")
    assert f"its attribute {name} would be an option of embed_ext" in only_left(table)
    revert(table)
    assert getattr(table, name) == "mine"
    table = nn.Embedding(5, 3)
    table.register_buffer(name, torch.ones(1))
    assert f"its attribute {name} would be an option of embed_ext" in only_left(table)


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

    @functools.wraps(stock)  # by which it takes the name and the module of what it replaces
    def wrapped(self: nn.Embedding, input: Tensor) -> Tensor:
        return stock(self, input) * 3

    monkeypatch.setattr(nn.Embedding, "forward", wrapped)
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
