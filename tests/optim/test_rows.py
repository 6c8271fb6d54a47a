"""The steps of rows, of every class: against the reference, and against torch's where it agrees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.common import LAYOUTS, REAL_DTYPES, assert_close, assert_same_bits
from tests.optim.common import (
    ALL_CASES,
    CASES,
    ROWS,
    TORCHS,
    WIDTH,
    Case,
    Reference,
    all_rows,
    assert_same_states,
    make_gradient,
    make_parameter,
    some_rows,
    take_steps,
)

STEPS = 4


@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    kind, options = case
    table = make_parameter(dtype, device=device)
    expected = Reference(kind, table, options)
    gradients = [make_gradient(some_rows(seed), dtype, seed, device) for seed in range(STEPS)]
    actual = take_steps(kind([table], **options), table, gradients)
    for gradient in gradients:
        expected.step(gradient)
    assert_close(actual, expected.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torchs_dense_step_where_all_rows_are_in_use(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    kind, options = case
    ours, theirs = (make_parameter(dtype, device=device) for _ in range(2))
    gradients = [make_gradient(all_rows(seed), dtype, seed, device) for seed in range(STEPS)]
    optimizer, torchs = kind([ours], **options), TORCHS[kind]([theirs], **options)
    actual = take_steps(optimizer, ours, gradients)
    expected = take_steps(torchs, theirs, [gradient.to_dense() for gradient in gradients])
    assert_close(actual, expected)
    assert_same_states(optimizer.state[ours], torchs.state[theirs])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_torchs_step_where_lazy_is_the_same(name: str, sparse: bool) -> None:
    kind, options = CASES[name]
    ours, theirs = make_parameter(), make_parameter()
    gradients = [make_gradient(some_rows(seed), seed=seed) for seed in range(STEPS)]
    optimizer, torchs = kind([ours], **options), TORCHS[kind]([theirs], **options)
    actual = take_steps(optimizer, ours, gradients)
    expected = take_steps(torchs, theirs, [it if sparse else it.to_dense() for it in gradients])
    assert_close(actual, expected)
    assert_same_states(optimizer.state[ours], torchs.state[theirs])


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_rows_that_are_not_in_use_stay(case: Case) -> None:
    kind, options = case
    table = make_parameter()
    optimizer = kind([table], **options)
    take_steps(optimizer, table, [make_gradient(all_rows(0))])
    states = {k: v for k, v in optimizer.state[table].items() if k != "step"}
    before = {key: state.clone() for key, state in states.items()}
    weight = table.detach().clone()
    take_steps(optimizer, table, [make_gradient([3, 7, 3], seed=1)])
    others = [row for row in range(ROWS) if row not in (3, 7)]
    assert_same_bits(table[others], weight[others])
    assert not torch.equal(table[3], weight[3])
    for key, state in before.items():
        assert_same_bits(optimizer.state[table][key][others], state[others])


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_an_empty_gradient_is_a_step_of_no_row(case: Case) -> None:
    kind, options = case
    table = make_parameter()
    expected = Reference(kind, table, options)
    gradients = [make_gradient(rows, seed=1) for rows in ([], [1, 2], [], [2, 5])]
    actual = take_steps(kind([table], **options), table, gradients)
    for gradient in gradients:
        expected.step(gradient)
    assert_close(actual, expected.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sgd_momentum", "adagrad", "adam", "rowwise_adam"])
def test_layouts_of_the_table(name: str, layout: str) -> None:
    kind, options = ALL_CASES[name]
    gradients = [make_gradient(some_rows(seed), seed=seed) for seed in range(STEPS)]
    plain = make_parameter()
    strided = nn.Parameter(LAYOUTS[layout](plain.detach()))
    expected = take_steps(kind([plain], **options), plain, gradients)
    assert_close(take_steps(kind([strided], **options), strided, gradients), expected)


@st.composite
def programs(draw: st.DrawFn) -> tuple[Case, list[list[int]], torch.dtype]:
    case = ALL_CASES[draw(st.sampled_from(sorted(ALL_CASES)))]
    rows = st.lists(st.integers(0, ROWS - 1), max_size=20)
    dtypes = st.sampled_from([torch.float64, torch.float32])
    return case, draw(st.lists(rows, min_size=1, max_size=6)), draw(dtypes)


@settings(max_examples=100, deadline=None)
@given(programs())
def test_random_batches(program: tuple[Case, list[list[int]], torch.dtype]) -> None:
    (kind, options), batches, dtype = program
    table = make_parameter(dtype)
    expected = Reference(kind, table, options)
    optimizer = kind([table], **options)
    for seed, rows in enumerate(batches):
        gradient = make_gradient(rows, dtype, seed)
        take_steps(optimizer, table, [gradient])
        expected.step(gradient)
    # A row that cancels out has a root of zero under the quotient: the reference's own error.
    rtol, atol = (1e-9, 1e-9) if dtype == torch.float64 else (1e-4, 1e-4)
    torch.testing.assert_close(table.detach(), expected.weight, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_states_of_low_precision_tables_are_float32(case: Case, dtype: torch.dtype) -> None:
    kind, options = case
    table = make_parameter(dtype)
    expected = Reference(kind, table, options)
    optimizer = kind([table], **options)
    for seed in range(STEPS):
        gradient = make_gradient(some_rows(seed), dtype, seed)
        take_steps(optimizer, table, [gradient])
        expected.step(gradient)
        expected.weight.copy_(table.detach())  # so that one rounding is all that differs
    states = optimizer.state[table]
    wanted = {"exp_avg": expected.first, "momentum_buffer": expected.first}
    wanted |= {"exp_avg_sq": expected.second, "sum": expected.second}
    for key in states.keys() - {"step"}:
        assert states[key].dtype == torch.float32
        assert_close(states[key], wanted[key])
    assert len(states) == {"SGD": 1 if options.get("momentum") else 0, "Adagrad": 2}.get(
        kind.__name__.removeprefix("Rowwise"), 3
    )


def test_a_row_is_not_lost_to_rounding_in_the_mean() -> None:
    """lr * grad is an eighth of the distance from 1 to the bfloat16 number below it."""
    rows, steps = 4000, 8

    def mean(**options: Any) -> Tensor:
        table = nn.Parameter(torch.ones(rows, WIDTH, dtype=torch.bfloat16))
        optimizer = CASES["sgd"][0]([table], lr=2.0**-11, **options)
        indices = torch.arange(rows).unsqueeze(0)
        values = torch.ones(rows, WIDTH, dtype=torch.bfloat16)
        gradient = torch.sparse_coo_tensor(indices, values, table.shape, is_coalesced=True)
        take_steps(optimizer, table, [gradient] * steps)
        return table.detach().double().mean()

    assert mean() == 1
    expected = torch.tensor(1 - steps * 2.0**-11, dtype=torch.float64)
    torch.testing.assert_close(mean(stochastic_rounding=True), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_dense_and_sparse_gradients_in_turns(fused: bool, device: str) -> None:
    """Where torch's step is fused, it keeps its count of steps beside the parameter."""
    ours, theirs = (make_parameter(device=device) for _ in range(2))
    gradients = [make_gradient(all_rows(seed), seed=seed, device=device) for seed in range(6)]
    dense = [gradient.to_dense() for gradient in gradients]
    turns = [gradients[i] if i in (1, 2, 4) else dense[i] for i in range(6)]
    for name in ("adagrad", "adam"):
        kind, options = CASES[name]
        optimizer = kind([ours], **options, fused=fused)
        torchs = TORCHS[kind]([theirs], **options, fused=fused)
        actual, expected = take_steps(optimizer, ours, turns), take_steps(torchs, theirs, dense)
        assert_close(actual, expected)
