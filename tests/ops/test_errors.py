"""Each rule of the argument checks: the exception's type, and that it names op, rule and value."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import embed_ext
from tests.common import INDEX_DTYPES, make_table, runs_cuda_kernels

pytestmark = pytest.mark.usefixtures("reports_at_once")

ops = torch.ops.embed_ext

ROWS, WIDTH = 5, 3


def forward(weight: Tensor, indices: Tensor) -> object:
    """weight [V, D], indices [...]."""
    return ops.embedding(weight, indices)


def dense_backward(weight: Tensor, indices: Tensor) -> object:
    """As a backward of the lookup would: grad_output [..., D] of the table's dtype and device."""
    grad = weight.new_zeros(*indices.shape, weight.size(-1))
    return ops.embedding_dense_backward(grad, indices, weight.size(0))


def sparse_backward(weight: Tensor, indices: Tensor) -> object:
    """As dense_backward."""
    grad = weight.new_zeros(*indices.shape, weight.size(-1))
    return ops.embedding_sparse_backward(grad, indices, weight.size(0))


def grad_add(weight: Tensor, indices: Tensor) -> object:
    """As dense_backward, with the table in grad_weight's place."""
    grad = weight.new_zeros(*indices.shape, weight.size(-1))
    return ops.embedding_grad_add_(weight, grad, indices)


def renorm(weight: Tensor, indices: Tensor) -> object:
    """weight [V, D], indices [...]."""
    return ops.embedding_renorm_(weight, indices, 1.0)


OPS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "embedding": forward,
    "embedding_dense_backward": dense_backward,
    "embedding_sparse_backward": sparse_backward,
    "embedding_grad_add_": grad_add,
    "embedding_renorm_": renorm,
}
BACKWARDS = ("embedding_dense_backward", "embedding_sparse_backward")

every_op = pytest.mark.parametrize("op", OPS)
every_backward = pytest.mark.parametrize("op", BACKWARDS)


def indices_of(values: object, dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
    """A tensor of these indices; written in int64 first, since not every dtype can be built."""
    return torch.tensor(values).to(dtype).to(device)


def raises(error: type[Exception], *parts: str) -> pytest.RaisesExc[Exception]:
    """Expect this exception with these parts in its message, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


@every_op
@pytest.mark.parametrize("bad", [ROWS, ROWS + 1, -1, -ROWS, 2**31, 2**32, 2**63 - 1, -(2**63)])
def test_index_outside_the_table(device: str, op: str, bad: int) -> None:
    """2**32 is row 0 to whoever cuts it to 32 bits."""
    weight = make_table(ROWS, WIDTH, device=device)
    with raises(
        IndexError, f"{op}: index out of range: indices[2] is {bad}, but weight has 5 rows (0 to 4)"
    ):
        OPS[op](weight, indices_of([0, 4, bad, 1], device=device))


@every_op
@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_largest_and_smallest_of_each_index_dtype(device: str, op: str, dtype: torch.dtype) -> None:
    weight = make_table(ROWS, WIDTH, device=device)
    limits = torch.iinfo(dtype)
    for bad in {limits.max, limits.min} - {0}:
        indices = indices_of([1, bad], dtype, device)
        with raises(IndexError, op, f"indices[1] is {bad},"):
            OPS[op](weight, indices)


@every_op
def test_position_is_the_callers(device: str, op: str) -> None:
    """Coordinates of the tensor as it was handed over, whatever its strides; 0-D has none."""
    weight = make_table(ROWS, WIDTH, device=device)
    indices = indices_of([[0, 1, 2], [3, 7, 0]], device=device)
    for view, position in (
        (indices, "[1, 1]"),
        (indices.t(), "[1, 1]"),
        (indices[1], "[1]"),
        (indices[:, 1:].expand(2, 2, 2)[:1], "[0, 1, 0]"),
        (indices[1, 1], "[]"),
    ):
        with raises(IndexError, op, f"indices{position} is 7,"):
            OPS[op](weight, view)


@every_op
def test_one_bad_index_of_several_is_named(device: str, op: str) -> None:
    """The first, on a GPU any one of them."""
    weight = make_table(ROWS, WIDTH, device=device)
    view = indices_of([[0, 1, 2], [3, 7, 0]], device=device)[:, 1:].expand(2, 2, 2)
    position = r"\[[01], 1, 0\]" if runs_cuda_kernels(device) else r"\[0, 1, 0\]"
    with pytest.raises(IndexError, match=rf"{op}: .*indices{position} is 7,"):
        OPS[op](weight, view)


@every_op
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_first_bad_position_whatever_the_threads(op: str, threads: int) -> None:
    before = torch.get_num_threads()
    weight = make_table(ROWS, WIDTH)
    indices = torch.zeros(600, 1000, dtype=torch.int64)
    indices[599, 999], indices[250, 7], indices[300, 0] = 11, 22, -33
    torch.set_num_threads(threads)
    try:
        with raises(IndexError, op, "indices[250, 7] is 22,"):
            OPS[op](weight, indices)
    finally:
        torch.set_num_threads(before)


@every_op
def test_indices_into_an_empty_table(device: str, op: str) -> None:
    with raises(IndexError, op, "index out of range", "indices[0] is 0", "0 rows"):
        OPS[op](torch.empty(0, WIDTH, device=device), indices_of([0], device=device))


@every_op
def test_a_table_without_columns_is_checked_too(device: str, op: str) -> None:
    with raises(IndexError, op, "indices[1] is 9"):
        OPS[op](torch.empty(ROWS, 0, device=device), indices_of([0, 9], device=device))


@every_backward
def test_bad_index_that_is_the_padding(device: str, op: str) -> None:
    """padding_idx hides no index that names no row."""
    grad = torch.ones(2, WIDTH, device=device)
    with raises(IndexError, op, "indices[1] is 9"):
        getattr(ops, op)(grad, indices_of([0, 9], device=device), ROWS, 9)


def test_renorm_writes_nothing_if_an_index_is_bad() -> None:
    weight = make_table(ROWS, WIDTH)
    before, version = weight.clone(), weight._version
    with raises(IndexError, "embedding_renorm_", "indices[3] is 5"):
        ops.embedding_renorm_(weight, torch.tensor([0, 1, 2, 5]), 1e-3)
    assert torch.equal(weight, before)
    assert weight._version == version


@every_op
@pytest.mark.parametrize("shape", [(2,), (0,), (0, 5), ()], ids=str)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bool, torch.complex64, torch.uint64],
    ids=str,
)
def test_index_dtype(device: str, op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The accepted ones are named, and the one that came; empty indices are no exception."""
    weight = make_table(ROWS, WIDTH, device=device)
    accepted = "int64, int32, int16, int8, uint8, uint16 or uint32"
    with raises(RuntimeError, op, accepted, "but got "):
        OPS[op](weight, torch.empty(shape, dtype=dtype, device=device))


@every_op
def test_sparse_indices(device: str, op: str) -> None:
    indices = torch.tensor([[0, 1]], device=device).to_sparse()
    with pytest.raises(RuntimeError, match=op):
        OPS[op](make_table(ROWS, WIDTH, device=device), indices)


@pytest.mark.parametrize("op", ["embedding", "embedding_renorm_"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)], ids=str)
def test_weight_is_not_two_dimensional(device: str, op: str, shape: tuple[int, ...]) -> None:
    with raises(RuntimeError, f"{op}: 'weight' must be 2-D, but it is {len(shape)}-D"):
        OPS[op](torch.zeros(shape, device=device), indices_of([0], device=device))


def test_weight_that_autograd_records_is_checked_alike(device: str) -> None:
    """The rank is looked at before the autograd formula asks for the number of rows."""
    weight = torch.zeros(4, requires_grad=True, device=device)
    with raises(RuntimeError, "embedding: 'weight' must be 2-D, but it is 1-D"):
        ops.embedding(weight, indices_of([0], device=device))


@every_op
def test_two_devices(op: str) -> None:
    """A mix with meta tensors too: torch returns memory that nobody wrote for some of these."""
    weight, indices = make_table(ROWS, WIDTH), torch.tensor([0, 1])
    argument = "grad_output" if op in (*BACKWARDS, "embedding_grad_add_") else "weight"
    with raises(RuntimeError, op, f"{argument} is on meta and indices is on cpu"):
        OPS[op](weight.to("meta"), indices)
    with raises(RuntimeError, op, f"{argument} is on cpu and indices is on meta"):
        OPS[op](weight, indices.to("meta"))


@every_op
def test_meta_tensors_obey_the_same_rules(op: str) -> None:
    weight = make_table(ROWS, WIDTH).to("meta")
    with raises(RuntimeError, op, "expected indices of dtype", "Float"):
        OPS[op](weight, torch.empty(2, device="meta"))


@every_backward
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_grad_dtype(device: str, op: str, dtype: torch.dtype) -> None:
    grad = torch.zeros(2, WIDTH, device=device).to(dtype)
    with raises(RuntimeError, op, "grad_output of a floating or complex dtype", "but got"):
        getattr(ops, op)(grad, indices_of([0, 1], device=device), ROWS)


@every_backward
@pytest.mark.parametrize("shape", [(), (2,), (3, WIDTH), (2, 1, WIDTH), (1, 2, WIDTH)], ids=str)
def test_grad_shape(device: str, op: str, shape: tuple[int, ...]) -> None:
    shown = str(list(shape))
    rule = "expected grad_output of shape indices.shape + (embedding_dim,)"
    with raises(RuntimeError, op, rule, f"grad_output is {shown} and indices is [2]"):
        getattr(ops, op)(torch.zeros(shape, device=device), indices_of([0, 1], device=device), ROWS)


@every_backward
def test_number_of_rows(device: str, op: str) -> None:
    grad = torch.zeros(2, WIDTH, device=device)
    with raises(RuntimeError, op, "num_weights >= 0", "-1"):
        getattr(ops, op)(grad, indices_of([0, 1], device=device), -1)


def test_gradient_too_large_for_any_machine() -> None:
    """An exception, not a crash, also where rows times columns no longer fit 64 bits."""
    grad, indices = torch.zeros(1, 4), torch.tensor([0])
    for num_weights in (2**45, 2**60, 2**62):
        with pytest.raises(RuntimeError):
            ops.embedding_dense_backward(grad, indices, num_weights)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_renorm_needs_a_norm(device: str, dtype: torch.dtype) -> None:
    weight = make_table(ROWS, WIDTH, dtype, device)
    with raises(RuntimeError, "embedding_renorm_", "weight of a floating or complex dtype"):
        renorm(weight, indices_of([0], device=device))


def test_renorm_needs_numbers(device: str) -> None:
    weight, indices = make_table(ROWS, WIDTH, device=device), indices_of([0], device=device)
    with raises(RuntimeError, "embedding_renorm_: expected max_norm to be a number", "nan"):
        ops.embedding_renorm_(weight, indices, float("nan"))
    with raises(RuntimeError, "embedding_renorm_: expected norm_type to be a number", "nan"):
        ops.embedding_renorm_(weight, indices, 1.0, float("nan"))


def test_renorm_has_no_gradient(device: str) -> None:
    """As in torch: on a leaf it is refused, under no_grad it runs."""
    weight = make_table(ROWS, WIDTH, device=device).requires_grad_()
    indices = indices_of([0], device=device)
    with raises(RuntimeError, "leaf Variable that requires grad"):
        renorm(weight, indices)
    with raises(RuntimeError, "embedding_renorm_", "has no derivative"):
        renorm(weight * 1, indices)
    with torch.no_grad():
        renorm(weight, indices)


@pytest.mark.skipif(
    embed_ext.build_info().cuda_archs is not None, reason="this build has CUDA kernels"
)
@every_op
def test_cuda_tensors_in_a_build_without_cuda(op: str) -> None:
    """One sentence that says what to do; dispatched by hand, for want of a CUDA tensor."""
    weight, indices = make_table(ROWS, WIDTH), torch.tensor([0, 1])
    arguments: dict[str, tuple[object, ...]] = {
        "embedding": (weight, indices),
        "embedding_dense_backward": (weight[:2], indices, ROWS),
        "embedding_sparse_backward": (weight[:2], indices, ROWS),
        "embedding_grad_add_": (weight, weight[:2].clone(), indices),
        "embedding_renorm_": (weight, indices, 1.0),
    }
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with raises(RuntimeError, op, "no CUDA kernels", "reinstall it", "or move the tensors"):
        getattr(ops, op).default.redispatch(cuda, *arguments[op])
