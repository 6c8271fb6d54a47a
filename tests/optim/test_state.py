"""What optimizers keep: when it is made, what of it is saved, and who can read it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embed_ext import optim
from tests.common import assert_close, assert_same_bits
from tests.optim.common import (
    ALL_CASES,
    CASES,
    ROWS,
    ROWWISE,
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

LOW = (torch.bfloat16, torch.float16)


def gradients(dtype: torch.dtype = torch.float32, start: int = 0, stop: int = 3) -> list[Tensor]:
    return [make_gradient(some_rows(seed), dtype, seed) for seed in range(start, stop)]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_no_state_before_the_first_step(case: Case) -> None:
    kind, options = case
    tables = [make_parameter(), make_parameter()]
    optimizer = kind(tables, **options)
    assert len(optimizer.state) == 0
    take_steps(optimizer, tables[0], gradients())
    assert tables[1] not in optimizer.state
    assert optimizer.state_dict()["state"].keys() <= {0}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_keys_shapes_and_dtypes_are_torchs(case: Case) -> None:
    kind, options = case
    ours, theirs = make_parameter(), make_parameter()
    optimizer, torchs = kind([ours], **options), TORCHS[kind]([theirs], **options)
    take_steps(optimizer, ours, gradients())
    take_steps(torchs, theirs, [it.to_dense() for it in gradients()])
    state, expected = optimizer.state.get(ours, {}), torchs.state.get(theirs, {})
    assert state.keys() == expected.keys()
    for key in state:
        for what in ("shape", "dtype", "device"):
            assert getattr(state[key], what) == getattr(expected[key], what)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torchs_class_goes_on_from_our_state(case: Case) -> None:
    kind, options = case
    ours, theirs = make_parameter(), make_parameter()
    optimizer, torchs = kind([ours], **options), TORCHS[kind]([theirs], **options)
    take_steps(optimizer, ours, gradients())
    theirs.data.copy_(ours.detach())
    torchs.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    last = make_gradient(all_rows(7), seed=7)
    expected = take_steps(torchs, theirs, [last.to_dense()])
    assert_close(take_steps(optimizer, ours, [last]), expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_we_go_on_from_torchs_state(case: Case) -> None:
    kind, options = case
    ours, theirs = make_parameter(), make_parameter()
    optimizer, torchs = kind([ours], seed=5, **options), TORCHS[kind]([theirs], **options)
    take_steps(torchs, theirs, [it.to_dense() for it in gradients()])
    ours.data.copy_(theirs.detach())
    optimizer.load_state_dict(saved_and_loaded(torchs.state_dict()))
    assert optimizer.param_groups[0]["seed"] == 5  # torch's has none
    last = make_gradient(all_rows(7), seed=7)
    expected = take_steps(torchs, theirs, [last.to_dense()])
    assert_close(take_steps(optimizer, ours, [last]), expected)
    assert_same_states(optimizer.state.get(ours, {}), torchs.state.get(theirs, {}))


def test_we_go_on_from_the_sparse_momentum_of_torchs_sgd() -> None:
    ours, theirs = make_parameter(), make_parameter()
    options = {"lr": 0.1, "momentum": 0.5}
    optimizer, torchs = optim.SGD([ours], **options), torch.optim.SGD([theirs], **options)
    take_steps(torchs, theirs, gradients())
    assert torchs.state[theirs]["momentum_buffer"].is_sparse
    ours.data.copy_(theirs.detach())
    optimizer.load_state_dict(copy.deepcopy(torchs.state_dict()))
    last = make_gradient(all_rows(7), seed=7)
    expected = take_steps(torchs, theirs, [last])
    assert_close(take_steps(optimizer, ours, [last]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_a_resumed_run_is_the_same_bit_by_bit(
    case: Case, stochastic: bool, dtype: torch.dtype
) -> None:
    kind, options = case
    options = {**options, "stochastic_rounding": stochastic, "seed": 3}
    whole, first = make_parameter(dtype), make_parameter(dtype)
    optimizer = kind([whole], **options)
    take_steps(optimizer, whole, gradients(dtype, 0, 6))
    earlier = kind([first], **options)
    take_steps(earlier, first, gradients(dtype, 0, 3))
    second = nn.Parameter(first.detach().clone())
    later = kind([second], **options)
    later.load_state_dict(saved_and_loaded(earlier.state_dict()))
    take_steps(later, second, gradients(dtype, 3, 6))
    assert_same_bits(second, whole)
    states, expected = later.state.get(second, {}), optimizer.state.get(whole, {})
    assert states.keys() == expected.keys()
    for key in states:
        assert_same_bits(states[key], expected[key])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_float32_states_are_loaded_as_they_are(case: Case, dtype: torch.dtype) -> None:
    kind, options = case
    table, other = make_parameter(dtype), make_parameter(dtype)
    optimizer, loaded = kind([table], **options), kind([other], **options)
    take_steps(optimizer, table, gradients(dtype))
    loaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert loaded.state[other].keys() == optimizer.state[table].keys()
    for key, state in optimizer.state[table].items():
        assert_same_bits(loaded.state[other][key], state)


def test_what_hooks_make_of_a_state_dict_is_loaded() -> None:
    table = make_parameter(torch.bfloat16)
    optimizer = optim.Adam([table])
    take_steps(optimizer, table, gradients(torch.bfloat16))
    seen: list[torch.dtype] = []

    def double(_: object, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        state["state"][0]["exp_avg"] *= 2
        return state

    def look(loaded: Any) -> None:
        seen.append(loaded.state[table]["exp_avg"].dtype)

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(look, prepend=True)
    expected = optimizer.state[table]["exp_avg"] * 2
    for _ in range(2):  # the hooks that loading takes are gone each time
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        assert_same_bits(optimizer.state[table]["exp_avg"], expected)
        expected = expected * 2
    assert seen == [torch.float32] * 2


def test_states_of_other_parameters_are_cast_as_torch_does() -> None:
    bias = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.ones(4))
    saved, loaded = optim.Adam([wide]), optim.Adam([bias])
    take_steps(saved, wide, [torch.ones(4)])
    loaded.load_state_dict(saved.state_dict())
    assert loaded.state[bias]["exp_avg"].dtype == torch.bfloat16
    take_steps(loaded, bias, [torch.ones(4, dtype=torch.bfloat16)])


def test_states_that_only_torchs_step_can_use_are_cast_as_torch_does() -> None:
    for options in ({"amsgrad": True}, {}):
        wide, narrow = make_parameter(), make_parameter(torch.bfloat16)
        saved, loaded = optim.Adam([wide], **options), optim.Adam([narrow], **options)
        take_steps(saved, wide, [torch.ones(ROWS, WIDTH)])
        loaded.load_state_dict(saved.state_dict())
        expected = torch.bfloat16 if options else torch.float32
        assert loaded.state[narrow]["exp_avg"].dtype == expected
        before = narrow.detach().clone()
        take_steps(loaded, narrow, [torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)])
        assert not torch.equal(narrow, before)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_a_dense_gradient_after_sparse_ones(case: Case, dtype: torch.dtype) -> None:
    kind, options = case
    table = make_parameter(dtype)
    optimizer, expected = kind([table], **options), Reference(kind, table, options)
    sparse, dense = gradients(dtype), make_gradient(all_rows(5), dtype, seed=5)
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


@pytest.mark.parametrize("dtype", LOW)
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
    steps = [make_gradient(all_rows(0)).to_dense(), *gradients()]
    assert_close(take_steps(optimizer, table, steps), take_steps(expected, other, steps))


def test_row_wise_states_have_one_number_a_row() -> None:
    for name, key in (("rowwise_adagrad", "sum"), ("rowwise_adam", "exp_avg_sq")):
        kind, options = ALL_CASES[name]
        table = make_parameter()
        optimizer = kind([table], **options)
        take_steps(optimizer, table, gradients())
        assert optimizer.state[table][key].shape == (ROWS,)


def test_dense_parameters_of_row_wise_optimizers_have_torchs_state() -> None:
    for kind, torchs in (
        (optim.RowwiseAdagrad, torch.optim.Adagrad),
        (optim.RowwiseAdam, torch.optim.Adam),
    ):
        ours, theirs = make_parameter(), make_parameter()
        steps = [it.to_dense() for it in gradients()]
        optimizer, expected = kind([ours]), torchs([theirs])
        assert_same_bits(take_steps(optimizer, ours, steps), take_steps(expected, theirs, steps))
        assert_same_states(optimizer.state[ours], expected.state[theirs])


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_pickles_and_copies(case: Case) -> None:
    kind, options = case
    table = make_parameter()
    optimizer = kind([table], stochastic_rounding=True, seed=4, **options)
    take_steps(optimizer, table, gradients())
    for again in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert type(again) is kind
        group = again.param_groups[0]
        assert (group["stochastic_rounding"], group["seed"]) == (True, 4)
        take_steps(again, group["params"][0], gradients(start=3, stop=5))
        twin = copy.deepcopy(optimizer)
        (other,) = twin.param_groups[0]["params"]
        assert_same_bits(group["params"][0], take_steps(twin, other, gradients(start=3, stop=5)))


def test_an_optimizer_that_was_pickled_without_our_options() -> None:
    optimizer = optim.SGD([make_parameter()])
    state = pickle.loads(pickle.dumps(optimizer.__getstate__()))
    for place in (state["defaults"], *state["param_groups"]):
        del place["stochastic_rounding"], place["seed"]
    optimizer.__setstate__(state)
    assert optimizer.param_groups[0]["stochastic_rounding"] is False
    assert optimizer.param_groups[0]["seed"] == 0


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
    take_steps(optimizer, table, gradients())
    optimizer.share_memory()
    assert optimizer.state[table]["sum"].is_shared() and optimizer.state[bias]["sum"].is_shared()


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_tables_in_shared_memory_are_updated_where_they_are(case: Case) -> None:
    kind, options = case
    table, plain = make_parameter(), make_parameter()
    table.data.share_memory_()
    place = table.data_ptr()
    expected = take_steps(kind([plain], **options), plain, gradients())
    assert_same_bits(take_steps(kind([table], **options), table, gradients()), expected)
    assert table.data_ptr() == place and table.is_shared()


def test_a_float32_count_of_steps_on_the_cpu() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        table = make_parameter()
        optimizer = optim.Adam([table])
        take_steps(optimizer, table, gradients())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(optimizer.state[table]["step"], torch.tensor(3.0))


def test_the_count_goes_where_torchs_fused_step_reads_it() -> None:
    parameter = nn.Parameter(torch.empty(2, 2, device="meta"))
    optimizer = optim.Adam([parameter], fused=True)
    moments = {key: torch.empty_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
    optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
    parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["step"].device.type == "meta"
