"""Updates by a gradient that is not coalesced: as by its sums, which never are all in memory."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.common import REAL_DTYPES, assert_close, assert_same_bits, generator, make_table
from tests.ops.updates import METHODS, Update, make_update

ops = torch.ops.embed_ext
every_method = pytest.mark.parametrize("name", METHODS)
every_dtype = pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)


def with_entries(update: Update, indices: Tensor) -> Update:
    """The same with other entries, in any order and several of a row."""
    weight = update.weight
    values = make_table(indices.numel(), weight.size(1), weight.dtype, str(weight.device), seed=9)
    return replace(update, indices=indices.to(weight.device), values=values)


def summed(update: Update) -> Update:
    """The same by a coalesced gradient."""
    sums = ops.embedding_sparse_backward(
        update.values, update.indices, len(update.weight), coalesced=True
    )
    return replace(update.clone(), indices=sums._indices()[0], values=sums._values())


def check(update: Update) -> None:
    """As by the sums: to the bit, and to the reference."""
    coalesced = summed(update)
    expected = coalesced.run_reference()
    results = update.run(coalesced=False), coalesced.run()
    for actual, same, wanted in zip(*results, expected, strict=True):
        assert_same_bits(actual, same)
        assert_close(actual, wanted)


def random_rows(count: int, num_rows: int, seed: int = 0) -> Tensor:
    return torch.randint(num_rows, (count,), generator=generator(seed))


@every_method
@every_dtype
@pytest.mark.parametrize(
    ("num_rows", "width", "count"),
    [(50, 33, 90), (6000, 24, 8000)],  # the second for several threads, each with several tiles
)
def test_rows_of_several_entries(
    device: str, num_rows: int, width: int, count: int, dtype: torch.dtype, name: str
) -> None:
    update = make_update(METHODS[name], num_rows, width, 0, dtype, device)
    check(with_entries(update, random_rows(count, num_rows)))


@every_method
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_entries(device: str, name: str, count: int) -> None:
    check(with_entries(make_update(METHODS[name], 4, 5, 0, device=device), random_rows(count, 4)))


@every_method
def test_a_row_of_very_many_entries(device: str, name: str) -> None:
    indices = random_rows(5000, 40)
    indices[::2] = 7
    check(with_entries(make_update(METHODS[name], 40, 17, 0, device=device), indices))


@every_method
def test_a_row_that_is_wider_than_a_tile(device: str, name: str) -> None:
    update = make_update(METHODS[name], 5, 20_000, 0, device=device)
    check(with_entries(update, torch.tensor([4, 1, 4, 0, 4])))


@every_method
@pytest.mark.parametrize(("num_rows", "width"), [(0, 4), (7, 0)])
def test_empty_tables(device: str, name: str, num_rows: int, width: int) -> None:
    update = make_update(METHODS[name], num_rows, width, 0, device=device)
    update = with_entries(update, random_rows(3 if num_rows else 0, max(num_rows, 1)))
    before = update.clone()
    for actual, old in zip(update.run(coalesced=False), before.written, strict=True):
        assert_same_bits(actual, old)


@every_method
def test_entries_that_are_not_contiguous(device: str, name: str) -> None:
    update = with_entries(make_update(METHODS[name], 9, 6, 0, device=device), random_rows(8, 9))
    expected = update.clone().run(coalesced=False)
    strided = (
        replace(update.clone(), values=update.values.t().contiguous().t()),
        replace(update.clone(), values=torch.stack([update.values] * 2, 1)[:, 0]),
        replace(update.clone(), indices=torch.stack([update.indices] * 2, 1)[:, 0]),
    )
    for other in strided:
        for actual, wanted in zip(other.run(coalesced=False), expected, strict=True):
            assert_same_bits(actual, wanted)
    spread = replace(update.clone(), values=update.values[:1].expand(8, 6))
    written = replace(update.clone(), values=spread.values.contiguous()).run(coalesced=False)
    for actual, wanted in zip(spread.run(coalesced=False), written, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding(device: str, dtype: torch.dtype) -> None:
    update = make_update(METHODS["adam"], 300, 40, 0, dtype, device)
    update = with_entries(update, random_rows(500, 300))
    expected = summed(update).run(seed=5)
    for actual, wanted in zip(update.run(seed=5, coalesced=False), expected, strict=True):
        assert_same_bits(actual, wanted)


@every_method
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([4, 1, 4, 5], "index out of range: indices[3] is 5, but weight has 5 rows (0 to 4)"),
        ([-1, 4, 1], "index out of range: indices[0] is -1, but weight has 5 rows (0 to 4)"),
    ],
)
def test_a_bad_index_is_refused_before_anything_is_written(
    name: str, indices: list[int], message: str
) -> None:
    update = with_entries(make_update(METHODS[name], 5, 6, 0), torch.tensor(indices))
    before = update.clone()
    with pytest.raises(IndexError, match=re.escape(f"{update.method.op}: {message}")):
        update.run(coalesced=False)
    for actual, old in zip(update.written, before.written, strict=True):
        assert_same_bits(actual, old)


@every_method
def test_meta_tensors_are_checked_alike(name: str) -> None:
    update = with_entries(make_update(METHODS[name], 5, 6, 0), torch.tensor([4, 1, 4]))
    placeholder = replace(update.map(lambda t: t.to("meta")), indices=update.indices.to("meta"))
    placeholder.run(coalesced=False)
    with pytest.raises(RuntimeError, match=rf"{update.method.op}: expected values of shape"):
        replace(placeholder, values=placeholder.values[:2]).run(coalesced=False)
