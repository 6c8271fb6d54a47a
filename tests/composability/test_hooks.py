"""Hooks of every kind, the node as a user sees it, and the gradient's way into ``.grad``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import embed_ext
from tests.common import LAYOUTS, assert_close, make_indices, make_table
from tests.composability.lookups import gradient, make_pair, stock

NUM_ROWS, WIDTH = 7, 3


def some_indices() -> Tensor:
    return make_indices((4, 3), NUM_ROWS)


# Saved tensors.


@pytest.mark.parametrize("sparse", [False, True])
def test_saved_tensor_hooks_get_the_indices_only(sparse: bool) -> None:
    counts = []
    for table in make_pair(sparse=sparse):
        packed: list[Tensor] = []
        unpacked: list[int] = []

        def pack(tensor: Tensor, packed: list[Tensor] = packed) -> int:
            packed.append(tensor)
            return len(packed) - 1

        def unpack(
            ticket: int, packed: list[Tensor] = packed, unpacked: list[int] = unpacked
        ) -> Tensor:
            unpacked.append(ticket)
            return packed[ticket]

        indices = some_indices()
        with saved_tensors_hooks(pack, unpack):
            out = table(indices)
        out.sum().backward()
        counts.append((len(packed), len(unpacked)))
        assert torch.equal(packed[0], indices)
    assert counts == [(1, 1), (1, 1)]


def test_save_on_cpu() -> None:
    theirs, ours = make_pair(padding_idx=1)
    for table in (theirs, ours):
        with save_on_cpu():
            out = table(some_indices())
        out.pow(2).sum().backward()
    assert_close(gradient(ours), gradient(theirs))


# Hooks.


def hooked(table: nn.Embedding) -> tuple[list[str], Tensor]:
    """Run one step with a hook wherever there can be one; return who spoke, and the gradient."""
    log: list[str] = []

    def note(name: str, answer: Any = None) -> Any:
        def hook(*args: Any) -> Any:
            log.append(name)
            return answer(*args) if answer else None

        return hook

    table.register_forward_pre_hook(note("forward pre"))
    table.register_forward_hook(note("forward", lambda module, args, out: out * 2))
    table.register_full_backward_pre_hook(note("backward pre"))
    table.register_full_backward_hook(note("backward"))
    table.weight.register_hook(note("weight", lambda grad: grad * 3))
    table.weight.register_post_accumulate_grad_hook(note("accumulated"))
    out = table(some_indices())
    out.register_hook(note("output", lambda grad: grad + 1))
    out.pow(2).sum().backward()
    return log, gradient(table)


def test_hooks_fire_in_torch_order() -> None:
    theirs, ours = make_pair()
    expected_log, expected = hooked(theirs)
    log, actual = hooked(ours)
    assert log == expected_log
    assert_close(actual, expected)


def test_node_hooks() -> None:
    logs = []
    for table in make_pair():
        log: list[Any] = []
        out = table(some_indices())
        node = out.grad_fn

        def before(grads: tuple[Tensor, ...], log: list[Any] = log) -> tuple[Tensor, ...]:
            log.append(tuple(grad.shape for grad in grads))
            return tuple(2 * grad for grad in grads)

        def after(
            grad_inputs: tuple[Tensor, ...], grad_outputs: tuple[Tensor, ...], log: list[Any] = log
        ) -> None:
            log.append(([g.sum().item() for g in grad_inputs], [g.shape for g in grad_outputs]))

        assert node is not None
        node.register_prehook(before)
        node.register_hook(after)
        out.sum().backward()
        logs.append((log, gradient(table).tolist()))
    assert logs[1] == logs[0]


def test_node_says_what_it_is() -> None:
    _, ours = make_pair()
    out = ours(some_indices())
    node = out.grad_fn
    assert node is not None
    assert "EmbeddingBackward" in node.name() and "EmbeddingBackward" in repr(out)
    ((edge, position),) = node.next_functions
    assert position == 0
    assert edge is not None and edge.name() == "torch::autograd::AccumulateGrad"
    assert edge.variable is ours.weight  # type: ignore[attr-defined]


def test_anomaly_mode_points_at_the_lookup() -> None:
    for table in make_pair():
        with torch.autograd.detect_anomaly(check_nan=True), pytest.warns(UserWarning):
            out = table(some_indices())
            out.register_hook(lambda grad: grad * float("nan"))
            with pytest.raises(RuntimeError, match="EmbeddingBackward.*returned nan"):
                out.sum().backward()


def test_profiler_records_forward_and_backward() -> None:
    _, ours = make_pair()
    with torch.profiler.profile() as profile:
        ours(some_indices()).sum().backward()
    keys = {event.key for event in profile.key_averages()}
    assert {"embed_ext::embedding", "embed_ext::embedding_dense_backward"} <= keys
    assert any("EmbeddingBackward" in key for key in keys)


# The gradient's way.


class Calls(TorchDispatchMode):
    """Every op that runs, except the lookup's own, which the two libraries name differently."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if "embedding" not in str(func):
            self.others.append(str(func))
        return func(*args, **(kwargs or {}))


def test_grad_is_the_buffer_that_the_kernel_wrote() -> None:
    written: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> object:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.embed_ext.embedding_dense_backward.default:
                written.append(out.data_ptr())
            return out

    _, ours = make_pair()
    loss = ours(some_indices()).sum()
    with Watch():
        loss.backward()
    assert written == [gradient(ours).data_ptr()]


def test_sparse_grad_is_the_buffer_that_the_kernel_wrote() -> None:
    written: list[tuple[int, int]] = []
    _, ours = make_pair(sparse=True)
    out = ours(some_indices())
    assert out.grad_fn is not None
    out.grad_fn.register_hook(
        lambda grads, _: written.append(
            (grads[0]._indices().data_ptr(), grads[0]._values().data_ptr())
        )
    )
    out.sum().backward()
    grad = gradient(ours)
    assert written == [(grad._indices().data_ptr(), grad._values().data_ptr())]


def test_second_backward_adds_in_place() -> None:
    _, ours = make_pair()
    ours(some_indices()).sum().backward()
    kept = gradient(ours)
    first = kept.clone()
    ours(some_indices()).sum().backward()
    assert gradient(ours) is kept
    assert_close(kept, 2 * first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_has_the_strides_that_torch_gives_it(layout: str) -> None:
    grads = []
    for function in (stock, lambda w, i: embed_ext.functional.embedding(i, w)):
        weight = LAYOUTS[layout](make_table(NUM_ROWS, WIDTH)).detach().requires_grad_()
        function(weight, some_indices()).pow(2).sum().backward()
        assert weight.grad is not None
        grads.append(weight.grad)
    assert grads[1].stride() == grads[0].stride()
    assert_close(grads[1], grads[0])


def test_backward_into_chosen_inputs() -> None:
    results = []
    for table in make_pair():
        other = torch.ones(WIDTH, requires_grad=True)
        loss = (table(some_indices()) * other).pow(2).sum()
        loss.backward(inputs=[other], retain_graph=True)
        assert table.weight.grad is None
        loss.backward(inputs=[table.weight])
        results.append((gradient(table), other.grad))
    torch.testing.assert_close(results[1], results[0])


def test_autograd_grad_leaves_dot_grad_alone() -> None:
    theirs, ours = make_pair()
    grads = [
        torch.autograd.grad(t(some_indices()).pow(2).sum(), t.weight)[0] for t in (theirs, ours)
    ]
    assert ours.weight.grad is None
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("sparse", [False, True])
def test_backward_runs_no_op_that_torch_does_not_run(sparse: bool) -> None:
    logs = []
    for table in make_pair(sparse=sparse):
        loss = table(some_indices()).sum()
        with Calls() as calls:
            loss.backward()
        logs.append(calls.others)
    assert set(logs[1]) <= set(logs[0])
    # The mode itself holds a sparse gradient's parts, so that torch copies them under it.
    copies = [[call for call in log if "copy" in call or "clone" in call] for log in logs]
    assert len(copies[1]) <= len(copies[0]) == int(sparse)
