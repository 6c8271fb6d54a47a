"""The command line: ``python -m benchmarks`` runs, ``python -m benchmarks report`` redraws."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.cases import DISTRIBUTIONS, Case
from benchmarks.formats import format_bytes, format_ratio, mean_ratio, unique
from benchmarks.modes import DEFAULT_MODES, MODES
from benchmarks.options import build_parser, build_report_parser
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
            _print_paths(write_report(Results.from_json(path.read_text()), path.parent))
        return 0
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        providers = select_providers(options.providers or SUITES[options.suite].providers)
    except ValueError as error:
        parser.error(str(error))
    options.modes = options.modes or _usual_modes(options)
    if options.device != "cuda" and any(MODES[mode].graph for mode in options.modes):
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


def _usual_modes(options: argparse.Namespace) -> list[str]:
    modes = SUITES[options.suite].modes or DEFAULT_MODES
    return [name for name in modes if options.device == "cuda" or not MODES[name].graph]


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
    for mode in MODES.values():
        print(f"  {mode.name:<28}{mode.description}")
    print("\nsuites:")
    for suite in SUITES.values():
        print(f"  {suite.name:<28}{suite.description} ({len(suite.cases)} cases)")
    print(f"\ndistributions of indices: {', '.join(DISTRIBUTIONS)}")


def print_summary(runner: Runner) -> None:
    """Geometric means, and everything that was not timed, on the terminal."""
    results = runner.results
    modes = unique(m.mode for m in results.measurements)
    print(f"\n{BASELINE}'s median over each provider's, geometric mean of the cases:")
    print(f"  {'':<28}" + "".join(f"{mode:>24}" for mode in modes))
    for name in unique(m.provider for m in results.measurements):
        own = [m for m in results.measurements if m.provider == name]
        means = [format_ratio(mean_ratio(m for m in own if m.mode == mode)) for mode in modes]
        print(f"  {name:<28}" + "".join(f"{mean:>24}" for mean in means))
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
