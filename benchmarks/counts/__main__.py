"""Count what the CUDA kernels ask of the memory, on an emulated device, and write a table of it.

python -m benchmarks.counts                             # all cases, on sm_90 and sm_80
python -m benchmarks.counts --cases dense --arch sm_90  # some: the table is printed
python -m benchmarks.counts --cases dense --out dense   # unless it gets a name of its own

Nothing is timed. It needs what `make emulate` needs: g++ on x86-64 Linux, and the headers of a CUDA
toolkit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.counts.cases import select
from benchmarks.counts.report import KIND, render
from benchmarks.environment import ROOT, describe_environment
from benchmarks.progress import progress_bar
from benchmarks.record import RESULTS_DIR

ARCHS = ("sm_90", "sm_80")
NAME = "counts-emulated"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cases", nargs="+", default=[], metavar="PATTERN")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--out", help=f"the name of the results; of all of them {NAME}")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    if not select(options.cases):
        parser.error("no case matches --cases")
    if not options.cases and set(options.arch) == set(ARCHS):
        options.out = options.out or NAME
    return options


def counted(arch: str, patterns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The counts of each case, as the process makes them that has the emulated package."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "benchmarks.counts.emulated", *patterns]
    folder = ROOT / "build" / "emulated" / arch
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            yield json.loads(line)
    if child.returncode != 0:
        raise SystemExit(f"counting on {arch} failed")


def compiler() -> str:
    """What decided which accesses there are."""
    text = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    return text.splitlines()[0]


def write(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    table = path.with_suffix(".md")
    table.write_text(render(results))
    print(f"wrote {path.name} and {table.name} in {path.parent.name}")


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    build = [sys.executable, str(ROOT / "tests" / "emulator" / "build.py")]
    if status := subprocess.call(build):
        return status
    results: dict[str, Any] = {
        "kind": KIND,
        "environment": {**describe_environment("cpu"), "compiler": compiler()},
        "counts": {arch: [] for arch in options.arch},
    }
    total = len(select(options.cases)) * len(options.arch)
    with progress_bar(total, shown=not options.quiet) as bar:
        for arch in options.arch:
            for case in counted(arch, options.cases):
                bar.set_description(f"{arch} {case['name']}")
                bar.update()
                results["counts"][arch].append(case)
    if options.out is None:
        print(render(results))
    else:
        write(results, options.results_dir / f"{options.out}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
