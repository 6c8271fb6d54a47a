"""Time whole training steps of one table: this library's optimizers, torch's and FBGEMM's.

python -m benchmarks.training                    # all, into benchmarks/results/training-cpu.*
python -m benchmarks.training --only Adam --out mine

FBGEMM is measured if it is installed: pip install --no-deps fbgemm-gpu-cpu==1.8.0
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.environment import ROOT, describe_environment
from benchmarks.formats import unique
from benchmarks.progress import progress_bar
from benchmarks.training import memory
from benchmarks.training.measure import Options, measure, set_threads
from benchmarks.training.report import KIND, draw, render
from benchmarks.training.trainers import PLAIN, ROWWISE, SUBJECT, TRAINERS, Trainer

TOKENS = 65_536
CASES = tuple(
    Case(rows, width, TOKENS, distribution)
    for rows, width in ((1_000_000, 64), (100_000, 128), (50_257, 768))
    for distribution in ("uniform", "zipf", "zipf-sorted")
)
SCALING = tuple(
    Case(rows, 64, TOKENS) for rows in (10_000, 100_000, 1_000_000, 3_000_000, 10_000_000)
)
MOST_ROWS_OF_A_PASS = 1_000_000  # of a method that takes seconds for more
REMEMBERED = (f"{ROWWISE}: {SUBJECT}", "SGD: torch, dense", "SGD: torch, sparse")
REMEMBERED_CASE = (10_000_000, 64, TOKENS)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    methods = unique(trainer.method for trainer in TRAINERS)
    parser.add_argument("--only", nargs="+", choices=methods, default=methods, help="methods")
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="cases whose name has it")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=Options.rounds)
    parser.add_argument("--budget", type=float, default=Options.budget, help="seconds")
    parser.add_argument("--out", default="training-cpu", help="the name of the results")
    parser.add_argument("--results-dir", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def is_measured(trainer: Trainer, case: Case) -> bool:
    """How a step grows with the table is shown by the plain ones alone."""
    if case not in CASES and trainer.step != PLAIN:
        return False
    return case.num_embeddings <= MOST_ROWS_OF_A_PASS or not trainer.passes_over_the_table


def runs(options: argparse.Namespace) -> Iterator[tuple[Case, list[Trainer]]]:
    """What is measured together: a case, and the trainers of one method."""
    for case in dict.fromkeys((*CASES, *SCALING)):
        if options.cases and not any(part in case.name for part in options.cases):
            continue
        for method in options.only:
            trainers = [t for t in TRAINERS if t.method == method and is_measured(t, case)]
            if trainers:
                yield case, trainers


def peak_memory(key: str) -> dict[str, Any]:
    """What one trainer holds at most."""
    rows, width, tokens = REMEMBERED_CASE
    table, peak = memory.measure(key, rows, width, tokens)
    size = {"num_embeddings": rows, "width": width, "tokens": tokens}
    return {"trainer": key, **size, "table": table, "peak": peak}


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    results: dict[str, Any] = {
        "kind": KIND,
        "name": options.out,
        "environment": describe_environment("cpu"),
        "threads": set_threads(options.threads),
        "rounds": options.rounds,
        "unavailable": {t.key: why for t in TRAINERS if (why := t.unavailable())},
        "scaling": [case.name for case in SCALING],
        "timings": [],
        "memory": [],
    }
    limits = Options(rounds=options.rounds, budget=options.budget)
    chosen = list(runs(options))
    with progress_bar(len(chosen), shown=not options.quiet) as bar:
        for case, trainers in chosen:
            bar.set_description(f"{case.name} {trainers[0].method}")
            results["timings"] += [one.to_json() for one in measure(case, trainers, limits)]
            bar.update()
    if not options.no_memory and memory.available():
        results["memory"] = [peak_memory(key) for key in REMEMBERED]
    write(results, options.results_dir / f"{options.out}.json")
    return 0


def write(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(render(results))
    draw(results, path.with_suffix(".png"))
    print(f"wrote {path.stem} in {path.parent.name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
