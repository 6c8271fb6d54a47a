"""Tiny transformers: what a converted one computes, trains, generates and compiles to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import embed_ext
from tests.common import assert_close
from tests.models.common import (
    LEFT,
    MODELS,
    SWAPPED,
    gradients,
    logits,
    lookups,
    make_batch,
    make_model,
    make_pair,
    outputs,
)

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_report_names_what_is_swapped_and_left(transformers: Any, name: str) -> None:
    model = make_model(transformers, name)
    report = embed_ext.convert(model)
    assert [entry.names[0] for entry in report.swapped] == SWAPPED[name]
    assert [entry.names[0] for entry in report.left] == LEFT.get(name, [])
    assert all("has a forward of its own" in entry.reason for entry in report.left)


@every_model
def test_every_lookup_is_served(transformers: Any, name: str) -> None:
    ours, theirs = make_pair(transformers, name)
    with lookups() as before:
        outputs(theirs, name)
    with lookups() as converted:
        outputs(ours, name)
    with lookups() as routed, embed_ext.routed():
        outputs(theirs, name)
    assert set(before) == {"torch's"} and set(routed) == {"ours"}
    assert set(converted) == {"ours"}
    assert len(before) == len(converted) == len(routed)


@pytest.mark.parametrize("way", ["converted", "routed"])
@every_model
def test_logits_are_equal_and_gradients_to_rounding(transformers: Any, name: str, way: str) -> None:
    ours, theirs = make_pair(transformers, name)
    for model in (ours, theirs):
        model.train()
    expected = outputs(theirs, name)
    expected.loss.backward()
    model = ours if way == "converted" else copy.deepcopy(theirs)
    model.zero_grad()
    with embed_ext.routed(way == "routed"):
        actual = outputs(model, name)
    actual.loss.backward()
    assert torch.equal(logits(actual), logits(expected))
    assert torch.equal(actual.loss, expected.loss)
    expected_gradients = gradients(theirs)
    assert gradients(model).keys() == expected_gradients.keys()
    for key, grad in gradients(model).items():
        assert_close(grad, expected_gradients[key])


@every_model
def test_training_steps(transformers: Any, name: str) -> None:
    losses: list[list[float]] = []
    pair = make_pair(transformers, name)
    for model in pair:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for step in range(4):
            optimizer.zero_grad()
            loss = outputs(model, name, seed=step).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][-1]
    for actual, expected in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "gemma3", "opt", "bart", "whisper"])
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate(transformers: Any, name: str, options: dict[str, int]) -> None:
    ours, theirs = make_pair(transformers, name)
    batch = {key: value for key, value in make_batch(name).items() if key != "labels"}
    expected = theirs.generate(**batch, max_new_tokens=6, do_sample=False, **options)
    actual = ours.generate(**batch, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(actual, expected) and actual.shape[1] > 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_gradient_checkpointing(transformers: Any, name: str, use_reentrant: bool) -> None:
    found = []
    for model in make_pair(transformers, name):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()  # a forward hook on the word embedding
        model.train()
        outputs(model, name).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        assert_close(grad, found[1][key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(transformers: Any, dtype: torch.dtype) -> None:
    ours, theirs = (model.to(dtype) for model in make_pair(transformers, "llama"))
    assert torch.equal(outputs(ours, "llama").logits, outputs(theirs, "llama").logits)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "gemma3", "opt"])
def test_compiled_without_graph_breaks(transformers: Any, name: str) -> None:
    torch.compiler.reset()
    targets: list[str] = []

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    ours, theirs = make_pair(transformers, name)
    tokens = make_batch(name)["input_ids"]
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    with torch.no_grad():
        actual = compiled(input_ids=tokens, use_cache=False).logits
        expected = theirs(input_ids=tokens, use_cache=False).logits
    assert_close(actual, expected)
    assert targets.count("embed_ext.embedding") == len(SWAPPED[name])
    assert not any("nn.functional.embedding" in target for target in targets)


@pytest.mark.slow
def test_compiled_by_inductor_trains(transformers: Any) -> None:
    torch.compiler.reset()
    ours, theirs = make_pair(transformers, "llama")
    tokens = make_batch("llama")["input_ids"]
    compiled = torch.compile(ours, fullgraph=True)
    compiled(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    theirs(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    expected = gradients(theirs)
    for key, grad in gradients(ours).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-5)
