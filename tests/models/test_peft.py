"""PEFT on a converted GPT-2: what it wraps around the word embedding, and what it saves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import embed_ext
from tests.common import assert_close
from tests.models.common import gradients, lookups, make_model, outputs

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["wte", "c_attn"], "r": 2},
    "lora_of_positions": {"target_modules": ["wpe"], "r": 2},
    "trainable_tokens": {"target_modules": ["c_attn"], "trainable_token_indices": [4, 9, 11]},
    "modules_to_save": {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
}
each_adapter = pytest.mark.parametrize("name", ADAPTERS)


def adapted(peft: Any, model: Any, name: str) -> Any:
    """The model with an adapter whose weights are random, so that it changes what comes out."""
    options = {"task_type": "CAUSAL_LM", "init_lora_weights": False, **ADAPTERS[name]}
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "trainable_tokens" in key:
                parameter.add_(torch.randn(parameter.shape))
    return wrapped


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("order", ["convert_first", "adapter_first"])
@each_adapter
def test_outputs_and_gradients(transformers: Any, peft: Any, name: str, order: str) -> None:
    stock = make_model(transformers, "gpt2")
    theirs = adapted(peft, stock, name).train()
    converted = copy.deepcopy(stock)
    if order == "convert_first":
        embed_ext.convert(converted)
    ours = adapted(peft, converted, name).train()
    report = embed_ext.convert(ours)
    assert not report.left
    assert bool(report.swapped) == (order == "adapter_first")
    for routed in (False, True):
        expected = outputs(theirs, "gpt2")
        with embed_ext.routed(routed), lookups() as served:
            actual = outputs(ours, "gpt2")
        # What PEFT itself looks up with F.embedding is served where that is routed.
        assert set(served) == {"ours"} or (not routed and "ours" in served)
        assert torch.equal(actual.logits, expected.logits)
        for model, result in ((ours, actual), (theirs, expected)):
            model.zero_grad()
            result.loss.backward()
        found = gradients(ours)
        assert found.keys() == gradients(theirs).keys() and found
        for key, grad in gradients(theirs).items():
            assert_close(found[key], grad)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings")
@each_adapter
def test_merge_and_unload(transformers: Any, peft: Any, name: str) -> None:
    stock = make_model(transformers, "gpt2")
    theirs, ours = adapted(peft, stock, name), adapted(peft, stock, name)
    embed_ext.convert(ours)
    expected = theirs.merge_and_unload()
    actual = ours.merge_and_unload()
    assert type(actual.transformer.wte) is embed_ext.Embedding
    assert torch.equal(outputs(actual, "gpt2").logits, outputs(expected, "gpt2").logits)


@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings", "ignore:Could not find"
)
@each_adapter
def test_saved_adapter_loads_into_stock(
    transformers: Any, peft: Any, name: str, tmp_path: Path
) -> None:
    stock = make_model(transformers, "gpt2")
    ours = adapted(peft, stock, name)
    embed_ext.convert(ours)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path).eval()
    assert not any(isinstance(module, embed_ext.Embedding) for module in loaded.modules())
    assert torch.equal(outputs(loaded, "gpt2").logits, outputs(ours.eval(), "gpt2").logits)
