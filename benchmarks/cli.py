"""The command line: ``python -m benchmarks`` runs, ``python -m benchmarks report`` redraws."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.cases import DISTRIBUTIONS, Case
from benchmarks.counts.report import KIND as COUNTS
from benchmarks.counts.report import render as render_counts
from benchmarks.formats import format_bytes, format_ratio, mean_ratio, unique
from benchmarks.modes import DEFAULT_MODES, MODES, get_mode
from benchmarks.options import MODELS, STEP, build_parser, build_report_parser, chosen_steps
from benchmarks.providers import BASELINE, Provider, all_providers, select_providers
from benchmarks.record import Results, Settings
from benchmarks.report import was_busy, write_report
from benchmarks.suites import SUITES, select_cases

if TYPE_CHECKING:
    from benchmarks.runner import Runner


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "report":
        for path in build_report_parser().parse_args(arguments[1:]).results:
            _print_paths(_report_again(path))
        return 0
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.suite == MODELS:
        return _run_models(options, parser)
    try:
        providers = select_providers(options.providers or SUITES[options.suite].providers)
    except ValueError as error:
        parser.error(str(error))
    _choose_modes(options, parser)
    if options.device != "cuda" and any(get_mode(mode).graph for mode in options.modes):
        parser.error("CUDA graphs need --device cuda")
    cases = select_cases(
        options.suite,
        patterns=options.cases,
        dtypes=options.dtype,
        index_dtype=options.index_dtype,
    )
    if not cases:
        parser.error(f"no case of suite {options.suite} matches --cases")
    if options.list:
        print_list(cases, providers)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device")
    return _run(options, cases, providers)


def _choose_modes(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Make options.modes and options.extra_modes what was asked for, or what the suite has."""
    suite, steps = SUITES[options.suite], chosen_steps(options)
    if steps is not None and options.modes and STEP not in options.modes:
        parser.error(f"options of a training step, but --modes does not name {STEP}")
    names = [] if steps is None else [step.name for step in steps]
    asked = [*(mode for mode in options.modes if mode != STEP), *names]
    options.extra_modes = [] if asked else list(suite.extra_modes)
    usual = suite.modes or DEFAULT_MODES
    on_device = [m for m in usual if options.device == "cuda" or not get_mode(m).graph]
    options.modes = unique(asked) or on_device


def _report_again(path: Path) -> list[Path]:
    text = path.read_text()
    kind = json.loads(text).get("kind")
    if kind == COUNTS:
        path.with_suffix(".md").write_text(render_counts(json.loads(text)))
        return [path.with_suffix(".md")]
    if kind == MODELS:
        from benchmarks.model_report import ModelResults

        return ModelResults.from_json(text).write_report(path.parent)
    return write_report(Results.from_json(text), path.parent)


def _run_models(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from benchmarks.models import run_models

    if options.device != "cpu":
        parser.error(f"--suite {MODELS} is measured on the CPU alone")
    status, paths = run_models(options)
    _print_paths(paths)
    return status


def _run(options: argparse.Namespace, cases: Sequence[Case], providers: Sequence[Provider]) -> int:
    from benchmarks.runner import Runner

    settings = Settings(
        suite=options.suite,
        modes=options.modes,
        threads=options.threads or [torch.get_num_threads()],
        device=options.device,
        rounds=options.rounds,
        min_time=options.min_time,
        budget=options.budget,
        batches=options.batches,
        seed=options.seed,
        cold=options.cold,
        memory=options.memory,
        bandwidth_mib=options.bandwidth_mib,
        time_limit=options.time_limit,
        extra_modes=options.extra_modes,
        extra_tokens=SUITES[options.suite].extra_tokens if options.extra_modes else 0,
    )
    runner = Runner(options.out or f"{options.suite}-{options.device}", settings, providers)
    interrupted = False
    try:
        # Written after every case, because a long run may be killed.
        runner.run(
            cases,
            progress=not options.quiet,
            after_case=lambda: runner.results.write(options.results_dir),
        )
    except KeyboardInterrupt:
        interrupted = True
    print_summary(runner)
    paths = runner.results.write(options.results_dir)
    _print_paths([*paths, *write_report(runner.results, options.results_dir)])
    rejected = any(rejection.kind != "skipped" for rejection in runner.results.rejections)
    return 130 if interrupted else int(rejected)


def print_list(cases: Sequence[Case], providers: Sequence[Provider]) -> None:
    print(f"{len(cases)} cases (table, size of the table, size of the output):")
    for case in cases:
        sizes = f"{format_bytes(case.table_bytes):>10}{format_bytes(case.output_bytes):>10}"
        print(f"  {case.name:<44}{sizes}")
    print("\nproviders (* would be timed):")
    for provider in all_providers():
        mark = "*" if provider in providers else " "
        print(f" {mark}{provider.name:<28}{provider.description}")
        if reason := provider.unavailable():
            print(f"  {'':<28}not available: {reason}")
    print("\nmodes:")
    steps = (name for suite in SUITES.values() for name in (*suite.modes, *suite.extra_modes))
    for mode in map(get_mode, unique([*MODES, *steps])):
        print(f"  {mode.name:<28}{mode.description}")
    print("  and more steps by --optimizer, --clip, --uses, --tied, --foreach and --accumulate")
    print("\nsuites:")
    for suite in SUITES.values():
        print(f"  {suite.name:<28}{suite.description} ({len(suite.cases)} cases)")
    print(f"\ndistributions of indices: {', '.join(DISTRIBUTIONS)}")


def print_summary(runner: Runner) -> None:
    """Geometric means, and everything that was not timed, on the terminal."""
    results = runner.results
    names = unique(m.provider for m in results.measurements)
    print(f"\n{BASELINE}'s median over each provider's, geometric mean of the cases:")
    print(f"  {'':<28}" + "".join(f"{name:>24}" for name in names))
    for mode in unique(m.mode for m in results.measurements):
        own = [m for m in results.measurements if m.mode == mode]
        means = [format_ratio(mean_ratio(m for m in own if m.provider == name)) for name in names]
        print(f"  {mode:<28}" + "".join(f"{mean:>24}" for mean in means))
    for provider in results.providers:
        if provider.unavailable:
            print(f"  {provider.name:<28}not available: {provider.unavailable}")
    for rejection in results.rejections:
        print(f"  {rejection.kind}: {rejection.provider} on {rejection.case}: {rejection.reason}")
    if not results.complete:
        print("  cases are missing: the run was stopped before its end")
    if was_busy(results.environment):
        print(f"  the machine was busy (load {results.environment['load_average']})")
    print()


def _print_paths(paths: Sequence[Path]) -> None:
    for path in paths:
        print(f"wrote {os.path.relpath(path)}")
