"""Quantization: torchao swaps the weight, torch.ao the module; each before and after convert()."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import embed_ext
from tests.models.common import lookups

INDICES = torch.tensor([[1, 4], [7, 1]])
pytestmark = pytest.mark.filterwarnings("ignore")  # both announce their own deprecations


def make_model() -> Any:
    """A lookup and a linear layer: indices [...] -> [..., 4]."""
    return nn.Sequential(nn.Embedding(8, 32), nn.Linear(32, 4)).eval()


def is_embedding(module: nn.Module, name: str) -> bool:
    """Which modules torchao is to quantize."""
    return isinstance(module, nn.Embedding)


def quantize(torchao_quantization: Any, model: nn.Module) -> None:
    """Make the table int8, a scale a row."""
    config = torchao_quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int8, granularity=torchao_quantization.PerAxis(0)
    )
    torchao_quantization.quantize_(model, config, is_embedding)


def test_torchao_table_is_left_and_falls_through(torchao_quantization: Any) -> None:
    model = make_model()
    quantize(torchao_quantization, model)
    expected = model(INDICES)
    (entry,) = embed_ext.convert(model).left
    assert "IntxUnpackedToInt8Tensor, for which embed_ext has no rules" in entry.reason
    with embed_ext.routed():
        assert torch.equal(model(INDICES), expected)


def test_torchao_linear_beside_a_converted_table(torchao_quantization: Any) -> None:
    models = [make_model()]
    models.append(copy.deepcopy(models[0]))
    embed_ext.convert(models[0])
    for model in models:
        torchao_quantization.quantize_(model, torchao_quantization.Int8WeightOnlyConfig())
    with lookups() as served:
        actual = models[0](INDICES)
    assert torch.equal(actual, models[1](INDICES)) and served == ["ours"]


@pytest.mark.parametrize("routed", [False, True])
def test_torchao_table_of_a_converted_model_is_looked_up_by_torchao(
    torchao_quantization: Any, routed: bool
) -> None:
    stock, ours = make_model(), make_model()
    ours.load_state_dict(stock.state_dict())
    embed_ext.convert(ours)
    for model in (stock, ours):
        quantize(torchao_quantization, model)
    with embed_ext.routed(routed):
        assert torch.equal(ours(INDICES), stock(INDICES))
    embed_ext.revert(ours)
    assert torch.equal(ours(INDICES), stock(INDICES))


def test_torch_ao_swaps_the_exact_class_alone() -> None:
    from torch.ao.quantization import float_qparams_weight_only_qconfig, quantize_dynamic

    rules = {nn.Embedding: float_qparams_weight_only_qconfig}
    stock = make_model()
    ours = copy.deepcopy(stock)
    embed_ext.convert(ours)
    expected = quantize_dynamic(stock, rules)
    assert type(expected[0]) is not nn.Embedding
    skipped = quantize_dynamic(ours, rules)
    assert type(skipped[0]) is embed_ext.Embedding
    assert torch.equal(skipped(INDICES), stock(INDICES))
    embed_ext.revert(ours)
    quantized = quantize_dynamic(ours, rules)
    assert type(quantized[0]) is type(expected[0])
    assert torch.equal(quantized(INDICES), expected(INDICES))
    assert not embed_ext.convert(quantized).swapped
    with embed_ext.routed():
        assert torch.equal(quantized(INDICES), expected(INDICES))


def test_torch_ao_beside_routing() -> None:
    from torch.ao.quantization import float_qparams_weight_only_qconfig, quantize_dynamic

    stock = make_model()
    with embed_ext.routed():
        quantized = quantize_dynamic(stock, {nn.Embedding: float_qparams_weight_only_qconfig})
        with lookups() as served:
            stock(INDICES)
    assert type(quantized[0]) is not nn.Embedding and served == ["ours"]
