"""Routing nn.functional.embedding: who is reached, who is not, and that nothing stays behind."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from embed_ext import route, routed
from embed_ext.routing import is_routed
from tests.common import assert_close, make_table
from tests.swapping import INDICES, Scaled

STOCK = F.embedding
NARROW = INDICES.to(torch.int16)  # which PyTorch's lookup refuses


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    """Whatever a test did, PyTorch is as it was afterwards."""
    assert F.embedding is STOCK
    yield
    route(False)
    assert F.embedding is STOCK and not is_routed()


def takes_narrow(table: Callable[[Tensor], Tensor] | None = None) -> bool:
    """Whether this project's op serves: the only one that takes int16."""
    try:
        (table or nn.Embedding(5, 3))(NARROW)
    except RuntimeError:
        return False
    return True


# The switches.


def test_context_and_switch() -> None:
    assert not takes_narrow()
    with routed():
        assert takes_narrow() and is_routed()
    assert not takes_narrow() and F.embedding is STOCK
    route(True)
    route(True)
    assert takes_narrow()
    route(False)
    assert not takes_narrow() and F.embedding is STOCK


def test_innermost_context_decides() -> None:
    with routed():
        with routed(False):
            assert not takes_narrow()
            with routed():
                assert takes_narrow()
            assert not takes_narrow()
        assert takes_narrow()
    route(True)
    with routed(False):
        assert not takes_narrow()
    assert takes_narrow()


def test_error_restores() -> None:
    with pytest.raises(ZeroDivisionError), routed():
        _ = 1 / 0
    assert not is_routed()
    with routed():
        with pytest.raises(IndexError, match="embedding: index out of range"):
            nn.Embedding(5, 3)(torch.tensor([5]))
        assert is_routed()


def test_context_is_a_decorator() -> None:
    @routed()
    def function() -> bool:
        return takes_narrow()

    assert function() and function() and not takes_narrow()


def test_context_is_of_its_thread_and_the_switch_of_all() -> None:
    with ThreadPoolExecutor(1) as other:
        with routed():
            assert takes_narrow() and not other.submit(takes_narrow).result()
            other.submit(route, True).result()
            assert other.submit(takes_narrow).result()
        assert takes_narrow()
        with routed(False):
            assert not takes_narrow() and other.submit(takes_narrow).result()


def test_threads_that_come_and_go() -> None:
    start = threading.Barrier(4)

    def work(number: int) -> bool:
        start.wait()
        right = True
        for turn in range(50):
            with routed(enabled=(number + turn) % 2 == 0):
                right &= takes_narrow() == ((number + turn) % 2 == 0)
            right &= not is_routed()
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_signature_is_torchs() -> None:
    with routed():
        assert F.embedding is not STOCK
        theirs, ours = inspect.signature(STOCK), inspect.signature(F.embedding)
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]


def test_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with routed():
            nn.Embedding(5, 3)(INDICES)


# Who is reached.


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"max_norm": 1.0}, {"sparse": True}])
def test_values_and_gradients(options: dict[str, Any]) -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        table = Scaled(5, 3, **options)
        with routed(enabled):
            out = table(INDICES)
        out.square().sum().backward()
        results.append((out, table.weight.grad.to_dense()))
    assert_close(results[1][0], results[0][0])
    assert "max_norm" in options or torch.equal(results[0][0], results[1][0])
    assert_close(results[1][1], results[0][1])


def test_gradient_keeps_the_formula_of_its_forward() -> None:
    table = nn.Embedding(5, 3)
    with routed():
        ours = table(INDICES)
    assert ours.grad_fn.name() == "embed_ext::EmbeddingBackward"
    assert table(INDICES).grad_fn.name() == "EmbeddingBackward0"


def test_direct_calls_are_reached_and_earlier_names_are_not() -> None:
    weight = make_table(5, 3)
    with routed():
        assert torch.equal(F.embedding(NARROW, weight=weight), weight[INDICES])
        with pytest.raises(RuntimeError):
            STOCK(NARROW, weight)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_outside_of_the_context(use_reentrant: bool) -> None:
    grads = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3))
        with routed(enabled):
            scale = torch.ones((), requires_grad=True)
            out = checkpoint(
                lambda scale, m=model: m(INDICES) * scale, scale, use_reentrant=use_reentrant
            )
        out.square().sum().backward()
        grads.append(model[0].weight.grad)
    assert_close(grads[1], grads[0])


def test_torchscript_compiles_torchs_lookup_and_trace_records_ours() -> None:
    class Fresh(nn.Embedding):  # nn.Embedding itself may have been compiled before
        pass

    table = Fresh(5, 3)
    with routed():
        scripted = torch.jit.script(table)
        traced = torch.jit.trace(table, (INDICES,))
    assert torch.equal(scripted(INDICES), table(INDICES))
    assert not takes_narrow(scripted)
    assert "embed_ext::embedding" in str(traced.graph)


# Who falls through.


class Named(Tensor):
    """A subclass that notes which functions it is given."""

    seen: list[Any] = []

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        cls.seen.append((func, len(args), sorted(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclass_is_given_torchs_function_and_lookup() -> None:
    weight = make_table(5, 3).as_subclass(Named)
    F.embedding(INDICES, weight)
    expected = Named.seen.pop()
    assert expected[0] is STOCK
    for enabled in (True, False):
        Named.seen.clear()
        with routed(), routed(enabled):
            out = F.embedding(INDICES, weight)
        assert Named.seen[0] == expected
        assert torch.equal(out.as_subclass(Tensor), weight.as_subclass(Tensor)[INDICES])


def test_wrapper_without_rules_is_served_by_torch() -> None:
    weight = TwoTensor(make_table(5, 3), make_table(5, 3, seed=1))
    with routed():
        out: Any = F.embedding(INDICES, weight)
        assert torch.equal(out.a, weight.a[INDICES]) and torch.equal(out.b, weight.b[INDICES])
        with pytest.raises(RuntimeError):  # torch's own, which takes no int16
            F.embedding(NARROW, weight)


def test_what_the_ops_do_not_take_gets_torchs_result_or_error() -> None:
    sparse = make_table(5, 3).to_sparse()
    with routed():
        assert torch.equal(
            F.embedding(INDICES[0], sparse).to_dense(), sparse.to_dense()[INDICES[0]]
        )
    for arguments in [(INDICES.float(), make_table(5, 3)), ([1, 2], make_table(5, 3))]:
        errors = []
        for enabled in (False, True):
            with routed(enabled), pytest.raises((RuntimeError, TypeError)) as caught:
                F.embedding(*arguments)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_fake_tensors_are_taken() -> None:
    with FakeTensorMode(), routed():
        assert F.embedding(torch.zeros(4, dtype=torch.int16), torch.zeros(5, 3)).shape == (4, 3)


def test_symbolic_trace_records_torchs_function() -> None:
    class Functional(nn.Module):
        def forward(self, input: Tensor, weight: Tensor) -> Tensor:
            return F.embedding(input, weight)

    with routed():
        graph = fx.symbolic_trace(Functional())
        assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [STOCK]
    assert torch.equal(graph(INDICES, make_table(5, 3)), make_table(5, 3)[INDICES])


class FunctionLog(TorchFunctionMode):
    """Notes the functions that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def test_mode_sees_the_function_of_that_name() -> None:
    with routed(), FunctionLog() as log:
        assert takes_narrow(lambda indices: F.embedding(indices, torch.zeros(5, 3)))
        assert F.embedding in log.calls
    with FunctionLog() as log:
        nn.Embedding(5, 3)(INDICES)
    assert STOCK in log.calls
