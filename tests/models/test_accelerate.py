"""Accelerate: a training loop in mixed precision, and its hooks that move weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import embed_ext
from tests.common import generator
from tests.models.common import BATCH, LENGTH, VOCABULARY, lookups, make_model

TOKENS = torch.randint(3, VOCABULARY, (4 * BATCH, LENGTH), generator=generator())


@pytest.fixture(autouse=True)
def no_state_of_an_earlier_test(accelerate: Any) -> None:
    """Accelerate keeps its settings for the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def train(accelerate: Any, model: Any, precision: str) -> list[float]:
    """A few steps as in Accelerate's manual; the losses."""
    accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(TOKENS), batch_size=BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    losses = []
    torch.manual_seed(0)
    for (tokens,) in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_training_loop(transformers: Any, accelerate: Any, name: str, precision: str) -> None:
    stock = make_model(transformers, name)
    ours = copy.deepcopy(stock)
    embed_ext.convert(ours)
    expected = train(accelerate, stock, precision)
    actual = train(accelerate, ours, precision)
    assert len(actual) == 4 and actual[0] == expected[0]
    assert actual == pytest.approx(expected, rel=1e-2 if precision == "bf16" else 1e-4)


def test_prepared_model_can_be_converted(transformers: Any, accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(make_model(transformers, "gpt2"))
    assert len(embed_ext.convert(model).swapped) == 2
    unwrapped = accelerator.unwrap_model(model)
    assert type(unwrapped.transformer.wte) is embed_ext.Embedding


def test_offloaded_weights_of_a_converted_model(transformers: Any, accelerate: Any) -> None:
    stock = make_model(transformers, "llama")
    ours = copy.deepcopy(stock)
    embed_ext.convert(ours)
    accelerate.cpu_offload(ours, execution_device="cpu")
    assert ours.model.embed_tokens.weight.is_meta
    with lookups() as served:
        actual = ours(TOKENS).logits
    assert torch.equal(actual, stock(TOKENS).logits) and served == ["ours"]
    # The hook calls the forward that it found: the class alone would not undo that.
    assert "replaced on the instance" in embed_ext.revert(ours).left[0].reason


def test_module_with_a_hook_in_place_of_forward_is_left_and_routed(
    transformers: Any, accelerate: Any
) -> None:
    model = make_model(transformers, "llama")
    expected = model(TOKENS).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    report = embed_ext.convert(model)
    assert not report.swapped
    assert "replaced on the instance; embed_ext.routed()" in report.left[0].reason
    with lookups() as served, embed_ext.routed():
        assert torch.equal(model(TOKENS).logits, expected)
    assert served == ["ours"]
    accelerate.hooks.remove_hook_from_submodules(model)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert len(embed_ext.convert(model).swapped) == 1
