"""What is measured: a case is a table, a number of tokens and a distribution of indices."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT16_SAFE_SUM = 2**15


@dataclass(frozen=True)
class Case:
    """One lookup: ``tokens`` indices into a table of ``num_embeddings`` rows."""

    num_embeddings: int
    embedding_dim: int
    tokens: int
    distribution: str = "uniform"
    dtype: str = "float32"
    index_dtype: str = "int64"

    @property
    def name(self) -> str:
        table = f"{self.num_embeddings}x{self.embedding_dim}"
        parts = [table, str(self.tokens), self.distribution, self.dtype]
        return "/".join(parts if self.index_dtype == "int64" else [*parts, self.index_dtype])

    @property
    def padding_idx(self) -> int | None:
        return 0 if self.distribution == "half-padding" else None

    @property
    def torch_dtype(self) -> torch.dtype:
        return resolve_dtype(self.dtype)

    @property
    def table_bytes(self) -> int:
        return self.num_embeddings * self.embedding_dim * self.torch_dtype.itemsize

    @property
    def output_bytes(self) -> int:
        return self.tokens * self.embedding_dim * self.torch_dtype.itemsize

    @property
    def working_bytes(self) -> int:
        """Memory that a run of this case needs, the float64 reference included."""
        float64_copies = 3 * 8 // self.torch_dtype.itemsize
        return 3 * self.table_bytes + (3 + float64_copies) * self.output_bytes


def resolve_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not the name of a torch dtype, such as 'float32'")
    return dtype


# Draws indices [batches, tokens] on the generator's device.
Distribution = Callable[[int, tuple[int, int], torch.Generator], Tensor]


def _uniform(num_embeddings: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(num_embeddings, shape, generator=generator, device=generator.device)


def _zipf(exponent: float, *, scattered: bool = True) -> Distribution:
    def sample(num_embeddings: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        device = generator.device
        ranks = torch.arange(1, num_embeddings + 1, dtype=torch.float64, device=device)
        cumulative = ranks.pow_(-exponent).cumsum_(0)
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
        rank = torch.searchsorted(cumulative, drawn.mul_(cumulative[-1]))
        rank.clamp_(max=num_embeddings - 1)
        if not scattered:  # as in a vocabulary that was written down by frequency
            return rank
        # Frequent rows of a hashed vocabulary are not neighbours in memory.
        order = torch.randperm(num_embeddings, generator=generator, device=device)
        return order[rank]

    return sample


def _all_same(num_embeddings: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    row = _uniform(num_embeddings, (shape[0], 1), generator)
    return row.expand(shape).contiguous()


def _sorted(num_embeddings: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return _uniform(num_embeddings, shape, generator).sort(dim=1).values


def _half_padding(
    num_embeddings: int, shape: tuple[int, int], generator: torch.Generator
) -> Tensor:
    device, first = generator.device, min(1, num_embeddings - 1)
    indices = torch.randint(first, num_embeddings, shape, generator=generator, device=device)
    order = torch.rand(shape, generator=generator, device=device).argsort(dim=1)
    return indices.masked_fill_(order < shape[1] // 2, 0)


DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": _uniform,
    "zipf": _zipf(1.05),
    "zipf-1.2": _zipf(1.2),
    "zipf-sorted": _zipf(1.05, scattered=False),
    "all-same": _all_same,
    "sorted": _sorted,
    "half-padding": _half_padding,
}


def _generator(device: str, seed: int, *key: object) -> torch.Generator:
    """A generator of its own for each key, so that a filter on cases changes no case's data.

    A GPU draws its own numbers: a table of many GB would take the CPU longer than the measurement.
    """
    return torch.Generator(device).manual_seed(zlib.crc32(repr((seed, *key)).encode()))


def make_indices(
    case: Case, batches: int, seed: int, device: str = "cpu", *purpose: object
) -> list[Tensor]:
    """``batches`` index tensors [tokens]: a training loop never looks up one batch twice."""
    key = (case.num_embeddings, case.tokens, case.distribution, *purpose)
    generator = _generator(device, seed, *key)
    sample = DISTRIBUTIONS[case.distribution]
    indices = sample(case.num_embeddings, (batches, case.tokens), generator)
    return list(indices.to(resolve_dtype(case.index_dtype)))


@functools.lru_cache(maxsize=1)
def make_weight(
    num_embeddings: int, embedding_dim: int, dtype: torch.dtype, device: str, seed: int
) -> Tensor:
    """A table [num_embeddings, embedding_dim], kept while consecutive cases share it."""
    generator = _generator(device, seed, "weight", num_embeddings, embedding_dim)
    weight = torch.randn(num_embeddings, embedding_dim, generator=generator, device=device)
    return weight.to(dtype)


@dataclass(frozen=True)
class CaseData:
    """The tensors of a case; every provider gets the same ones."""

    case: Case
    weight: Tensor  # [num_embeddings, embedding_dim]
    batches: list[Tensor]  # each [tokens]
    grad_output: Tensor  # [tokens, embedding_dim]


def make_data(case: Case, *, batches: int, device: str, seed: int) -> CaseData:
    generator = _generator(device, seed, "grad_output", case.tokens, case.embedding_dim)
    # All of one sign, because sums that cancel would hide a loss of low-precision bits, and small
    # enough for float16 to hold their sum when every token names the same row.
    shape = (case.tokens, case.embedding_dim)
    grad_output = torch.rand(shape, generator=generator, device=device).add_(0.5)
    grad_output.mul_(min(1.0, FLOAT16_SAFE_SUM / max(1, case.tokens)))
    return CaseData(
        case=case,
        weight=make_weight(case.num_embeddings, case.embedding_dim, case.torch_dtype, device, seed),
        # Each in memory of its own, as batches are.
        batches=[indices.clone() for indices in make_indices(case, batches, seed, device)],
        grad_output=grad_output.to(case.torch_dtype),
    )
