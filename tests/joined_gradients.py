"""Programs that use one table several times.

All numbers are integers, whose sums are exact in any order: a gradient is right or wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import embed_ext
from tests.common import generator, make_indices

ROWS, WIDTH, TOKENS = 60, 8, 25


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator(seed)).to(dtype)


class Indexed(nn.Embedding):
    """For complex tables, which F.embedding does not differentiate."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[input]


def make_tables(
    keep: bool = False, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[embed_ext.Embedding, nn.Embedding]:
    """Ours of the dtype, and torch's of the widest one of its kind, of equal values."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = integers(ROWS, WIDTH, dtype=wide)
    if dtype.is_complex:
        values = values + 1j * integers(ROWS, WIDTH, seed=1, dtype=wide)
    ours = embed_ext.Embedding(
        ROWS, WIDTH, _weight=values.to(dtype), keep_grad_buffer=keep, **options
    )
    theirs = Indexed if dtype.is_complex else nn.Embedding
    return ours, theirs(ROWS, WIDTH, _weight=values.clone(), **options)


def gradient(table: nn.Embedding) -> Tensor:
    assert table.weight.grad is not None
    return table.weight.grad


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def _sibling(table: nn.Embedding, indices: Tensor) -> Tensor:
    twin = embed_ext.Embedding(
        ROWS, WIDTH, table.padding_idx, scale_grad_by_freq=table.scale_grad_by_freq
    )
    twin.keep_grad_buffer = getattr(table, "keep_grad_buffer", False)
    twin.weight = table.weight
    return twin(indices)


def _function(table: nn.Embedding, indices: Tensor) -> Tensor:
    padding_idx = -1 if table.padding_idx is None else table.padding_idx
    return embed_ext.EmbeddingFunction.apply(
        table.weight, indices, padding_idx, table.scale_grad_by_freq
    )


def _through(function: Callable[..., Tensor], sparse: bool) -> Callable[..., Tensor]:
    return lambda table, indices: function(
        indices,
        table.weight,
        table.padding_idx,
        scale_grad_by_freq=table.scale_grad_by_freq,
        sparse=sparse,
    )


# (table, indices [...]) -> [..., D]
SPELLINGS: dict[str, Callable[[nn.Embedding, Tensor], Tensor]] = {
    "module": lambda table, indices: table(indices),
    "sibling": _sibling,
    "Function": _function,
    "functional": _through(embed_ext.functional.embedding, sparse=False),
    "stock": _through(F.embedding, sparse=False),
    "sparse": _through(embed_ext.functional.embedding, sparse=True),
    "stock sparse": _through(F.embedding, sparse=True),
}


class Uses:
    """The uses of one table in one program; each lookup has indices of its own."""

    def __init__(self, table: nn.Embedding, spellings: Sequence[str] = ("module",)) -> None:
        self.table, self.weight, self.spellings, self.seed = table, table.weight, spellings, 0

    def lookup(self) -> Tensor:
        """-> [TOKENS, WIDTH]"""
        spell = SPELLINGS[self.spellings[self.seed % len(self.spellings)]]
        self.seed += 1
        return spell(self.table, make_indices((TOKENS,), ROWS, seed=self.seed))

    def numbers(self, *shape: int) -> Tensor:
        return integers(*shape, seed=self.seed, dtype=self.weight.dtype)

    def weigh(self, out: Tensor) -> Tensor:
        """out [...] -> the sum of its numbers, each times an integer of its own."""
        self.seed += len(self.spellings)  # the next lookup is spelled as it would have been
        total = (out * self.numbers(*out.shape)).sum()
        return total.real - 2 * total.imag if total.is_complex() else total

    def weighed_lookups(self, count: int) -> Tensor:
        return torch.stack([self.weigh(self.lookup()) for _ in range(count)]).sum()


Program = Callable[[Uses], Tensor]


def _tied_around(uses: Uses) -> Tensor:
    """The lookup is there before the output layer's product, so that its gradient comes later."""
    hidden = uses.lookup()
    return uses.weigh(hidden @ uses.weight.t())


def _tied_before(uses: Uses) -> Tensor:
    """The other way round: the product's gradient arrives where those of lookups are."""
    product = uses.weigh(uses.numbers(TOKENS, WIDTH) @ uses.weight.t())
    return uses.weighed_lookups(2) + product


def _tied_between(uses: Uses) -> Tensor:
    first = uses.lookup()
    product = uses.weigh(F.linear(first + uses.lookup(), uses.weight))
    return uses.weighed_lookups(2) + product


def _elementwise(uses: Uses) -> Tensor:
    first = uses.weighed_lookups(1)
    return first + uses.weigh(uses.weight * uses.weight) + uses.weighed_lookups(1)


def _summed(uses: Uses) -> Tensor:
    """The sum's gradient is one number, expanded."""
    return uses.weighed_lookups(2) + 3 * uses.weigh(uses.weight.sum()) + uses.weighed_lookups(1)


def _shared_output_gradient(uses: Uses) -> Tensor:
    """An addition hands one tensor to both of its sides."""
    all_rows = uses.table(torch.arange(ROWS))
    return uses.weigh(all_rows + uses.weight) + uses.weighed_lookups(1)


def _no_leaf_between(uses: Uses) -> Tensor:
    doubled = embed_ext.functional.embedding(torch.arange(9), uses.weight * 2)
    return uses.weighed_lookups(2) + uses.weigh(doubled) + uses.weighed_lookups(2)


PROGRAMS: dict[str, Program] = {
    "one lookup": lambda uses: uses.weighed_lookups(1),
    "2 lookups": lambda uses: uses.weighed_lookups(2),
    "4 lookups": lambda uses: uses.weighed_lookups(4),
    "7 lookups": lambda uses: uses.weighed_lookups(7),
    "tied around": _tied_around,
    "tied before": _tied_before,
    "tied between": _tied_between,
    "elementwise": _elementwise,
    "summed": _summed,
    "shared output gradient": _shared_output_gradient,
    "no leaf between": _no_leaf_between,
}


def gradients_made(table: nn.Embedding, backward: Callable[[], object]) -> int:
    """How many blocks of memory of the table's size, to the page, the backward asked for."""
    embed_ext.empty_cache()  # what another test has left may be larger, and would be used
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        backward()
    events = recorded.profiler.kineto_results.events()
    larger = [e.nbytes() - table.weight.nbytes for e in events if e.name() == "[memory]"]
    return sum(0 <= rest < 4096 for rest in larger)
