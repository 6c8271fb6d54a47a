"""A lookup's node that somebody calls by hand returns its gradient, and adds it nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import embed_ext
from tests.joined_gradients import assert_same

Lookup = Callable[[Tensor, Tensor], Tensor]


class CallsByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, node: Any, returned: list[Tensor]) -> Tensor:
        ctx.node, ctx.returned = node, returned
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        ctx.returned.append(ctx.node(torch.ones_like(grad_output)).clone())
        return grad_output, None, None


def run(lookup: Lookup, uses: int, grad_is_there: bool) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(4, 3, requires_grad=True)
    if grad_is_there:
        weight.grad = torch.ones(4, 3)
    returned: list[Tensor] = []
    out = lookup(torch.tensor([1]), weight)
    total = CallsByHand.apply(out, out.grad_fn, returned).sum()
    for use in range(1, uses):  # recorded later, so that their gradients have arrived by then
        total = total + lookup(torch.tensor([1, 1 + use]), weight).sum()
    total.backward()
    assert weight.grad is not None
    return returned[0], weight.grad


@pytest.mark.parametrize("grad_is_there", [False, True])
@pytest.mark.parametrize("uses", [1, 2, 3])
def test_it_returns_what_torchs_returns(uses: int, grad_is_there: bool) -> None:
    actual = run(embed_ext.functional.embedding, uses, grad_is_there)
    expected = run(F.embedding, uses, grad_is_there)
    assert_same(actual[0], expected[0])
    assert_same(actual[1], expected[1])
