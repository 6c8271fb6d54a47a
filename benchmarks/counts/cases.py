"""What is counted: an op and a case of it, with the bytes that any implementation must move."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case, make_indices

# The dense backward's three kinds: by atomic adds where torch allows them, in an order that is
# always the same, and divided by how often a row occurs.
DENSE, DETERMINISTIC, SCALED = "dense", "dense-deterministic", "dense-scaled"
GATHER, GATHER_TRANSPOSED = "gather", "gather-transposed"
GRAD_ADD = "grad-add"  # of low precision to a float32 table
SPARSE, COALESCED = "sparse", "sparse-coalesced"
RENORM = "renorm"

INDEX_BYTES = 8
PERMUTATION = "permutation"  # no row twice


@dataclass(frozen=True)
class CountedCase:
    op: str
    case: Case

    @property
    def name(self) -> str:
        return f"{self.op} {self.case.name}"

    @property
    def row_bytes(self) -> int:
        return self.case.embedding_dim * self.case.torch_dtype.itemsize

    def indices(self) -> Tensor:
        """[tokens] int64, the same in every run."""
        if self.case.distribution == PERMUTATION:
            generator = torch.Generator().manual_seed(0)
            return torch.randperm(self.case.num_embeddings, generator=generator)[: self.case.tokens]
        return make_indices(self.case, 1, seed=0)[0]

    def ideal_bytes(self, indices: Tensor) -> int:
        """What must be read and written once, of this op and this way to do it."""
        case, row = self.case, self.row_bytes
        padding = -1 if case.padding_idx is None else case.padding_idx
        kept = indices[indices != padding]
        tokens, used, table = kept.numel(), len(set(kept.tolist())), case.num_embeddings * row
        index = INDEX_BYTES * case.tokens
        if self.op in (GATHER, GATHER_TRANSPOSED):
            return 2 * case.tokens * row + index
        if self.op == RENORM:
            return 2 * used * row + index
        if self.op == GRAD_ADD:
            return tokens * row + used * case.embedding_dim * torch.float32.itemsize + index
        if self.op in (SPARSE, COALESCED):
            entries = used if self.op == COALESCED else tokens
            return tokens * row + entries * (row + INDEX_BYTES) + index
        added = used * row if self.adds_atomically else 0  # to zeros that were written before
        return table + tokens * row + added + index

    @property
    def adds_atomically(self) -> bool:
        return self.op == DENSE and self.case.torch_dtype.itemsize >= torch.float32.itemsize

    def prepare(self, indices: Tensor) -> Callable[[], object]:
        """The call that is counted, its tensors made."""
        ops, case = torch.ops.embed_ext, self.case
        rows, width, dtype = case.num_embeddings, case.embedding_dim, case.torch_dtype
        padding = -1 if case.padding_idx is None else case.padding_idx
        if self.op == GATHER:
            weight = torch.zeros(rows, width, dtype=dtype)
            return lambda: ops.embedding(weight, indices)
        if self.op == GATHER_TRANSPOSED:
            columns = torch.zeros(width, rows, dtype=dtype)
            return lambda: ops.embedding(columns.t(), indices)
        if self.op == RENORM:
            ones = torch.ones(rows, width, dtype=dtype)  # every norm is above the limit
            return lambda: ops.embedding_renorm_(ones, indices, 0.5, 2.0)
        grad = torch.zeros(case.tokens, width, dtype=dtype)
        if self.op == GRAD_ADD:
            table = torch.zeros(rows, width)
            return lambda: ops.embedding_grad_add_(table, grad, indices, padding)
        if self.op in (SPARSE, COALESCED):
            coalesced = self.op == COALESCED
            return lambda: ops.embedding_sparse_backward(
                grad, indices, rows, padding, False, coalesced
            )
        scaled = self.op == SCALED
        return lambda: ops.embedding_dense_backward(grad, indices, rows, padding, scaled)


NARROW = (1, 4, 16, 50, 64, 65, 100, 128)
WIDE = (256, 300, 512, 513, 1024)
SPREAD = ("uniform", "zipf-sorted", "all-same")


def _gathers() -> Iterator[CountedCase]:
    for dtype in ("float32", "bfloat16"):
        for width in (*NARROW, *WIDE, 4096):
            tokens = 4096 if width <= 128 else 512
            yield CountedCase(GATHER, Case(4000, width, tokens, dtype=dtype))
    yield CountedCase(GATHER_TRANSPOSED, Case(4000, 64, 4096))


def _atomic() -> Iterator[CountedCase]:
    for width in (*NARROW, *WIDE):
        yield CountedCase(DENSE, Case(4000, width, 4096))
    for distribution in ("zipf-sorted", "all-same", PERMUTATION):
        yield CountedCase(DENSE, Case(4096, 64, 4096, distribution))
    yield CountedCase(DENSE, Case(4000, 64, 4096, dtype="float64"))
    yield CountedCase(DENSE, Case(4000, 64, 16_384, "zipf-sorted"))
    for width in (64, 65):
        yield CountedCase(GRAD_ADD, Case(4000, width, 4096, dtype="bfloat16"))


def _low_precision() -> Iterator[CountedCase]:
    for tokens, distribution in itertools.product((64, 512, 2048), SPREAD):
        widths = (16, 64, 65, 256, 4096) if tokens == 64 else (16, 64, 65, 256)
        for width in widths:
            yield CountedCase(DENSE, Case(4000, width, tokens, distribution, "bfloat16"))
    for tokens, distribution in itertools.product((2049, 4096, 8192, 16_384), SPREAD):
        for width in (1, 8, 16, 32, 64, 65, 100, 128, 256, 1024):
            yield CountedCase(DENSE, Case(4000, width, tokens, distribution, "bfloat16"))
        for width in (16, 64, 65, 256):
            yield CountedCase(DENSE, Case(40_000, width, tokens, distribution, "bfloat16"))


def _ordered() -> Iterator[CountedCase]:
    for width in (16, 64, 65, 256):
        yield CountedCase(DETERMINISTIC, Case(4000, width, 8192, "zipf-sorted"))
    yield CountedCase(SCALED, Case(4000, 64, 8192, "zipf-sorted"))
    yield CountedCase(SCALED, Case(4000, 64, 8192, "zipf-sorted", "bfloat16"))


def _others() -> Iterator[CountedCase]:
    for op, distribution in itertools.product(
        (SPARSE, COALESCED), ("uniform", "zipf-sorted", "half-padding")
    ):
        yield CountedCase(op, Case(4000, 64, 4096, distribution))
    yield CountedCase(COALESCED, Case(4000, 64, 4096, "zipf-sorted", "bfloat16"))
    for width, tokens in ((64, 4096), (512, 4096), (4096, 512)):
        yield CountedCase(RENORM, Case(4000, width, tokens))


CASES: Sequence[CountedCase] = (
    *_gathers(),
    *_atomic(),
    *_low_precision(),
    *_ordered(),
    *_others(),
)


def select(patterns: Sequence[str]) -> list[CountedCase]:
    """The cases whose names match any of the patterns; all where there are none."""
    globs = [f"*{pattern}*" for pattern in patterns or [""]]
    return [c for c in CASES if any(fnmatch.fnmatchcase(c.name, glob) for glob in globs)]
