"""What is refused, in which words, and that nothing is written then."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embed_ext import optim
from tests.common import assert_same_bits
from tests.optim.common import (
    ROWS,
    WIDTH,
    make_gradient,
    make_parameter,
)

VALUES = torch.ones(2, WIDTH)
REFUSED: dict[str, tuple[Any, dict[str, Any], Tensor, Tensor, str]] = {
    "amsgrad": (
        optim.AdamW,
        {"amsgrad": True},
        make_parameter(),
        make_gradient([1]),
        r"optim\.AdamW: amsgrad=True is not for tables that .*parameter 1 of group 0.*\(12, 5",
    ),
    "capturable": (
        optim.RowwiseAdam,
        {"capturable": True},
        make_parameter(),
        make_gradient([1]),
        r"optim\.RowwiseAdam: capturable=True is not for tables",
    ),
    "differentiable": (
        optim.SGD,
        {"differentiable": True},
        make_parameter(),
        make_gradient([1]),
        r"optim\.SGD: differentiable=True is not for tables",
    ),
    "two sparse dimensions": (
        optim.Adagrad,
        {},
        make_parameter(),
        torch.eye(ROWS, WIDTH).to_sparse(),
        r"Adagrad: expected a gradient with 1 sparse and 1 dense dimension, but got 2 and 0",
    ),
    "one dimension": (
        optim.SGD,
        {},
        nn.Parameter(torch.ones(3)),
        torch.ones(3).to_sparse(),
        r"SGD: expected a gradient with 1 sparse and 1 dense dimension, but got 1 and 0",
    ),
    "three dimensions": (
        optim.Adam,
        {},
        nn.Parameter(torch.ones(3, 2, 2)),
        torch.ones(3, 2, 2).to_sparse(1),
        r"Adam: expected a gradient with 1 sparse and 1 dense dimension, but got 1 and 2",
    ),
    "complex": (
        optim.RowwiseAdagrad,
        {},
        nn.Parameter(torch.ones(3, 2, dtype=torch.complex64)),
        torch.ones(3, 2, dtype=torch.complex64).to_sparse(1),
        r"RowwiseAdagrad: expected a table of dtype float32, .*but got torch\.complex64",
    ),
    "a row that is not there": (
        optim.SGD,
        {},
        make_parameter(),
        torch.sparse_coo_tensor([[3, ROWS]], VALUES, (ROWS, WIDTH), check_invariants=False),
        r"indices\[1\] is 12",
    ),
    "seed": (
        optim.SGD,
        {"seed": 0.5},
        make_parameter(),
        make_gradient([1]),
        r"SGD: expected seed to be an int, but got 0\.5",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_nothing_is_written_after_an_error(what: str) -> None:
    kind, options, table, gradient, message = REFUSED[what]
    fine, dense = make_parameter(seed=1), make_parameter(seed=2)
    optimizer = kind([fine, table, dense], **options)
    fine.grad = make_gradient([1]) if not options else None
    dense.grad, table.grad = torch.ones(ROWS, WIDTH), gradient
    before = [parameter.detach().clone() for parameter in (fine, table, dense)]
    with pytest.raises((RuntimeError, IndexError), match=message):
        optimizer.step()
    for parameter, values in zip((fine, table, dense), before, strict=True):
        assert_same_bits(parameter, values)
    assert len(optimizer.state) == 0
    assert table.grad is gradient


def test_an_error_names_a_parameter_that_has_a_name() -> None:
    table = make_parameter()
    table.grad = make_gradient([1])
    optimizer = optim.Adam([("words.weight", table)], amsgrad=True)
    with pytest.raises(RuntimeError, match=re.escape("the gradient of words.weight")):
        optimizer.step()


def test_a_tensor_subclass_is_refused() -> None:
    class Mine(nn.Parameter):
        pass

    table = Mine(torch.ones(ROWS, WIDTH))
    table.grad = make_gradient([1])
    with pytest.raises(RuntimeError, match="SGD: its weight is of type Mine"):
        optim.SGD([table]).step()


def test_gradients_come_back_after_an_error_in_torchs_step() -> None:
    table, dense = make_parameter(), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    table.grad, dense.grad = make_gradient([1]), torch.ones(3, dtype=torch.complex64)
    there = table.grad
    with pytest.raises(RuntimeError, match="fused=True"):
        optim.Adam([table, dense], fused=True).step()
    assert table.grad is there
    assert_same_bits(table, make_parameter())


def test_a_coalesced_mark_that_is_not_true() -> None:
    """The op refuses it; the table's state is as if the step had not been."""
    table = make_parameter()
    gradient = make_gradient([4, 2])._coalesced_(True)
    optimizer = optim.Adam([table])
    table.grad = gradient
    with pytest.raises(IndexError, match="strictly ascending"):
        optimizer.step()
    assert table not in optimizer.state and table.grad is gradient
    assert_same_bits(table, make_parameter())
