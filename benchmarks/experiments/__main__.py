"""Run the experiments behind the CPU kernels' constants, and write what they measured.

python -m benchmarks.experiments          # a few minutes, on a quiet machine
python -m benchmarks.experiments ddp      # some of them, by name, into the results that are there
python -m benchmarks.experiments report   # only the tables, from the results that are there

What is measured by name keeps a record of its own machine and date, which the tables show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.environment import Environment, describe_environment
from benchmarks.experiments import (
    ddp,
    dense_passes,
    huge_pages,
    kept_gradient,
    many_tables,
    stacked_uses,
    tiny_call,
)
from benchmarks.experiments.report import render
from benchmarks.processes import output_of
from benchmarks.record import RESULTS_DIR

HERE = Path(__file__).resolve().parent
ROW_COPIES = [
    (32_000, 2048, 8192),
    (128_256, 4096, 4096),
    (50_257, 3072, 4096),
    (100_000, 512, 32_768),
    (100_000, 512, 4096),
    (1_000_000, 256, 32_768),
    (1_000_000, 64, 32_768),
]
CLEARED_MEBIBYTES = (4, 16, 32, 64, 256)


def compiled(name: str, folder: str) -> str:
    program = str(Path(folder) / name)
    compiler = os.environ.get("CXX", "c++")
    source = str(HERE / f"{name}.cpp")
    subprocess.run([compiler, "-O3", "-std=c++17", source, "-o", program], check=True)
    return program


def page_faults() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        lines = output_of(compiled("page_faults", folder)).split()
    for memory, share, us, passed in zip(*(lines[i::4] for i in range(4)), strict=True):
        yield {
            "memory": memory,
            "share": float(share),
            "us": float(us),
            "us_with_pass": float(passed),
        }


def row_copies() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        program = compiled("row_copy", folder)
        for rows, row_bytes, tokens in ROW_COPIES:
            for line in output_of(program, rows, row_bytes, tokens).splitlines():
                way, alone, consumed = line.split(";")
                yield {
                    "rows": rows,
                    "row_bytes": row_bytes,
                    "tokens": tokens,
                    "way": way,
                    "us": float(alone),
                    "us_with_consumer": float(consumed),
                }


def clearing() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        program = compiled("clearing", folder)
        for mebibytes in CLEARED_MEBIBYTES:
            for line in output_of(program, mebibytes).splitlines():
                step, *times = line.split(";")
                for way, us in zip(("memset", "streamed"), times, strict=True):
                    yield {"mebibytes": mebibytes, "step": step, "way": way, "us": int(us)}


def kept_gradients() -> Iterator[dict[str, Any]]:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for table in kept_gradient.TABLES:
            torch.manual_seed(0)
            for who, seconds in kept_gradient.measure(*table).items():
                case = "{}x{}/{}".format(*table)
                yield {"threads": threads, "case": case, "who": who, "us": round(seconds * 1e6, 1)}


def tiny_calls() -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    for who, seconds in tiny_call.measure().items():
        yield {"who": who, "us": round(seconds * 1e6, 2)}


EXPERIMENTS: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
    "page_faults": page_faults,
    "row_copies": row_copies,
    "clearing": clearing,
    "kept_gradients": kept_gradients,
    "huge_pages": huge_pages.measure,
    "many_tables": many_tables.measure,
    "stacked_uses": stacked_uses.measure,
    "tiny_calls": tiny_calls,
    "ddp": ddp.measure,
    "dense_passes": dense_passes.measure,
}


def measure(names: Iterable[str]) -> dict[str, Any]:
    return {name: list(tqdm(EXPERIMENTS[name](), desc=name)) for name in names}


def merged(
    results: dict[str, Any], measured: dict[str, Any], environment: Environment
) -> dict[str, Any]:
    """The results with some experiments measured anew, which may be on another machine."""
    apart = {**results.get("apart", {}), **dict.fromkeys(measured, environment)}
    return {**results, **measured, "apart": apart}


def main(arguments: Sequence[str], folder: Path = RESULTS_DIR) -> None:
    path = folder / "experiments.json"
    if unknown := set(arguments) - {"report", *EXPERIMENTS}:
        raise SystemExit(f"{', '.join(sorted(unknown))}: expected any of {', '.join(EXPERIMENTS)}")
    if names := [name for name in EXPERIMENTS if name in arguments]:
        environment = describe_environment("cpu")
        results = merged(json.loads(path.read_text()), measure(names), environment)
        path.write_text(json.dumps(results, indent=1) + "\n")
    elif not arguments:
        results = {"environment": describe_environment("cpu"), **measure(EXPERIMENTS)}
        path.write_text(json.dumps(results, indent=1) + "\n")
    table = path.with_suffix(".md")
    table.write_text(render(json.loads(path.read_text())))
    print(f"wrote {path.name} and {table.name} in {path.parent.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
