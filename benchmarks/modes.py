"""What one call does, and the bytes that it cannot avoid moving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case, resolve_dtype
from benchmarks.providers import Lookup, Provider
from benchmarks.steps import PREFIX, Step

# Up to here a call on a GPU is mostly overhead: graphs are measured and kernels are counted.
SMALL_TOKENS = 4096


@dataclass(frozen=True)
class Mode:
    name: str
    description: str
    grad: bool
    backward: bool
    accumulate: bool = False
    graph: bool = False  # recorded as a CUDA graph, and replayed
    step: Step | None = None  # a whole training step, see steps.py

    def applies_to(self, provider: Provider) -> bool:
        # A sparse .grad that is added to grows by every call: not the work of one step.
        if self.accumulate and provider.gradient == "sparse":
            return False
        if self.step and provider.gradient == "sparse" and not self.step.takes_sparse_gradients():
            return False
        return self.backward or not provider.deterministic  # every forward is deterministic


MODES = {
    mode.name: mode
    for mode in (
        Mode("forward-no-grad", "forward under torch.no_grad()", grad=False, backward=False),
        Mode("forward-grad", "forward that records the graph", grad=True, backward=False),
        Mode(
            "forward-backward",
            "forward, backward, then .grad = None as zero_grad() does",
            grad=True,
            backward=True,
        ),
        Mode(
            "accumulate",
            "forward, backward into a .grad that is there already, as over micro-batches",
            grad=True,
            backward=True,
            accumulate=True,
        ),
        Mode(
            "graph-forward",
            f"a replayed CUDA graph of forward-no-grad; up to {SMALL_TOKENS:,} tokens",
            grad=False,
            backward=False,
            graph=True,
        ),
        Mode(
            "graph-forward-backward",
            f"a replayed CUDA graph of forward-backward; up to {SMALL_TOKENS:,} tokens",
            grad=True,
            backward=True,
            graph=True,
        ),
    )
}
DEFAULT_MODES = [name for name, mode in MODES.items() if not (mode.accumulate or mode.graph)]


def get_mode(name: str) -> Mode:
    """The mode of that name, training steps included; ValueError if there is none."""
    if name.startswith(PREFIX):
        step = Step.parse(name)
        return Mode(name, step.description, grad=True, backward=True, step=step)
    try:
        return MODES[name]
    except KeyError:
        raise ValueError(f"no mode {name!r}; there are: {', '.join(MODES)}, step-…") from None


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Ask for deterministic algorithms inside, if ``enabled``; otherwise change nothing."""
    before = torch.are_deterministic_algorithms_enabled()
    if enabled:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if enabled:
            torch.use_deterministic_algorithms(before)


def make_call(lookup: Lookup, mode: Mode, grad_output: Tensor) -> Callable[[Tensor], object]:
    """What is timed: a function of indices [tokens]; grad_output is [tokens, embedding_dim]."""
    if not mode.backward:
        return lookup.call
    call, weight = lookup.call, lookup.weight
    if mode.accumulate:
        return lambda indices: call(indices).backward(grad_output)  # type: ignore[no-untyped-call]

    def step(indices: Tensor) -> None:
        call(indices).backward(grad_output)  # type: ignore[no-untyped-call]
        # Giving the gradient's memory back is part of a training step, so it is timed too.
        weight.grad = None

    return step


@dataclass(frozen=True)
class Traffic:
    """Counts over the batches of a case, on average: what the byte formulas need."""

    tokens: float
    rows: float  # distinct rows looked up
    trained_tokens: float  # tokens other than padding
    trained_rows: float  # distinct rows other than padding


def count_traffic(batches: Sequence[Tensor], padding_idx: int | None) -> Traffic:
    """Counts of the index tensors, each [tokens]."""
    rows = trained_tokens = trained_rows = 0
    for indices in batches:
        distinct, hits = indices.long().unique(return_counts=True)  # type: ignore[no-untyped-call]
        trained = torch.ones_like(hits) if padding_idx is None else distinct.ne(padding_idx).long()
        rows += distinct.numel()
        trained_rows += int(trained.sum())
        trained_tokens += int((hits * trained).sum())
    n = len(batches)
    return Traffic(
        tokens=sum(indices.numel() for indices in batches) / n,
        rows=rows / n,
        trained_tokens=trained_tokens / n,
        trained_rows=trained_rows / n,
    )


def minimum_bytes(mode: Mode, case: Case, traffic: Traffic) -> int:
    """Bytes that any implementation must move between memory and the processor.

    forward:  indices read + each distinct row read once + output written
    backward: indices read + grad_output of trained tokens read + each trained row written once,
              and read once if it is added to a gradient that is there

    The untouched rows of a dense gradient are not counted: memory fresh from the operating
    system is zero already, so a good implementation need not write them.
    """
    row = case.embedding_dim * case.torch_dtype.itemsize
    indices = traffic.tokens * resolve_dtype(case.index_dtype).itemsize
    total = indices + (traffic.rows + traffic.tokens) * row
    if mode.backward:
        row_passes = 2 if mode.accumulate else 1
        total += indices + (traffic.trained_tokens + row_passes * traffic.trained_rows) * row
    return round(total)
