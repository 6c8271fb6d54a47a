"""DTensor: every placement of table and indices, next to the lookup in one process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import embed_ext
from tests.common import INDEX_DTYPES, REAL_DTYPES, assert_close, make_indices, make_table
from tests.distributed.common import mesh, place, run_ranks, whole

from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard  # isort: skip

# 10 rows and 5 columns do not divide evenly among 2 or 4 ranks, and 3 rows leave one without any.
SHAPES = {"uneven": (10, 5), "few": (3, 5)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "padding_last": {"padding_idx": 2},
    "scaled": {"scale_grad_by_freq": True},
    "scaled_padding": {"padding_idx": 1, "scale_grad_by_freq": True},
}


def single(table: Tensor, indices: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Output [..., D] and gradient [V, D] of torch's lookup, without any distribution."""
    weight = table.clone().requires_grad_()
    out = F.embedding(indices.long(), weight, **options)
    out.backward(grad)
    return out.detach(), weight.grad


def direct(indices: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """The op, without this library's Python around it."""
    padding_idx = options.get("padding_idx", -1)
    return torch.ops.embed_ext.embedding(
        weight,
        indices,
        padding_idx,
        options.get("scale_grad_by_freq", False),
    )


LOOKUPS: tuple[Callable[..., Any], ...] = (embed_ext.functional.embedding, direct)


def check_placements(mesh_shape: tuple[int, ...], shape: tuple[int, int]) -> None:
    ranks = mesh(*mesh_shape)
    table = make_table(*shape)
    indices = make_indices((8, 3), shape[0])
    grad = make_table(8 * 3, shape[1], seed=2).view(8, 3, shape[1])
    # All options on one dimension; on two, where there are nine times as many placements, two.
    names = list(OPTIONS) if ranks.ndim == 1 else ["padding", "scaled_padding"]
    expected = {name: single(table, indices, grad, **OPTIONS[name]) for name in names}
    placements = tuple(product((Replicate(), Shard(0), Shard(1)), repeat=ranks.ndim))
    for of_weight, of_indices, name in product(placements, placements, names):
        for lookup in LOOKUPS:
            what = f"{lookup.__name__}, {name}: {of_weight} {of_indices}"
            weight = place(table, ranks, *of_weight).requires_grad_()
            out = lookup(place(indices, ranks, *of_indices), weight, **OPTIONS[name])
            assert torch.equal(whole(out), expected[name][0]), what
            out.backward(place(grad, ranks, Replicate()))
            assert_close_gradient(weight.grad, expected[name][1], what)
            if lookup is not direct:  # a sharded table has its gradient sharded alike
                of_grad = placements_of(weight.grad)
                for table_dim, grad_dim in zip(of_weight, of_grad, strict=True):
                    assert not table_dim.is_shard() or grad_dim == table_dim, what


def placements_of(tensor: Tensor) -> tuple[Placement, ...]:
    assert isinstance(tensor, DTensor)
    return tensor.placements


def assert_close_gradient(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    torch.testing.assert_close(whole(actual), expected, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "mesh_shape", [(2,), (4,), pytest.param((2, 2), marks=pytest.mark.slow)], ids=str
)
def test_placements(mesh_shape: tuple[int, ...], shape: tuple[int, int]) -> None:
    run_ranks(check_placements, torch.Size(mesh_shape).numel(), mesh_shape, shape)


def check_backward_op() -> None:
    """The op of the backward by itself, with a gradient that is placed in each way."""
    ranks = mesh(2)
    indices = make_indices((8, 3), 10)
    grad = make_table(24, 5, seed=2).view(8, 3, 5)
    placed_grads = [place(grad, ranks, to) for to in (Replicate(), Shard(0), Shard(1), Shard(2))]
    share = grad / 4 if ranks.get_rank() == 0 else grad * 3 / 4
    placed_grads.append(DTensor.from_local(share, ranks, [Partial()]))
    for placed_grad, of_indices, scaled in product(
        placed_grads, (Replicate(), Shard(0), Shard(1)), (False, True)
    ):
        what = f"{placed_grad.placements} {of_indices} {scaled}"
        _, expected = single(
            make_table(10, 5), indices, grad, padding_idx=1, scale_grad_by_freq=scaled
        )
        actual = torch.ops.embed_ext.embedding_dense_backward(
            placed_grad, place(indices, ranks, of_indices), 10, 1, scale_grad_by_freq=scaled
        )
        assert_close_gradient(actual, expected, what)


def test_backward_op() -> None:
    run_ranks(check_backward_op, 2)


def check_one_rank_of_a_large_table() -> None:
    """A rank's gradient is as large as its part, through the module too."""
    ranks = mesh(4)
    table = embed_ext.Embedding(1000, 8)
    table.weight = nn.Parameter(place(table.weight.detach(), ranks, Shard(0)))
    table(place(torch.arange(1000), ranks, Replicate())).sum().backward()
    grad = table.weight.grad
    assert isinstance(grad, DTensor) and grad.placements == (Shard(0),)
    assert torch.equal(grad.to_local(), torch.ones(250, 8))


def test_gradient_is_as_large_as_the_part() -> None:
    run_ranks(check_one_rank_of_a_large_table, 4)


def check_dtypes() -> None:
    ranks = mesh(2)
    for dtype, (of_weight, of_indices) in product(
        INDEX_DTYPES,
        [(Shard(0), Shard(0)), (Shard(1), Shard(0)), (Replicate(), Shard(0))],
    ):
        # 300 rows: the second rank's begin at 150, and the small types cannot name all of them.
        table = make_table(300, 4)
        indices = make_indices((8, 3), 300, dtype)
        grad = make_table(24, 4, seed=2).view(8, 3, 4)
        out, grad_weight = single(table, indices, grad)
        part = indices.chunk(2)[ranks.get_rank()] if of_indices.is_shard() else indices
        placed = DTensor.from_local(part, ranks, [of_indices])
        for lookup in LOOKUPS:
            what = f"{lookup.__name__} {dtype} {of_weight} {of_indices}"
            weight = place(table, ranks, of_weight).requires_grad_()
            result = lookup(placed, weight)
            assert torch.equal(whole(result), out), what
            result.backward(place(grad, ranks, Replicate()))
            assert_close_gradient(weight.grad, grad_weight, what)
    for dtype in REAL_DTYPES:
        table = make_table(10, 4, dtype)
        indices = make_indices((6,), 10)
        grad = make_table(6, 4, dtype, seed=2)
        out, grad_weight = single(table, indices, grad)
        weight = place(table, ranks, Shard(0)).requires_grad_()
        result = embed_ext.functional.embedding(place(indices, ranks, Replicate()), weight)
        assert torch.equal(whole(result), out), dtype
        result.backward(place(grad, ranks, Replicate()))
        assert_close(whole(weight.grad), grad_weight)


def test_dtypes_of_indices_and_table() -> None:
    run_ranks(check_dtypes, 2)


def check_max_norm() -> None:
    ranks = mesh(2)
    indices = torch.tensor([[0, 7], [7, 2], [3, 9], [0, 0]])
    for of_weight, of_indices in product((Replicate(), Shard(0)), (Replicate(), Shard(0))):
        expected = make_table(10, 4)
        out = F.embedding(indices, expected, max_norm=1.0)
        weight = place(make_table(10, 4), ranks, of_weight)
        placed = place(indices, ranks, of_indices)
        result = embed_ext.functional.embedding(placed, weight, max_norm=1.0)
        assert_close(whole(result), out)
        assert_close(whole(weight), expected)
    weight = place(make_table(10, 4), ranks, Shard(1))
    with pytest.raises(RuntimeError, match="max_norm needs whole rows, but weight is placed as"):
        embed_ext.functional.embedding(placed, weight, max_norm=1.0)
    assert torch.equal(whole(weight), make_table(10, 4))


def test_max_norm_of_whole_rows() -> None:
    run_ranks(check_max_norm, 2)


def check_refusals() -> None:
    ranks = mesh(2)
    weight = place(make_table(10, 4), ranks, Shard(0)).requires_grad_()
    indices = place(torch.tensor([1, 9]), ranks, Replicate())
    one_sentence = "^embedding: the gradient of a DTensor cannot be sparse; use sparse=False$"
    with pytest.raises(RuntimeError, match=one_sentence):
        embed_ext.functional.embedding(indices, weight, sparse=True)
    with torch.no_grad():
        embed_ext.functional.embedding(indices, weight, sparse=True)
    out = torch.ops.embed_ext.embedding(weight, indices, -1, False, True)
    with pytest.raises(RuntimeError, match=one_sentence):
        whole(out).sum().backward()
    module = embed_ext.Embedding(10, 4, add_to_main_grad=True)
    module.weight = nn.Parameter(weight.detach())
    with pytest.raises(NotImplementedError, match="^add_to_main_grad: .*DTensor.* sharded table$"):
        module(indices)
    for lookup in LOOKUPS:
        with pytest.raises(
            RuntimeError, match="weight is a DTensor, but indices is a plain tensor"
        ):
            lookup(torch.tensor([1]), weight)
        with pytest.raises(
            RuntimeError, match="indices is a DTensor, but weight is a plain tensor"
        ):
            lookup(indices, make_table(10, 4))
        # A row that no rank has is an error on each of them, in the words of the whole table.
        for bad in (10, -1):
            with pytest.raises(IndexError, match=rf"indices\[1\] is {bad}, but weight has 10 rows"):
                lookup(place(torch.tensor([1, bad]), ranks, Replicate()), weight)

    # Rows that are split in another way than DTensor's would be taken for others.
    part = make_table(10, 4).split((7, 3))[ranks.get_rank()]
    weight = DTensor.from_local(part, ranks, [Shard(0)], shape=torch.Size((10, 4)), stride=(4, 1))
    for lookup in LOOKUPS:
        with pytest.raises(RuntimeError, match="expected 5 of weight's 10 rows on this rank"):
            lookup(indices, weight)


def test_refusals() -> None:
    run_ranks(check_refusals, 2)


def check_uses_of_the_result() -> None:
    """It can be used twice; its gradient says that it cannot be differentiated."""
    ranks = mesh(2)
    indices = make_indices((8,), 10)
    table = make_table(10, 4).requires_grad_()
    expected = F.embedding(indices, table)
    (expected.sin().sum() + expected.square().sum()).backward()
    for of_weight in (Replicate(), Shard(0), Shard(1)):
        weight = place(make_table(10, 4), ranks, of_weight).requires_grad_()
        out: Any = embed_ext.functional.embedding(place(indices, ranks, Replicate()), weight)
        one, other = (out.redistribute(placements=[to]) for to in (Replicate(), Shard(0)))
        loss = whole(one.sin().sum()) + whole(other.square().sum())
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        assert_close(whole(grad.detach()), table.grad)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            whole(grad.square().sum()).backward()


def test_uses_of_the_result() -> None:
    run_ranks(check_uses_of_the_result, 2)


def check_other_ways_in() -> None:
    ranks = mesh(2)
    table = make_table(10, 4)
    indices = make_indices((8,), 10)
    grad = make_table(8, 4, seed=2)
    expected, grad_weight = single(table, indices, grad)
    placed = place(indices, ranks, Replicate())
    for of_weight in (Replicate(), Shard(0), Shard(1)):
        weight = place(table, ranks, of_weight).requires_grad_()
        out = embed_ext.EmbeddingFunction.apply(weight, placed, -1, False, False)
        assert torch.equal(whole(out), expected)
        out.backward(place(grad, ranks, Replicate()))
        assert_close(whole(weight.grad), grad_weight)
        for lookup in LOOKUPS:
            with torch.inference_mode():
                assert torch.equal(whole(lookup(placed, weight)), expected)
    halves = DTensor.from_local(table / 2, ranks, [Partial()])  # a table that is still to be summed
    assert torch.equal(whole(embed_ext.functional.embedding(placed, halves)), expected)


def test_other_ways_in() -> None:
    run_ranks(check_other_ways_in, 2)
