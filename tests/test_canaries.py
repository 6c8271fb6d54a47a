"""Facts about torch's internals that correctness rests on, each by itself.

docs/internals.md lists them, with those that other files look at. Where one fails, what that page
names has to be read again, even if nothing else fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import embed_ext
from tests.joined_gradients import ROWS, WIDTH, assert_same, gradients_made, integers, make_tables

HEADERS = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "autograd"


class Makes(torch.autograd.Function):
    """weight [V, D], make -> 0; the gradient of weight is what make() returns, [V, D]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        ctx.make = make
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.make(), None


def leaf() -> Any:
    return nn.Parameter(integers(ROWS, WIDTH))


def header(*names: str) -> str:
    """The text of the headers that there are; some are new in torch 2.13."""
    return "".join((HEADERS / name).read_text() for name in names if (HEADERS / name).exists())


# Hooks.


def test_canary_kinds_of_hooks() -> None:
    """accumulate.cpp asks for each kind whether it would see what it leaves out."""
    text = re.sub(r"//.*", "", header("function.h", "node.h"))
    members = set(re.findall(r"\b(\w*hooks?_)\s*;", text))
    assert members == {"pre_hooks_", "tensor_pre_hooks_", "retains_grad_hooks_", "post_hooks_"}
    overridden = set(re.findall(r"virtual [^;{}]*?\b(\w*hooks?\w*)\(", text))
    assert overridden == {"tensor_pre_hooks", "tensor_post_acc_grad_hooks"}
    classes = set(re.findall(r"struct TORCH_API (\w+)", header("function_hook.h")))
    assert classes == {"FunctionPreHook", "FunctionPostHook", "PostAccumulateGradHook"}


def test_canary_kinds_of_hooks_in_python() -> None:
    weight = leaf()
    node = weight.view_as(weight).grad_fn
    assert {name for name in dir(node) if "register" in name} == {
        "_register_hook_dict",
        "register_hook",
        "register_prehook",
    }
    assert {name for name in dir(weight) if re.match("register.*hook", name)} == {
        "register_hook",
        "register_post_accumulate_grad_hook",
    }


# The engine.


def test_canary_what_the_graph_tasks_mutex_guards() -> None:
    (guarded,) = re.findall(
        r"To protect reads/writes to ([^;]*)std::mutex mutex_;", header("graph_task.h")
    )
    assert "not_ready_" in guarded and "dependencies_" in guarded


def test_canary_a_lookup_that_is_the_root_adds_to_what_is_there() -> None:
    """The root is not among the nodes that the graph task counts; what it feeds is."""
    ours, _ = make_tables()
    ours.weight.grad = there = integers(ROWS, WIDTH)
    expected = there.clone()
    out = ours(torch.arange(4))
    assert gradients_made(ours, lambda: out.backward(torch.ones_like(out))) == 0
    expected[:4] += 1
    assert_same(there, expected)


def test_canary_a_leaf_that_is_the_root() -> None:
    """No lookup adds to it, whatever the graph task says of it."""
    for table in make_tables():
        table.weight.grad = there = integers(ROWS, WIDTH)
        table.weight.backward(torch.ones(ROWS, WIDTH, dtype=torch.float64))
        assert_same(there, integers(ROWS, WIDTH) + 1)


def test_canary_callbacks_run_when_everything_is_accumulated() -> None:
    weight, seen = leaf(), []

    def make() -> Tensor:
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: seen.append(weight.grad.clone()))
        return integers(ROWS, WIDTH)

    (Makes.apply(weight, make) + Makes.apply(weight, lambda: integers(ROWS, WIDTH))).backward()
    assert_same(seen[0], 2 * integers(ROWS, WIDTH))


def test_canary_modes_see_the_operators_of_a_backward() -> None:
    class Log(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> object:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    table = embed_ext.Embedding(ROWS, WIDTH)
    out = table(torch.arange(4)).sum()
    with Log():
        out.backward()
    assert "embed_ext.embedding_dense_backward.default" in seen


# What AccumulateGrad does with a gradient.


def test_canary_accumulate_grad_takes_what_nobody_else_has() -> None:
    weight, held = leaf(), integers(ROWS, WIDTH)
    places: list[int] = []

    def make() -> Tensor:
        grad = integers(ROWS, WIDTH)
        places.append(grad.data_ptr())
        return grad

    Makes.apply(weight, make).backward()
    assert weight.grad.data_ptr() == places[0]
    weight.grad = None
    Makes.apply(weight, lambda: held).backward()
    assert weight.grad.data_ptr() != held.data_ptr()


def test_canary_accumulate_grad_adds_in_place() -> None:
    weight = leaf()
    weight.grad = there = integers(ROWS, WIDTH)
    version = there._version
    Makes.apply(weight, lambda: integers(ROWS, WIDTH)).backward()
    assert weight.grad is there and there._version == version + 1


def test_canary_accumulate_grad_drops_a_coalesced_mark_and_takes_the_parts() -> None:
    weight = leaf()
    places: list[int] = []

    def make() -> Tensor:
        grad = torch.sparse_coo_tensor(
            torch.tensor([[1, 3]]),
            torch.ones(2, WIDTH, dtype=torch.float64),
            (ROWS, WIDTH),
            is_coalesced=True,
            check_invariants=True,
        )
        places.append(grad._indices().data_ptr())
        return grad

    Makes.apply(weight, make).backward()
    assert not weight.grad.is_coalesced()
    assert weight.grad._indices().data_ptr() == places[0]


# Versions and owners.


def test_canary_what_shares_a_version() -> None:
    tensor = torch.zeros(4)
    for alias in (tensor.detach(), tensor[1:], tensor.view(2, 2)):
        before = tensor._version
        alias.add_(1)
        assert tensor._version == alias._version == before + 1
    before = tensor._version
    with torch.inference_mode():
        tensor.add_(1)
    assert tensor._version == before + 1
    tensor.data.add_(1)  # what keep_grad_buffer searches for
    assert tensor._version == before + 1


def next_place(table: embed_ext.Embedding) -> int:
    """Where the next gradient is made."""
    table.zero_grad()
    table(torch.arange(4)).sum().backward()
    return table.weight.grad.data_ptr()


@pytest.mark.parametrize(
    "hold",
    [
        pytest.param(lambda grad: grad, id="tensor"),
        pytest.param(lambda grad: grad.untyped_storage(), id="storage"),
        pytest.param(lambda grad: grad[3:], id="view"),
        pytest.param(lambda grad: grad.numpy(), id="numpy"),
        pytest.param(lambda grad: grad.__dlpack__(), id="dlpack"),
    ],
)
def test_canary_what_python_holds_is_counted(hold: Callable[[Tensor], object]) -> None:
    """By the storage's count of its owners, which alone says that a kept gradient is free."""
    table = embed_ext.Embedding(ROWS, WIDTH, keep_grad_buffer=True)
    first = next_place(table)
    assert next_place(table) == first
    held = hold(table.weight.grad)
    second = next_place(table)
    assert second != first
    del held
    assert next_place(table) == second


def test_canary_a_tensor_that_python_holds_is_not_added_to() -> None:
    table = embed_ext.Embedding(ROWS, WIDTH, dtype=torch.float64)
    held = integers(ROWS, WIDTH)
    lookup = table(torch.arange(4)).sum()  # before, so that its gradient comes after
    (lookup + Makes.apply(table.weight, lambda: held)).backward()
    assert_same(held, integers(ROWS, WIDTH))
    assert table.weight.grad.sum() == held.sum() + 4 * WIDTH


def test_canary_saved_tensors_tell_of_changes() -> None:
    indices = torch.arange(4)
    loss = embed_ext.Embedding(ROWS, WIDTH)(indices).sum()
    indices.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# The dispatcher, and torch.nn.


def test_canary_conjugates_are_resolved_before_a_kernel() -> None:
    """By the dispatcher's fallback; view_as_real() in the kernels refuses one that is not."""
    indices = torch.tensor([1, 4, 1])
    grad = torch.complex(integers(3, WIDTH), integers(3, WIDTH, seed=1))
    ops = torch.ops.embed_ext
    for conjugate in (torch.conj, lambda it: torch._neg_view(it.conj())):
        view = conjugate(grad)
        resolved = view.resolve_conj().resolve_neg()
        for run in (
            lambda it: ops.embedding_dense_backward(it, indices, 5),
            lambda it: ops.embedding_sparse_backward(it, indices, 5, -1, False, True).to_dense(),
            lambda it: (
                ops.embedding_grad_add_(total := grad.new_zeros(5, WIDTH), it, indices) or total
            ),
        ):
            assert_same(run(view), run(resolved))


def test_canary_optimizers_mark_the_step_that_runs_hooks() -> None:
    """embed_ext.optim calls the one that it wraps, so that the hooks of a step run once."""

    class Plain(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            return "stepped"

    class Derived(Plain):
        pass

    plain = Plain.step
    assert not hasattr(plain, "hooked")
    for _ in range(2):
        optimizer = Plain([leaf()], {})
        hooked: Any = Plain.step
        assert hooked.hooked and hooked.__wrapped__ is plain
    calls: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("hook"))
    assert plain(optimizer) == "stepped" and calls == []
    assert optimizer.step() == "stepped" and calls == ["hook"]
    Derived([leaf()], {})  # takes the step that is wrapped already
    assert Derived.step is Plain.step


def test_canary_a_scaler_hands_fused_optimizers_scale_and_infinities() -> None:
    """As attributes, for the time of the step; embed_ext.optim reads them for its rows."""
    seen: list[Any] = []

    class Fused(torch.optim.Optimizer):
        _step_supports_amp_scaling = True

        def step(self: Any, closure: Any = None) -> Any:
            seen.append((self.grad_scale.item(), self.found_inf.item()))

    weight = leaf()
    optimizer, scaler = Fused([weight], {}), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(weight.float().sum()).backward()
    scaler.step(optimizer)
    assert seen == [(4.0, 0.0)]
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_canary_nn_embedding_looks_its_function_up_at_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = nn.Embedding(5, 3)
    monkeypatch.setattr(F, "embedding", lambda *args, **kwargs: "ours")
    assert table(torch.tensor([1])) == "ours"
