"""The options of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import resolve_dtype
from benchmarks.modes import DEFAULT_MODES, MODES, get_mode
from benchmarks.providers import BASELINE
from benchmarks.record import RESULTS_DIR
from benchmarks.steps import OPTIMIZERS, Step, combine
from benchmarks.suites import SUITES

MODELS = "models"
STEP = "step"  # the mode that the options of training steps spell out

RUN_EPILOG = """\
examples:
  python -m benchmarks                                  the tiny suite: seconds
  python -m benchmarks --suite quick --threads 1 2      one case of each kind, on 1 and 2 threads
  python -m benchmarks --suite cpu --cases zipf --list  what the grid has with Zipf indices
  python -m benchmarks --suite llm --modes forward-backward --memory
  python -m benchmarks --providers embed_ext torch.compile
  python -m benchmarks --suite recsys --modes step --optimizer sgd adagrad --clip off on
  python -m benchmarks --suite models --threads 1 2     training steps of whole models
  python -m benchmarks --suite recsys --device cuda --cold
  python -m benchmarks report benchmarks/results/quick-cpu.json

A case is named TABLE/TOKENS/DISTRIBUTION/DTYPE, such as 100000x128/4096/zipf/float32.
Every provider is checked against a float64 reference before it is timed.
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Some defaults read better in words, and one of None or [] says nothing.
        in_words = action.help is None or "(default" in action.help
        return action.help if in_words or not action.default else super()._get_help_string(action)


def _positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__
    return parse


def _dtype_name(text: str) -> str:
    try:
        resolve_dtype(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _mode_name(text: str) -> str:
    if text == STEP:
        return text
    try:
        return get_mode(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time embedding lookups side by side: results verified first, rounds "
        "interleaved, medians reported.",
        epilog=RUN_EPILOG,
        formatter_class=_HelpFormatter,
    )
    for title, add in (
        ("what to measure", _add_what),
        ("what a training step is, of the mode step", _add_step),
        ("how to measure", _add_how),
        ("where results go", _add_where),
    ):
        add(parser.add_argument_group(title))
    return parser


def _add_what(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "--suite",
        choices=[*SUITES, MODELS],
        default="tiny",
        metavar="SUITE",
        help=f"set of cases, of {', '.join(SUITES)}; or {MODELS}, which are models",
    )
    what.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="keep cases whose name contains one of these, globs allowed",
    )
    what.add_argument(
        "--providers",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"who to time, beside {BASELINE}; 'all' is everyone (default: see --list)",
    )
    what.add_argument(
        "--modes",
        nargs="+",
        type=_mode_name,
        default=[],
        metavar="MODE",
        help=f"what a call does, of {', '.join(MODES)}, {STEP}, or one step by its name, such as "
        "step-sgd-clip-x2 "
        f"(default: the suite's, or else {', '.join(DEFAULT_MODES)})",
    )
    what.add_argument(
        "--dtype",
        nargs="+",
        default=[],
        metavar="DTYPE",
        type=_dtype_name,
        help="dtypes of the table, in place of the suite's own",
    )
    what.add_argument(
        "--index-dtype",
        default="int64",
        metavar="DTYPE",
        type=_dtype_name,
        help="dtype of the indices",
    )
    what.add_argument("--list", action="store_true", help="show cases and providers, run nothing")


def _add_step(step: argparse._ArgumentGroup) -> None:
    positive_int = _positive(int)
    step.add_argument(
        "--optimizer", nargs="+", choices=OPTIMIZERS, metavar="NAME", help="sgd, adamw, adagrad"
    )
    step.add_argument(
        "--clip", nargs="+", choices=("off", "on"), help="clip_grad_norm_() before optimizer.step()"
    )
    step.add_argument(
        "--uses",
        nargs="+",
        type=positive_int,
        metavar="N",
        help="lookups of the table in one step, each with indices of its own, added up",
    )
    step.add_argument(
        "--tied", action="store_true", help="the table is also the output layer, of few positions"
    )
    step.add_argument(
        "--foreach",
        action=argparse.BooleanOptionalAction,
        help="foreach of the optimizer and of the clipping (default: torch's own choice)",
    )
    step.add_argument(
        "--accumulate", type=positive_int, metavar="N", help="micro-batches of one step"
    )


def chosen_steps(options: argparse.Namespace) -> list[Step] | None:
    """The training steps that the options spell out; None if they say nothing of any."""
    given = (options.optimizer, options.clip, options.uses, options.accumulate, options.foreach)
    if STEP not in options.modes and not options.tied and all(value is None for value in given):
        return None
    return combine(
        options.optimizer or ["sgd"],
        [clip == "on" for clip in options.clip or ["off"]],
        options.uses or [1],
        tied=options.tied,
        foreach=options.foreach,
        accumulate=options.accumulate or 1,
    )


def _add_how(how: argparse._ArgumentGroup) -> None:
    positive_int, positive_float = _positive(int), _positive(float)
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    how.add_argument(
        "--time-limit",
        type=positive_float,
        metavar="SECONDS",
        help="begin no case after this long, and report what there is",
    )
    how.add_argument(
        "--threads",
        nargs="+",
        type=positive_int,
        default=[],
        metavar="N",
        help=f"numbers of CPU threads, one after the other (default: {torch.get_num_threads()})",
    )
    how.add_argument("--rounds", type=positive_int, default=20, help="rounds of a case and mode")
    how.add_argument(
        "--min-time",
        type=positive_float,
        default=0.005,
        metavar="SECONDS",
        help="time one sample lasts at least, by repeating short calls",
    )
    how.add_argument(
        "--budget",
        type=positive_float,
        default=10.0,
        metavar="SECONDS",
        help="stop the rounds of a case and mode after this long, but not before 5",
    )
    how.add_argument(
        "--batches",
        type=positive_int,
        default=4,
        metavar="N",
        help="distinct index batches to rotate through",
    )
    how.add_argument("--cold", action="store_true", help="flush the caches before every sample")
    how.add_argument(
        "--seed", type=int, default=0, help="seed of tables, indices and order (default: 0)"
    )
    how.add_argument(
        "--memory", action="store_true", help="peak memory as well, each in a fresh process"
    )
    how.add_argument(
        "--bandwidth-mib",
        type=int,
        default=256,
        metavar="MIB",
        help="buffer to measure the machine's bandwidth with; 0 leaves that out",
    )


def _add_where(where: argparse._ArgumentGroup) -> None:
    where.add_argument("--out", metavar="NAME", help="name of the files (default: SUITE-DEVICE)")
    where.add_argument(
        "--results-dir",
        type=Path,
        default=RESULTS_DIR,
        metavar="DIR",
        help="folder of NAME.json, .csv, .md and .png (default: benchmarks/results)",
    )
    where.add_argument("--quiet", action="store_true", help="no progress bar")


def build_report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description="Make the Markdown report and the figures again from recorded results.",
    )
    parser.add_argument("results", nargs="+", type=Path, help="NAME.json files of earlier runs")
    return parser
