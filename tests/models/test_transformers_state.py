"""Tiny transformers: tied weights, resized vocabularies, saved and loaded files, new weights."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import embed_ext
from tests.common import assert_close
from tests.models.common import (
    MODELS,
    VOCABULARY,
    logits,
    make_batch,
    make_model,
    make_pair,
    outputs,
)

every_model = pytest.mark.parametrize("name", MODELS)
TIED = ["gpt2", "bert", "t5", "gemma3", "gemma3n", "opt", "bart", "whisper"]


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_stay_tied(transformers: Any, name: str) -> None:
    ours, _ = make_pair(transformers, name)

    def assert_tied() -> None:
        table, head = ours.get_input_embeddings(), ours.get_output_embeddings()
        assert table.weight is head.weight

    assert_tied()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    before = ours.get_input_embeddings().weight.detach().clone()
    outputs(ours, name).loss.backward()
    optimizer.step()
    assert_tied()
    assert not torch.equal(ours.get_input_embeddings().weight, before)
    ours.tie_weights()
    assert_tied()
    embed_ext.revert(ours)
    assert_tied()


@pytest.mark.parametrize("size", [VOCABULARY + 7, VOCABULARY - 7])
@pytest.mark.parametrize("mean_resizing", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "gemma3", "opt", "bart"])
def test_resized_vocabulary(transformers: Any, name: str, mean_resizing: bool, size: int) -> None:
    ours, theirs = make_pair(transformers, name)
    table = ours.get_input_embeddings()
    kind = type(table)
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.resize_token_embeddings(size, mean_resizing=mean_resizing)
    # transformers makes a new nn.Embedding, and gives its weight to the old one.
    assert ours.get_input_embeddings() is table and type(table) is kind
    assert table.weight.shape[0] == table.num_embeddings == size
    if name in TIED:
        assert ours.get_output_embeddings().weight is table.weight
    tokens = {"input_ids": torch.tensor([[size - 1, 4]]), "labels": torch.tensor([[3, 5]])}
    assert torch.equal(ours(**tokens).logits, theirs(**tokens).logits)
    ours(**tokens).loss.backward()
    assert table.weight.grad.shape == table.weight.shape
    assert not embed_ext.convert(ours).swapped


def test_table_that_is_replaced_needs_another_convert(transformers: Any) -> None:
    ours, _ = make_pair(transformers, "gpt2")
    ours.set_input_embeddings(nn.Embedding(VOCABULARY, 16))
    report = embed_ext.convert(ours)
    assert [entry.names for entry in report.swapped] == [("transformer.wte",)]
    assert [entry.names for entry in report.already] == [("transformer.wpe",)]


@every_model
def test_saved_files_are_the_same_and_load_into_stock(
    transformers: Any, name: str, tmp_path: Path
) -> None:
    ours, theirs = make_pair(transformers, name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    stock = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert not any(isinstance(module, embed_ext.Embedding) for module in stock.modules())
    expected = logits(outputs(theirs, name))
    assert torch.equal(logits(outputs(stock, name)), expected)
    embed_ext.convert(stock)
    assert torch.equal(logits(outputs(stock, name)), expected)


def test_state_dict_loads_both_ways(transformers: Any) -> None:
    ours, _ = make_pair(transformers, "bert")
    other = make_model(transformers, "bert", seed=5)
    ours.load_state_dict(other.state_dict())
    assert torch.equal(outputs(ours, "bert").logits, outputs(other, "bert").logits)
    third = make_model(transformers, "bert", seed=6)
    third.load_state_dict(ours.state_dict())
    assert torch.equal(outputs(third, "bert").logits, outputs(other, "bert").logits)


@every_model
def test_weights_are_initialised_alike(transformers: Any, name: str) -> None:
    pair = make_pair(transformers, name)
    for model in pair:
        torch.manual_seed(7)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                model._init_weights(module)
    tables = [[m for m in model.modules() if isinstance(m, nn.Embedding)] for model in pair]
    assert len(tables[0]) == len(tables[1]) > 0
    for ours, theirs in zip(*tables, strict=True):
        assert torch.equal(ours.weight, theirs.weight)


@every_model
def test_what_counts_by_kind_counts_the_same(transformers: Any, name: str) -> None:
    ours, theirs = make_pair(transformers, name)
    for options in ({}, {"exclude_embeddings": True}, {"only_trainable": True}):
        assert ours.num_parameters(**options) == theirs.num_parameters(**options)
    assert repr(ours) == repr(theirs)


def test_model_on_the_meta_device(transformers: Any) -> None:
    with torch.device("meta"):
        model = make_model(transformers, "gpt2")
        assert len(embed_ext.convert(model).swapped) == 2
    stock = make_model(transformers, "gpt2")
    model.to_empty(device="cpu").load_state_dict(stock.state_dict())
    model.tie_weights()
    assert torch.equal(outputs(model, "gpt2").logits, outputs(stock, "gpt2").logits)


@pytest.mark.parametrize("name", ["t5", "bart", "opt", "gemma3"])
def test_copy_and_whole_model_file(transformers: Any, name: str) -> None:
    ours, theirs = make_pair(transformers, name)
    kinds = {key: type(module) for key, module in ours.named_modules()}
    expected = outputs(theirs, name).logits
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert {key: type(module) for key, module in twin.named_modules()} == kinds
        assert twin.get_input_embeddings().weight is twin.get_output_embeddings().weight
        assert torch.equal(outputs(twin, name).logits, expected)
    embed_ext.revert(ours)
    assert b"embed_ext" not in pickle.dumps(ours)


def test_inputs_in_narrow_indices(transformers: Any) -> None:
    ours, theirs = make_pair(transformers, "llama")
    tokens: Any = make_batch("llama")["input_ids"]
    assert_close(ours(tokens.to(torch.uint8)).logits, theirs(tokens).logits)
