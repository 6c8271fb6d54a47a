"""State dicts, pickles and copies: who can read them, and that a run goes on the same."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from embed_ext import optim
from tests.common import assert_close, assert_same_bits
from tests.optim.common import (
    ALL_CASES,
    CASES,
    LOW_PRECISION,
    ROWS,
    ROWWISE,
    TORCHS,
    WIDTH,
    Case,
    all_rows,
    assert_same_states,
    make_gradient,
    make_parameter,
    some_gradients,
    take_steps,
)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torchs_class_goes_on_from_our_state(case: Case) -> None:
    kind, options = case
    ours, theirs = make_parameter(), make_parameter()
    optimizer, torchs = kind([ours], **options), TORCHS[kind]([theirs], **options)
    take_steps(optimizer, ours, some_gradients())
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
    take_steps(torchs, theirs, [it.to_dense() for it in some_gradients()])
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
    take_steps(torchs, theirs, some_gradients())
    assert torchs.state[theirs]["momentum_buffer"].is_sparse
    ours.data.copy_(theirs.detach())
    optimizer.load_state_dict(copy.deepcopy(torchs.state_dict()))
    last = make_gradient(all_rows(7), seed=7)
    expected = take_steps(torchs, theirs, [last])
    assert_close(take_steps(optimizer, ours, [last]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW_PRECISION])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_a_resumed_run_is_the_same_bit_by_bit(
    case: Case, stochastic: bool, dtype: torch.dtype
) -> None:
    kind, options = case
    options = {**options, "stochastic_rounding": stochastic, "seed": 3}
    whole, first = make_parameter(dtype), make_parameter(dtype)
    optimizer = kind([whole], **options)
    take_steps(optimizer, whole, some_gradients(dtype, 0, 6))
    earlier = kind([first], **options)
    take_steps(earlier, first, some_gradients(dtype, 0, 3))
    second = nn.Parameter(first.detach().clone())
    later = kind([second], **options)
    later.load_state_dict(saved_and_loaded(earlier.state_dict()))
    take_steps(later, second, some_gradients(dtype, 3, 6))
    assert_same_bits(second, whole)
    states, expected = later.state.get(second, {}), optimizer.state.get(whole, {})
    assert states.keys() == expected.keys()
    for key in states:
        assert_same_bits(states[key], expected[key])


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_float32_states_are_loaded_as_they_are(case: Case, dtype: torch.dtype) -> None:
    kind, options = case
    table, other = make_parameter(dtype), make_parameter(dtype)
    optimizer, loaded = kind([table], **options), kind([other], **options)
    take_steps(optimizer, table, some_gradients(dtype))
    loaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert loaded.state[other].keys() == optimizer.state[table].keys()
    for key, state in optimizer.state[table].items():
        assert_same_bits(loaded.state[other][key], state)


def test_what_hooks_make_of_a_state_dict_is_loaded() -> None:
    table = make_parameter(torch.bfloat16)
    optimizer = optim.Adam([table])
    take_steps(optimizer, table, some_gradients(torch.bfloat16))
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
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


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


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_pickles_and_copies(case: Case) -> None:
    kind, options = case
    table = make_parameter()
    optimizer = kind([table], stochastic_rounding=True, seed=4, **options)
    take_steps(optimizer, table, some_gradients())
    for again in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert type(again) is kind
        group = again.param_groups[0]
        assert (group["stochastic_rounding"], group["seed"]) == (True, 4)
        take_steps(again, group["params"][0], some_gradients(start=3, stop=5))
        twin = copy.deepcopy(optimizer)
        (other,) = twin.param_groups[0]["params"]
        assert_same_bits(
            group["params"][0], take_steps(twin, other, some_gradients(start=3, stop=5))
        )


def test_an_optimizer_that_was_pickled_without_our_options() -> None:
    optimizer = optim.SGD([make_parameter()])
    state = pickle.loads(pickle.dumps(optimizer.__getstate__()))
    for place in (state["defaults"], *state["param_groups"]):
        del place["stochastic_rounding"], place["seed"]
    optimizer.__setstate__(state)
    assert optimizer.param_groups[0]["stochastic_rounding"] is False
    assert optimizer.param_groups[0]["seed"] == 0


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}], ids=str)
@pytest.mark.parametrize("name", ["sgd_momentum", "adagrad", "adam", *ROWWISE])
def test_states_by_name_of_torchs_distributed_checkpoints(
    name: str, options: dict[str, Any]
) -> None:
    """They make a state by a dense step before they load one."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    kind, arguments = ALL_CASES[name]

    def make() -> tuple[Any, Any]:
        model = nn.ModuleDict({"words": nn.Embedding(ROWS, WIDTH, sparse=True)}).bfloat16()
        return model, kind(model.parameters(), **arguments)

    (model, optimizer), (other, loaded) = make(), make()
    table, twin = model["words"].weight, other["words"].weight
    take_steps(optimizer, table, some_gradients(torch.bfloat16))
    how = checkpoint.StateDictOptions(**options)
    saved = copy.deepcopy(checkpoint.get_optimizer_state_dict(model, optimizer, options=how))
    checkpoint.set_optimizer_state_dict(other, loaded, saved, options=how)
    assert loaded.state[twin].keys() == optimizer.state[table].keys()
    for key, state in optimizer.state[table].items():
        assert_same_bits(loaded.state[twin][key], state)


@pytest.mark.parametrize("name", ALL_CASES)
def test_a_look_at_the_state_before_a_step_changes_nothing(name: str) -> None:
    kind, arguments = ALL_CASES[name]
    table = make_parameter()
    optimizer = kind([table], **arguments)
    assert optimizer.state[table] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    twin = copy.deepcopy(optimizer)
    assert not any(twin.state.values())


def test_a_group_keeps_its_options_where_what_is_loaded_has_none() -> None:
    parameters = [make_parameter(), make_parameter()]
    groups: list[Any] = [
        {"params": parameters[:1], "stochastic_rounding": True, "seed": 5},
        {"params": parameters[1:]},
    ]
    ours = optim.SGD(groups, lr=0.1)
    theirs = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.3)
    ours.load_state_dict(theirs.state_dict())
    found = [(g["lr"], g["stochastic_rounding"], g["seed"]) for g in ours.param_groups]
    assert found == [(0.3, True, 5), (0.3, False, 0)]
    saved = ours.state_dict()
    other = optim.SGD([{"params": [p]} for p in parameters], lr=0.1, seed=9)
    other.load_state_dict(saved)
    assert [(g["stochastic_rounding"], g["seed"]) for g in other.param_groups] == [
        (True, 5),
        (False, 0),
    ]


def test_a_state_that_is_held_goes_on() -> None:
    table = make_parameter()
    optimizer = optim.Adam([table])
    gradients = some_gradients(torch.float32)
    take_steps(optimizer, table, gradients[:1])
    held = optimizer.state[table]
    take_steps(optimizer, table, gradients[1:2])
    assert optimizer.state[table] is held and int(held["step"]) == 2
