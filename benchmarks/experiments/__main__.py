"""Run the experiments behind the CPU kernels' constants, and write what they measured.

python -m benchmarks.experiments          # a few minutes, on a quiet machine
python -m benchmarks.experiments report   # only the tables, from the results that are there
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.environment import describe_environment
from benchmarks.experiments import huge_pages, kept_gradient, many_tables, tiny_call
from benchmarks.experiments.report import render
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


def compiled(name: str, folder: str) -> str:
    program = str(Path(folder) / name)
    compiler = os.environ.get("CXX", "c++")
    source = str(HERE / f"{name}.cpp")
    subprocess.run([compiler, "-O3", "-std=c++17", source, "-o", program], check=True)
    return program


def output_of(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def page_faults(folder: str) -> list[dict[str, Any]]:
    lines = output_of(compiled("page_faults", folder)).split()
    return [
        {"memory": memory, "share": float(share), "us": float(us), "us_with_pass": float(passed)}
        for memory, share, us, passed in zip(*(lines[i::4] for i in range(4)), strict=True)
    ]


def row_copies(folder: str) -> Iterator[dict[str, Any]]:
    program = compiled("row_copy", folder)
    for rows, row_bytes, tokens in tqdm(ROW_COPIES, desc="row copies"):
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


def kept_gradients() -> Iterator[dict[str, Any]]:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for table in tqdm(kept_gradient.TABLES, desc=f"kept gradients, threads {threads}"):
            torch.manual_seed(0)
            for who, seconds in kept_gradient.measure(*table).items():
                case = "{}x{}/{}".format(*table)
                yield {"threads": threads, "case": case, "who": who, "us": round(seconds * 1e6, 1)}


def tiny_calls() -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    for who, seconds in tiny_call.measure().items():
        yield {"who": who, "us": round(seconds * 1e6, 2)}


def measure() -> dict[str, Any]:
    environment = describe_environment("cpu")
    with tempfile.TemporaryDirectory() as folder:
        return {
            "environment": environment,
            "page_faults": page_faults(folder),
            "row_copies": list(row_copies(folder)),
            "kept_gradients": list(kept_gradients()),
            "huge_pages": list(tqdm(huge_pages.measure(), desc="huge pages")),
            "many_tables": list(tqdm(many_tables.measure(), desc="many tables")),
            "tiny_calls": list(tiny_calls()),
        }


def main() -> None:
    path = RESULTS_DIR / "experiments.json"
    if sys.argv[1:] != ["report"]:
        path.write_text(json.dumps(measure(), indent=1) + "\n")
    table = path.with_suffix(".md")
    table.write_text(render(json.loads(path.read_text())))
    print(f"wrote {path.name} and {table.name} in {path.parent.name}")


if __name__ == "__main__":
    main()
