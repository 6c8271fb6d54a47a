"""torch.library.opcheck: schema, autograd registration, fake tensors, AOT dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.common import GRAD_DTYPES, INDEX_DTYPES, make_indices, make_table
from tests.ops.updates import METHODS, make_update

ops = torch.ops.embed_ext

SCHEMA_AND_SHAPES = ("test_schema", "test_autograd_registration", "test_faketensor")
EVERYTHING = (*SCHEMA_AND_SHAPES, "test_aot_dispatch_dynamic")

SHAPES = ((), (0,), (3, 4))


def check(op: Any, *args: Any, tests: tuple[str, ...] = EVERYTHING, **kwargs: Any) -> None:
    """Run opcheck and expect success of every test asked for."""
    result = torch.library.opcheck(op.default, args, kwargs, test_utils=tests)
    assert result == dict.fromkeys(tests, "SUCCESS")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_embedding(device: str, shape: tuple[int, ...], requires_grad: bool) -> None:
    weight = make_table(9, 4, device=device).requires_grad_(requires_grad)
    check(ops.embedding, weight, make_indices(shape, 9, device=device), 2, True)


@pytest.mark.parametrize("dtype", [*GRAD_DTYPES, torch.int8], ids=str)
def test_embedding_dtypes(device: str, dtype: torch.dtype) -> None:
    weight = make_table(9, 4, dtype, device)
    weight.requires_grad_(dtype.is_floating_point or dtype.is_complex)
    check(ops.embedding, weight, make_indices((5,), 9, device=device))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_embedding_index_dtypes(device: str, index_dtype: torch.dtype) -> None:
    weight = make_table(9, 4, device=device).requires_grad_()
    check(ops.embedding, weight, make_indices((5,), 9, index_dtype, device))


def test_embedding_of_a_strided_table(device: str) -> None:
    weight = make_table(4, 9, device=device).t().requires_grad_()
    check(ops.embedding, weight, make_indices((2, 3), 9, device=device).t())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("padding_idx", "scale"), [(-1, False), (2, False), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_dense_backward(
    device: str, dtype: torch.dtype, padding_idx: int, scale: bool, shape: tuple[int, ...]
) -> None:
    indices = make_indices(shape, 9, device=device)
    grad = make_table(indices.numel(), 4, dtype, device).view(*shape, 4).requires_grad_()
    check(ops.embedding_dense_backward, grad, indices, 9, padding_idx, scale)


@pytest.fixture(scope="module")
def tests_of_recorded_sparse_outputs() -> tuple[str, ...]:
    """What torch's own op passes where the sparse output wants a gradient.

    Up to torch 2.13 that leaves out AOT dispatch, which makes an alias of such an output with
    aten.as_strided, and there is no kernel of that for SparseMeta.
    """
    op = torch.ops.aten.embedding_sparse_backward.default
    args = (torch.ones(2, 3, requires_grad=True), torch.tensor([0, 1]), 4, -1, False)
    (name,) = set(EVERYTHING) - set(SCHEMA_AND_SHAPES)
    result = torch.library.opcheck(op, args, test_utils=name, raise_exception=False)
    return EVERYTHING if result[name] == "SUCCESS" else SCHEMA_AND_SHAPES


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_sparse_backward(
    device: str,
    scale: bool,
    coalesced: bool,
    shape: tuple[int, ...],
    tests_of_recorded_sparse_outputs: tuple[str, ...],
) -> None:
    indices = make_indices(shape, 9, device=device)
    grad = make_table(indices.numel(), 4, device=device).view(*shape, 4)
    op, options = ops.embedding_sparse_backward, (9, -1, scale, coalesced)
    check(op, grad, indices, *options)
    check(op, grad.requires_grad_(), indices, *options, tests=tests_of_recorded_sparse_outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grad_add(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    indices = make_indices(shape, 9, device=device)
    grad = make_table(indices.numel(), 4, dtype, device).view(*shape, 4)
    for table_dtype in {dtype, torch.float32} - ({torch.float32} if dtype.is_complex else set()):
        check(ops.embedding_grad_add_, make_table(9, 4, table_dtype, device), grad, indices, 2)


def test_renorm(device: str) -> None:
    weight, indices = make_table(9, 4, device=device), make_indices((3, 4), 9, device=device)
    for max_norm, norm_type in ((1.0, 2.0), (100.0, 1.0)):
        check(ops.embedding_renorm_, weight.clone(), indices, max_norm, norm_type)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_updates(device: str, dtype: torch.dtype, name: str) -> None:
    for count in (0, 4):
        update = make_update(METHODS[name], 9, 4, count, dtype, device)
        arguments = (update.weight, *update.states, update.indices, update.values)
        for coalesced in (True, False):
            op = getattr(ops, update.method.op)
            check(op, *arguments, *update.method.options, coalesced=coalesced)
