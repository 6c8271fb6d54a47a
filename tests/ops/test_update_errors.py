"""What an update of rows turns down, in which words, and that it has written nothing then."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.common import assert_same_bits, bits
from tests.ops.updates import METHODS, Update, make_update

pytestmark = pytest.mark.usefixtures("reports_at_once")

every_method = pytest.mark.parametrize("name", METHODS)


def refuses(update: Update, error: type[Exception], *parts: str, untouched: bool = True) -> None:
    """The call raises this, with the op's name and these parts in its message, in this order."""
    before = [bits(written) for written in update.written]
    pattern = ".*".join(re.escape(part) for part in (f"{update.method.op}: ", *parts))
    with pytest.raises(error, match=f"(?s){pattern}"):
        update.run()
    if untouched:
        for written, old in zip(update.written, before, strict=True):
            assert_same_bits(bits(written), old)


@every_method
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([1, 1, 4], "expected indices in strictly ascending order, but indices[1] is 1"),
        ([3, 2, 4], "expected indices in strictly ascending order, but indices[1] is 2"),
        ([1, 4, 2], "expected indices in strictly ascending order, but indices[2] is 2"),
        ([-1, 2, 3], "index out of range: indices[0] is -1, but weight has 5 rows (0 to 4)"),
        ([0, 4, 5], "index out of range: indices[2] is 5, but weight has 5 rows (0 to 4)"),
        ([4, 5, 2**40], "index out of range: indices[1] is 5, but weight has 5 rows (0 to 4)"),
    ],
)
def test_indices(name: str, indices: list[int], message: str) -> None:
    update = make_update(METHODS[name], 5, 6, 3)
    refuses(replace(update, indices=torch.tensor(indices)), IndexError, message)


@every_method
def test_a_table_without_rows(name: str) -> None:
    update = make_update(METHODS[name], 0, 6, 0)
    one = replace(update, indices=torch.tensor([0]), values=torch.ones(1, 6))
    refuses(one, IndexError, "index out of range: indices[0] is 0, but weight has 0 rows")


@every_method
@pytest.mark.parametrize("position", [1, 70_000, 131_071, 131_072, 199_999])
def test_a_late_index_that_does_not_ascend(name: str, position: int) -> None:
    """Where several threads look."""
    update = make_update(METHODS[name], 200_000, 1, 200_000)
    update.indices[position] = update.indices[position - 1]
    refuses(update, IndexError, f"indices[{position}] is {position - 1} and the one before it")


Spoil = Callable[[Update], Update]

SPOILED: dict[str, tuple[Spoil, str]] = {
    "weight of one dimension": (
        lambda u: replace(u, weight=u.weight[0]),
        "'weight' must be 2-D, but it is 1-D",
    ),
    "integral weight": (
        lambda u: replace(u, weight=u.weight.int()),
        "expected weight of dtype float32, float64, bfloat16 or float16, but got Int",
    ),
    "indices of two dimensions": (
        lambda u: replace(u, indices=u.indices[None]),
        "'indices' must be 1-D, but it is 2-D",
    ),
    "narrow indices": (
        lambda u: replace(u, indices=u.indices.int()),
        "expected indices of dtype int64, but got Int",
    ),
    "other dtype": (
        lambda u: replace(u, values=u.values.double()),
        "expected values of weight's dtype, Float, but got Double",
    ),
    "values of three dimensions": (
        lambda u: replace(u, values=u.values[None]),
        "'values' must be 2-D, but it is 3-D",
    ),
    "other width": (
        lambda u: replace(u, values=u.values[:, 1:]),
        "expected values of shape (len(indices), embedding_dim), 3 x 6, but got [3, 5]",
    ),
    "other length": (
        lambda u: replace(u, values=u.values[1:]),
        "expected values of shape (len(indices), embedding_dim), 3 x 6, but got [2, 6]",
    ),
    "overlapping weight": (
        lambda u: replace(u, weight=u.weight[:1].expand(5, 6)),
        "expected a weight whose elements each have a memory location of their own",
    ),
    "values in the weight": (
        lambda u: replace(u, values=u.weight[:3]),
        "expected weight to share no memory with values, but it does",
    ),
}


@every_method
@pytest.mark.parametrize("fault", SPOILED)
def test_arguments(device: str, fault: str, name: str) -> None:
    spoil, message = SPOILED[fault]
    refuses(spoil(make_update(METHODS[name], 5, 6, 3, device=device)), RuntimeError, message)


def with_state(update: Update, change: Callable[[Tensor], Tensor]) -> Update:
    """The first state changed."""
    assert update.states[0] is not None
    return replace(update, states=(change(update.states[0]), *update.states[1:]))


@pytest.mark.parametrize("name", ["sgd, momentum", "adagrad", "row-wise adagrad", "adam"])
def test_states(device: str, name: str) -> None:
    update = make_update(METHODS[name], 5, 6, 3, device=device)
    state = {"sgd": "momentum_buffer", "ada": "sum", "row": "sum"}.get(name[:3], "exp_avg")
    state = "exp_avg" if name == "adam" else state
    for change, message in (
        (Tensor.double, "of dtype Float beside a weight of Float, but got Double"),
        (Tensor.bfloat16, "of dtype Float beside a weight of Float, but got BFloat16"),
        (lambda t: t[1:], "to have weight's 5 rows, but got 4"),
        (lambda t: t[None, None], "to be 2-D, as weight is"),
    ):
        refuses(with_state(update, change), RuntimeError, f"expected {state} {message}")
    shared = with_state(update, lambda t: update.weight if t.dim() == 2 else update.weight[:, 0])
    refuses(shared, RuntimeError, f"expected weight to share no memory with {state}, but it does")
    if name != "row-wise adagrad":
        narrow = with_state(update, lambda t: t[:, 1:])
        refuses(narrow, RuntimeError, f"expected {state} to have weight's 6 columns, but got 5")


def test_a_state_a_row_is_for_some(device: str) -> None:
    for name in ("sgd, momentum", "adam"):
        update = make_update(METHODS[name], 5, 6, 3, device=device)
        refuses(
            with_state(update, lambda t: t[:, 0].clone()),
            RuntimeError,
            "to be 2-D, as weight is, but it is 1-D",
        )


def test_a_low_precision_table_has_a_float32_state(device: str) -> None:
    update = make_update(METHODS["adagrad"], 5, 6, 3, torch.bfloat16, device)
    refuses(
        with_state(update, Tensor.bfloat16),
        RuntimeError,
        "expected sum of dtype Float beside a weight of BFloat16, but got BFloat16",
    )


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_seed_is_for_low_precision(device: str, dtype: torch.dtype, name: str) -> None:
    update = make_update(METHODS[name], 5, 6, 3, dtype, device)
    with pytest.raises(RuntimeError, match="a seed is for stochastic rounding to bfloat16 or"):
        update.run(seed=1)


@pytest.mark.parametrize("momentum", [0.9, -0.5, float("nan")])
def test_momentum_needs_a_buffer(device: str, momentum: float) -> None:
    update = make_update(METHODS["sgd, momentum"], 5, 6, 3, device=device)
    lr, decay, _, dampening = update.method.options
    method = replace(update.method, options=(lr, decay, momentum, dampening))
    update = replace(update, method=method, states=(None,))
    message = f"expected momentum 0 without a momentum_buffer, but got {momentum}"
    refuses(update, RuntimeError, message)
    on_meta = replace(update.map(lambda t: t.to("meta")), indices=update.indices.to("meta"))
    refuses(on_meta, RuntimeError, message, untouched=False)


@pytest.mark.parametrize("step", [0, -3])
def test_steps_are_counted_from_1(device: str, step: int) -> None:
    update = make_update(METHODS["adam"], 5, 6, 3, device=device)
    method = replace(update.method, options=(*update.method.options[:-1], step))
    refuses(replace(update, method=method), RuntimeError, f"expected step >= 1, but got {step}")


@every_method
def test_no_derivative(device: str, name: str) -> None:
    update = make_update(METHODS[name], 5, 6, 3, device=device)
    update.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad is being used in an"):
        update.run()
    with torch.no_grad():
        update.run()
    update.weight.requires_grad_(False)
    update.values.requires_grad_()
    refuses(update, RuntimeError, "has no derivative; call it under torch.no_grad()")


def test_no_tangent(device: str) -> None:
    from torch.autograd import forward_ad

    update = make_update(METHODS["sgd"], 5, 6, 3, device=device)
    with forward_ad.dual_level():
        dual = replace(update, values=forward_ad.make_dual(update.values, update.values))
        refuses(dual, RuntimeError, "has no derivative")
