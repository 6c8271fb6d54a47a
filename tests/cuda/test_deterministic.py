"""The dense backwards that add in order: exact, the same on every run, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.common import EMULATED, REAL_DTYPES, assert_same_bits, make_indices, make_table
from tests.cuda.common import DEVICE, WIDTHS, deterministic, needs_cuda, row_sums, whole_numbers

pytestmark = needs_cuda

ops = torch.ops.embed_ext

# How often a row occurs: around what a group of lanes and a tile take, and many tiles.
COUNTS = (0, 1, 2, 3, 63, 64, 65, 127, 128, 129, 191, 4095, 4096, 4097, 8191, 8192, 8200, 20_000)


TOKENS = (900, 4000)  # sorted by one block, and by many


def shuffled(indices: Tensor) -> Tensor:
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]


def indices_by_counts(lead: int) -> Tensor:
    """Row r + 1 COUNTS[r] times; row 0 `lead` times, which moves where the chunks are cut."""
    counts = torch.tensor((lead, *COUNTS))
    return shuffled(torch.repeat_interleave(torch.arange(len(counts)), counts))


@pytest.mark.parametrize("lead", [0, 1, 63, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_length_of_segment(dtype: torch.dtype, lead: int) -> None:
    indices = indices_by_counts(lead).to(DEVICE)
    grad = whole_numbers((len(indices), 5), dtype).to(DEVICE)
    num_rows = len(COUNTS) + 10
    with deterministic(True):
        actual = ops.embedding_dense_backward(grad, indices, num_rows)
    assert torch.equal(actual.double(), row_sums(grad, indices, num_rows))
    coalesced = ops.embedding_sparse_backward(grad, 3 * indices, 3 * num_rows, -1, False, True)
    assert torch.equal(coalesced.indices()[0], (3 * indices).unique())
    assert torch.equal(coalesced.values(), actual[indices.unique()])


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_every_width(dtype: torch.dtype, width: int, tokens: int, is_deterministic: bool) -> None:
    """float16 and bfloat16 hold every whole number that occurs here."""
    num_rows = 301
    indices = make_indices((tokens,), num_rows).to(DEVICE)
    indices[100:120] = 17
    grad = whole_numbers((len(indices), width), dtype).to(DEVICE)
    with deterministic(is_deterministic):
        actual = ops.embedding_dense_backward(grad, indices, num_rows, 3)
    expected = row_sums(grad, indices, num_rows)
    expected[3] = 0
    assert torch.equal(actual.double(), expected)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_rows_of_a_wider_gradient(tokens: int, is_deterministic: bool) -> None:
    """grad_output that starts off a vector's boundary, its rows further apart than long."""
    wide = whole_numbers((tokens, 70), torch.float32).to(DEVICE)
    indices = make_indices((tokens,), 40).to(DEVICE)
    for grad in (wide[:, 1:65], wide[:, 2:66], wide[:, 4:68], wide[:, ::2], wide[:, :1]):
        with deterministic(is_deterministic):
            actual = ops.embedding_dense_backward(grad, indices, 40)
        assert torch.equal(actual.double(), row_sums(grad, indices, 40))


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_same_bits_on_every_run(dtype: torch.dtype) -> None:
    width = 3 if EMULATED else 64  # where an access takes a hundred times as long as on a CPU
    indices = torch.cat([make_indices((20_000,), 3000), indices_by_counts(5)]).to(DEVICE)
    grad = make_table(len(indices), width, dtype, DEVICE)
    with deterministic(True):
        first = ops.embedding_dense_backward(grad, indices, 3000)
        for _ in range(1 if EMULATED else 5):
            assert_same_bits(ops.embedding_dense_backward(grad, indices, 3000), first)
        for _ in range(1 if EMULATED else 3):
            coalesced = ops.embedding_sparse_backward(grad, indices, 3000, -1, False, True)
            assert_same_bits(coalesced.to_dense(), first)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_error_against_float64(dtype: torch.dtype, scale: bool) -> None:
    """One rounding to the dtype, beside what adding in float32 (float64 for itself) costs."""
    indices = indices_by_counts(5).to(DEVICE)
    num_rows = len(COUNTS) + 1
    grad = make_table(len(indices), 64, dtype, DEVICE)
    with deterministic(True):
        actual = ops.embedding_dense_backward(grad, indices, num_rows, -1, scale).double()
    exact = row_sums(grad, indices, num_rows)
    magnitude = row_sums(grad.abs(), indices, num_rows)
    counts = torch.bincount(indices, minlength=num_rows).clamp(min=1)[:, None]
    if scale:
        exact, magnitude = exact / counts, magnitude / counts
    adding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # At most about 400 additions lie between any one term and the sum of 20,000: of a group, of
    # groups, and of tiles.
    bound = torch.finfo(dtype).eps * exact.abs() + 400 * adding * magnitude
    assert (actual - exact).abs().le(bound).all()


def test_low_precision_sums_do_not_stall() -> None:
    """100,000 ones: a bfloat16 running sum would stop at 256."""
    grad = torch.ones(100_000, 8, dtype=torch.bfloat16, device=DEVICE)
    indices = torch.zeros(100_000, dtype=torch.int64, device=DEVICE)
    actual = ops.embedding_dense_backward(grad, indices, 2)
    expected = torch.tensor([100_000.0, 0.0], device=DEVICE).bfloat16()
    assert torch.equal(actual, expected[:, None].expand(2, 8))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    "op",
    [
        lambda grad, indices: ops.embedding_dense_backward(grad, indices, 301),
        lambda grad, indices: ops.embedding_sparse_backward(grad, indices, 301, coalesced=True),
        lambda grad, indices: ops.embedding_sparse_backward(grad, indices, 301),
        lambda grad, indices: ops.embedding(grad, indices % len(grad)),
    ],
    ids=["dense", "coalesced", "sparse", "forward"],
)
def test_nothing_is_filled(op: Callable[[Tensor, Tensor], Tensor], tokens: int) -> None:
    """Torch fills whatever at::empty() makes; what the kernels write whole need not be."""
    indices = make_indices((tokens,), 301).to(DEVICE)
    grad = make_table(tokens, 8, device=DEVICE)
    activities = [ProfilerActivity.CPU]
    with deterministic(True), profile(activities=activities, record_shapes=True) as recorded:
        op(grad, indices)
    fills = [event.input_shapes[0] for event in recorded.events() if event.name == "aten::fill_"]
    assert all(0 in shape for shape in fills)  # of a sparse tensor's empty beginnings
