"""What the tests of rows that catch up share: tables, optimizers, and training them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import embed_ext
from embed_ext import optim
from tests.common import generator

ROWS, WIDTH = 40, 6


def make_tables(
    dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[embed_ext.Embedding, nn.Embedding]:
    """The same table with sparse and with dense gradients."""
    weight = torch.randn(ROWS, WIDTH, generator=generator(0), dtype=torch.float64)
    weight = weight.to(device, dtype)
    sparse = embed_ext.Embedding(ROWS, WIDTH, sparse=True, padding_idx=1, _weight=weight.clone())
    return sparse, nn.Embedding(ROWS, WIDTH, padding_idx=1, _weight=weight)


def train(
    table: nn.Module, optimizer: torch.optim.Optimizer, batches: list[list[int]], seed: int = 0
) -> list[Tensor]:
    """A step a batch, by a loss that depends on the rows; returns what was looked up."""
    outputs, device = [], next(table.parameters()).device
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        output = table(torch.tensor(batch, dtype=torch.int64, device=device))
        factor = torch.randn(WIDTH, generator=generator(seed + number), dtype=torch.float64)
        (output.sin() * factor.to(device, output.dtype)).sum().backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs


def momentum_sgd(parameters: Any) -> optim.SGD:
    return optim.SGD(parameters, lr=0.1, momentum=0.75, weight_decay=0.25)


def torchs_momentum_sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.75, weight_decay=0.25)
