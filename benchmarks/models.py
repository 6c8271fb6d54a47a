"""Training steps of whole models: as they are, converted, and converted with kept gradients.

python -m benchmarks --suite models
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import embed_ext
from benchmarks.environment import describe_environment
from benchmarks.model_report import PHASES, ModelMeasurement, ModelResults
from benchmarks.model_zoo import MODELS, Batch, ModelCase
from benchmarks.providers import BASELINE, KEPT, SUBJECT
from benchmarks.record import significant
from benchmarks.rejections import rejection
from benchmarks.stats import summarise
from benchmarks.steps import OPTIMIZERS
from benchmarks.timing import garbage_collection_paused, turns
from benchmarks.verify import WrongResult

VARIANTS = (BASELINE, SUBJECT, KEPT)
CHECKED_STEPS = 3
# The first losses must be equal, as forward copies rows; after that the tables differ by the
# roundings of sums of different order.
LARGEST_DIFFERENCE = 1e-5
# Large enough for a wrong gradient to show in the next loss.
LEARNING_RATES = {"sgd": 0.1, "adagrad": 0.01, "adamw": 1e-3}


@dataclasses.dataclass
class Trained:
    """One variant of a model, with an optimizer of its own."""

    model: nn.Module
    case: ModelCase
    step: str
    phases: list[dict[str, float]] = dataclasses.field(default_factory=list)  # seconds, one a step

    def __post_init__(self) -> None:
        name, _, clip = self.step.partition("-")
        self.clip = bool(clip)
        make: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[name]
        self.optimizer = make(self.model.parameters(), lr=LEARNING_RATES[name])

    def train(self, batch: Batch) -> float:
        """One step on a batch, whose phases are noted; returns the loss."""
        marks = [time.perf_counter()]
        self.optimizer.zero_grad()
        marks.append(time.perf_counter())
        loss = self.case.loss(self.model, batch)
        marks.append(time.perf_counter())
        loss.backward()  # type: ignore[no-untyped-call]
        marks.append(time.perf_counter())
        if self.clip:
            clip_grad_norm_(self.model.parameters(), 1.0)
        marks.append(time.perf_counter())
        self.optimizer.step()
        marks.append(time.perf_counter())
        seconds = (end - begin for begin, end in zip(marks, marks[1:], strict=False))
        self.phases.append(dict(zip(PHASES, seconds, strict=True)))
        return float(loss.detach())


def make_variants(case: ModelCase, step: str, seed: int) -> dict[str, Trained]:
    """The model three times, with equal weights."""
    torch.manual_seed(seed)
    stock = case.build().train()
    models = {name: copy.deepcopy(stock) for name in VARIANTS}
    for name in (SUBJECT, KEPT):
        embed_ext.convert(models[name])
        for module in models[name].modules():
            if isinstance(module, embed_ext.Embedding):
                module.keep_grad_buffer = name == KEPT
    return {name: Trained(model, case, step) for name, model in models.items()}


def check_losses(variants: dict[str, Trained], batches: Sequence[Batch]) -> dict[str, float]:
    """Take a few steps with each; returns by how much losses differ, or raises WrongResult."""
    losses = {
        name: [trained.train(batches[i % len(batches)]) for i in range(CHECKED_STEPS)]
        for name, trained in variants.items()
    }
    expected, differences = losses[BASELINE], {}
    for name, own in losses.items():
        pairs = zip(own, expected, strict=True)
        differences[name] = max(abs(a - b) / abs(b) for a, b in pairs)
        if own[0] != expected[0] or not differences[name] <= LARGEST_DIFFERENCE:
            raise WrongResult(f"losses of {name} are {own}, those of {BASELINE} {expected}")
    return differences


def measure(
    case: ModelCase, step: str, threads: int, options: argparse.Namespace
) -> list[ModelMeasurement]:
    """Verify the variants' losses, then time their steps in rounds of shuffled order."""
    torch.set_num_threads(threads)
    variants = make_variants(case, step, options.seed)
    batches = case.batches(options.batches, options.seed)
    differences = check_losses(variants, batches)
    for trained in variants.values():
        trained.phases.clear()
    shuffler = random.Random(options.seed)
    order = turns(VARIANTS, rounds=options.rounds, budget=options.budget, shuffler=shuffler)
    with garbage_collection_paused():
        for done, name in order:
            variants[name].train(batches[done % len(batches)])
    totals = {
        name: [sum(phases.values()) for phases in trained.phases]
        for name, trained in variants.items()
    }
    baseline = summarise(totals[BASELINE]).median
    measurements = []
    for name, trained in variants.items():
        summary = summarise(totals[name])
        phases = {p: summarise([entry[p] for entry in trained.phases]).median for p in PHASES}
        measurements.append(
            ModelMeasurement(
                model=case.name,
                step=step,
                threads=threads,
                variant=name,
                median=significant(summary.median),
                p10=significant(summary.p10),
                p90=significant(summary.p90),
                ratio=significant(baseline / summary.median),
                rounds=len(totals[name]),
                phases={phase: significant(value) for phase, value in phases.items()},
                loss_difference=significant(differences[name]),
            )
        )
    return measurements


def _steps_of(case: ModelCase, options: argparse.Namespace) -> list[str]:
    """What is usual for the model, unless the options name optimizers or clipping."""
    if options.optimizer is None and options.clip is None:
        return list(case.steps)
    clips = ["-clip" if clip == "on" else "" for clip in options.clip or ["off", "on"]]
    return [f"{optimizer}{clip}" for optimizer in options.optimizer or ["sgd"] for clip in clips]


def run_models(
    options: argparse.Namespace, cases: Sequence[ModelCase] = tuple(MODELS.values())
) -> tuple[int, list[Path]]:
    """Measure what the options ask for; returns the exit status and what was written."""
    cases = [c for c in cases if not options.cases or any(p in c.name for p in options.cases)]
    if options.list:
        for case in cases:
            print(f"  {case.name:<10}{case.description}; steps: {', '.join(case.steps)}")
            if reason := case.unavailable():
                print(f"  {'':<10}not available: {reason}")
        return 0, []
    threads_before, begun = torch.get_num_threads(), time.monotonic()
    results = ModelResults(
        name=options.out or "models-cpu",
        rounds=options.rounds,
        budget=options.budget,
        seed=options.seed,
        environment=describe_environment("cpu"),
        models={case.name: case.description for case in cases},
    )
    runs = [
        (case, step, threads)
        for case in cases
        for step in _steps_of(case, options)
        for threads in options.threads or [threads_before]
    ]
    results.unavailable = {c.name: reason for c in cases if (reason := c.unavailable())}
    for name, reason in results.unavailable.items():
        print(f"{name} is not measured: {reason}")
    try:
        for case, step, threads in runs:
            if time.monotonic() - begun > (options.time_limit or float("inf")):
                break
            if case.name not in results.unavailable:
                _measure_one(results, case, step, threads, options)
        else:
            results.complete = True
    finally:
        torch.set_num_threads(threads_before)
        paths = [*results.write(options.results_dir), *results.write_report(options.results_dir)]
    return int(bool(results.rejections)), paths


def _measure_one(
    results: ModelResults, case: ModelCase, step: str, threads: int, options: argparse.Namespace
) -> None:
    if not options.quiet:
        print(f"{case.name}, {step}, {threads} thread(s)", flush=True)
    try:
        results.measurements += measure(case, step, threads, options)
    except Exception as error:  # the other models go on
        rejected = rejection(error, case.name, SUBJECT, f"{step}, {threads} thread(s)")
        results.rejections.append(rejected)
        print(f"  {rejected.kind}: {rejected.reason}")
