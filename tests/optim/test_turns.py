"""Tables whose gradient is sparse at one step and dense at another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from embed_ext import optim
from tests.common import assert_close, assert_same_bits
from tests.optim.common import (
    ALL_CASES,
    CASES,
    LOW_PRECISION,
    ROWWISE,
    TORCHS,
    Case,
    Reference,
    all_rows,
    assert_same_states,
    make_gradient,
    make_parameter,
    some_gradients,
    take_steps,
)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_a_dense_gradient_after_sparse_ones(case: Case, dtype: torch.dtype) -> None:
    kind, options = case
    table = make_parameter(dtype)
    optimizer, expected = kind([table], **options), Reference(kind, table, options)
    sparse, dense = some_gradients(dtype), make_gradient(all_rows(5), dtype, seed=5)
    for gradient in (*sparse, dense, *sparse):
        expected.step(gradient)
    last = dense.to_dense()
    take_steps(optimizer, table, [*sparse, last])
    assert table.grad is last
    assert_close(take_steps(optimizer, table, sparse), expected.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_sparse_gradient_after_dense_ones(case: Case, dtype: torch.dtype) -> None:
    kind, options = case
    ours, theirs = make_parameter(dtype), make_parameter(dtype)
    optimizer, torchs = kind([ours], **options), TORCHS[kind]([theirs], **options)
    dense = [make_gradient(all_rows(seed), dtype, seed) for seed in range(4)]
    take_steps(torchs, theirs, [it.to_dense() for it in dense])
    take_steps(optimizer, ours, [dense[0].to_dense(), dense[1].to_dense(), *dense[2:]])
    assert_close(ours.detach(), theirs.detach())
    assert_same_states(optimizer.state.get(ours, {}), torchs.state.get(theirs, {}))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", ["sgd_momentum", "adagrad", "adamw", "rowwise_adam"])
def test_a_state_of_low_precision_that_torch_made_is_widened(name: str, dtype: torch.dtype) -> None:
    kind, options = ALL_CASES[name]
    table = make_parameter(dtype)
    optimizer = kind([table], **options)
    take_steps(optimizer, table, [make_gradient(all_rows(0), dtype).to_dense()])
    before = {k: v.clone() for k, v in optimizer.state[table].items() if k != "step"}
    assert {state.dtype for state in before.values()} == {dtype}
    take_steps(optimizer, table, [make_gradient([3], dtype, seed=1)])
    for key, state in before.items():
        now = optimizer.state[table][key]
        assert now.dtype == torch.float32
        assert_same_bits(now[4:], state[4:].float())
    take_steps(optimizer, table, [make_gradient(all_rows(2), dtype).to_dense()])


@pytest.mark.parametrize("case", ROWWISE.values(), ids=ROWWISE)
def test_a_table_that_began_with_dense_gradients_keeps_its_moments(case: Case) -> None:
    kind, options = case
    table, other = make_parameter(), make_parameter()
    whole = optim.Adagrad if kind is optim.RowwiseAdagrad else optim.Adam
    optimizer, expected = kind([table], **options), whole([other], **options)
    steps = [make_gradient(all_rows(0)).to_dense(), *some_gradients()]
    assert_close(take_steps(optimizer, table, steps), take_steps(expected, other, steps))


def test_dense_parameters_of_row_wise_optimizers_have_torchs_state() -> None:
    for kind, torchs in (
        (optim.RowwiseAdagrad, torch.optim.Adagrad),
        (optim.RowwiseAdam, torch.optim.Adam),
    ):
        ours, theirs = make_parameter(), make_parameter()
        steps = [it.to_dense() for it in some_gradients()]
        optimizer, expected = kind([ours]), torchs([theirs])
        assert_same_bits(take_steps(optimizer, ours, steps), take_steps(expected, theirs, steps))
        assert_same_states(optimizer.state[ours], expected.state[theirs])


def test_the_count_goes_where_torchs_fused_step_reads_it() -> None:
    parameter = nn.Parameter(torch.empty(2, 2, device="meta"))
    optimizer = optim.Adam([parameter], fused=True)
    moments = {key: torch.empty_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
    optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
    parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["step"].device.type == "meta"
