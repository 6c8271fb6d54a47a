"""What optimizers keep: when it is made, of what kind, and where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from embed_ext import optim
from tests.common import assert_close, assert_same_bits
from tests.optim.common import (
    ALL_CASES,
    CASES,
    ROWS,
    TORCHS,
    WIDTH,
    Case,
    make_gradient,
    make_parameter,
    some_gradients,
    take_steps,
)


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_no_state_before_the_first_step(case: Case) -> None:
    kind, options = case
    tables = [make_parameter(), make_parameter()]
    optimizer = kind(tables, **options)
    assert len(optimizer.state) == 0
    take_steps(optimizer, tables[0], some_gradients())
    assert tables[1] not in optimizer.state
    assert optimizer.state_dict()["state"].keys() <= {0}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_keys_shapes_and_dtypes_are_torchs(case: Case) -> None:
    kind, options = case
    ours, theirs = make_parameter(), make_parameter()
    optimizer, torchs = kind([ours], **options), TORCHS[kind]([theirs], **options)
    take_steps(optimizer, ours, some_gradients())
    take_steps(torchs, theirs, [it.to_dense() for it in some_gradients()])
    state, expected = optimizer.state.get(ours, {}), torchs.state.get(theirs, {})
    assert state.keys() == expected.keys()
    for key in state:
        for what in ("shape", "dtype", "device"):
            assert getattr(state[key], what) == getattr(expected[key], what)


def test_row_wise_states_have_one_number_a_row() -> None:
    for name, key in (("rowwise_adagrad", "sum"), ("rowwise_adam", "exp_avg_sq")):
        kind, options = ALL_CASES[name]
        table = make_parameter()
        optimizer = kind([table], **options)
        take_steps(optimizer, table, some_gradients())
        assert optimizer.state[table][key].shape == (ROWS,)


def test_share_memory_makes_the_sums_first() -> None:
    linear, table = nn.Linear(3, 2), make_parameter(torch.bfloat16)
    parameters: list[Tensor] = [*linear.parameters(), table]
    optimizer = optim.Adagrad(parameters, initial_accumulator_value=0.5)
    take_steps(optimizer, linear.bias, [torch.ones(2)])
    optimizer.share_memory()
    shared = {parameter: optimizer.state[parameter]["sum"] for parameter in parameters}
    assert all(total.is_shared() for total in shared.values())
    assert_same_bits(shared[table], torch.full((ROWS, WIDTH), 0.5))
    assert_same_bits(shared[linear.weight], torch.full((2, 3), 0.5))
    assert_close(shared[linear.bias], torch.full((2,), 1.5))
    for gradient in (make_gradient([1], torch.bfloat16), make_gradient([2]).bfloat16().to_dense()):
        take_steps(optimizer, table, [gradient])
        assert optimizer.state[table]["sum"] is shared[table]
    assert not torch.equal(shared[table], torch.full((ROWS, WIDTH), 0.5))


def test_share_memory_of_row_wise_sums() -> None:
    table, bias = make_parameter(), nn.Parameter(torch.ones(3))
    optimizer = optim.RowwiseAdagrad([table, bias])
    with pytest.raises(RuntimeError, match=r"RowwiseAdagrad.*of shape \(12, 5\) has not"):
        optimizer.share_memory()
    take_steps(optimizer, table, some_gradients())
    optimizer.share_memory()
    assert optimizer.state[table]["sum"].is_shared() and optimizer.state[bias]["sum"].is_shared()


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_tables_in_shared_memory_are_updated_where_they_are(case: Case) -> None:
    kind, options = case
    table, plain = make_parameter(), make_parameter()
    table.data.share_memory_()
    place = table.data_ptr()
    expected = take_steps(kind([plain], **options), plain, some_gradients())
    assert_same_bits(take_steps(kind([table], **options), table, some_gradients()), expected)
    assert table.data_ptr() == place and table.is_shared()


def test_a_float32_count_of_steps_on_the_cpu() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        table = make_parameter()
        optimizer = optim.Adam([table])
        take_steps(optimizer, table, some_gradients())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(optimizer.state[table]["step"], torch.tensor(3.0))
