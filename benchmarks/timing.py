"""Interleaved timing: in each round every provider is timed once, in shuffled order.

A machine that slows down for a second then slows every provider, not the one whose turn it was.
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.modes import Mode, deterministic

MIN_ROUNDS = 5
MAX_INNER = 1_000_000
FLUSH_BYTES = 256 * 2**20
COUNTED_CALLS = 3


T = TypeVar("T")


def cpu_seconds(call: Callable[[T], object], arguments: Sequence[T]) -> float:
    start = time.perf_counter()
    for argument in arguments:
        call(argument)
    return time.perf_counter() - start


def gpu_seconds(call: Callable[[T], object], arguments: Sequence[T]) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    for argument in arguments:
        call(argument)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@dataclass
class Sampler(Generic[T]):
    """Times calls of one provider in one mode over rotating batches: indices, each [tokens], or
    what a training step needs of them."""

    call: Callable[[T], object]
    mode: Mode
    batches: Sequence[T]
    device: str = "cpu"
    cold: bool = False
    deterministic: bool = False
    _rotation: Iterator[T] = field(init=False)
    _flush: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._rotation = itertools.cycle(self.batches)
        if self.cold:
            self._flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def sample(self, inner: int) -> float:
        """Mean seconds a call over ``inner`` calls in a row."""
        if self._flush is not None:
            self._flush.add_(1)
        return self._seconds(inner) / inner

    def _seconds(self, calls: int) -> float:
        sequence = list(itertools.islice(self._rotation, calls))
        seconds = gpu_seconds if self.on_gpu else cpu_seconds
        with torch.set_grad_enabled(self.mode.grad), deterministic(self.deterministic):
            return seconds(self.call, sequence)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def autorange(self, min_time: float) -> int:
        """How many calls in a row last at least ``min_time`` seconds; warms up on the way."""
        self.sample(1)
        inner = 1
        # A cold call is cold once: the second of two in a row would find the rows in the cache.
        while not self.cold and inner < MAX_INNER:
            seconds = self.sample(inner) * inner
            if seconds >= min_time:
                break
            growth = 1.2 * min_time / max(seconds, 1e-9)
            inner = min(MAX_INNER, max(inner + 1, round(inner * min(growth, 100.0))))
        return inner

    def page_faults(self) -> float | None:
        """Page faults a call, which time alone does not show; None where they are not counted."""
        if self.on_gpu:
            return None
        calls = 1 if self.mode.step else COUNTED_CALLS  # a step may take a second
        before = _minor_faults()
        self.sample(calls)
        after = _minor_faults()
        if before is None or after is None:
            return None
        return (after - before) / calls

    def launches(self) -> float | None:
        """Kernels, copies and fills that the GPU runs a call; None where they are not counted."""
        if not self.on_gpu:
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self._seconds(COUNTED_CALLS)
            torch.cuda.synchronize()
        events = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA]
        # A machine may keep the counters to itself: then nothing is seen, not nothing run.
        return len(events) / COUNTED_CALLS if events else None


def _minor_faults() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def turns(
    names: Iterable[str], *, rounds: int, budget: float, shuffler: random.Random
) -> Iterator[tuple[int, str]]:
    """The number of the round and whose turn it is: each once a round, in an order of its own.

    For ``rounds`` rounds or until ``budget`` seconds are spent, but at least MIN_ROUNDS rounds (or
    ``rounds`` if that is less), whatever the budget.
    """
    names = list(names)
    start = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - start > budget:
            break
        for name in shuffler.sample(names, len(names)):
            yield done, name


@dataclass(frozen=True)
class Samples:
    seconds: list[float]  # one entry a round
    inner: int


def interleave(
    samplers: Mapping[str, Sampler[Any]],
    *,
    rounds: int,
    min_time: float,
    budget: float,
    shuffler: random.Random,
) -> dict[str, Samples]:
    """Time every sampler once a round, for as long as ``turns`` says."""
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    with garbage_collection_paused():
        inner = {name: sampler.autorange(min_time) for name, sampler in samplers.items()}
        for _, name in turns(samplers, rounds=rounds, budget=budget, shuffler=shuffler):
            seconds[name].append(samplers[name].sample(inner[name]))
    return {name: Samples(seconds[name], inner[name]) for name in samplers}
