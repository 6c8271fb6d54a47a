"""What was counted, as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from benchmarks.formats import format_bytes, markdown_table, unique

KIND = "counts"
WIDE_ROW = 64  # bytes: narrower rows share sectors with their neighbours, whoever copies them
HEADER = (
    "case",
    "ideal",
    "launches",
    "CUB's",
    "blocks",
    "requested",
    "fetched",
    "longest chain",
    "longest of reads",
    "adds",
)
WORST = f"""\
## Worst by kernel

Of rows of {WIDE_ROW} bytes and more. A kernel's own bytes are set against the call's ideal ones."""
WORST_HEADER = ("kernel", "requested", "fetched", "longest chain", "longest of reads")
RATIOS = ("requested_bytes", "fetched_bytes")
LENGTHS = ("longest", "longest_reads")

Case = dict[str, Any]
Launch = dict[str, Any]

EXPLANATION = """\
**Nothing here is a time.** The CUDA kernels ran on
[a device that a CPU emulates](../../tests/emulator/README.md), which counts their accesses. It
knows no caches, no latency and no occupancy, so it cannot say which of two kernels is quicker, only
which moves more bytes and which has the longer chain of accesses:
[how it is counted](../README.md#counts-without-a-gpu).

- **ideal**: the bytes that this way of doing it has to read and write once.
- **launches**: kernels and fills. **CUB's**: its sorts, scans and selections, several launches
  each; their bytes are not counted. Neither are operators of torch, of which a sparse gradient
  under `scale_grad_by_freq` takes some.
- **blocks**: of the kernel with the fewest, and of that with the most.
- **requested**, **fetched**: bytes over the ideal ones. Requested: the sectors of 32 bytes that
  each instruction of each warp touches; fetched: the same, but what a block reads again is free,
  so that it is below 1 where a block looks up one row twice.
- **longest chain**: the most accesses of global memory that one thread makes in a kernel, and
  **of reads** those alone whose result it has to wait for.
- **adds**: atomic operations that threads have sent, a vector being one.
- A case is `op TABLE/TOKENS/DISTRIBUTION/DTYPE`. In `zipf-sorted` row 0 is the most frequent."""


def op_of(case: Case) -> str:
    return str(case["name"]).split()[0]


def over_ideal(case: Case, what: str) -> float:
    return float(sum(launch[what] for launch in case["launches"]) / case["ideal_bytes"])


def longest(case: Case, what: str) -> Launch:
    """The launch in which a thread's chain is the longest."""
    return max(case["launches"], key=itemgetter(what))


def chain(case: Case, what: str) -> int:
    return int(longest(case, what)[what])


def call_row(case: Case) -> list[str]:
    """A line of the table, as HEADER says."""
    launches = case["launches"]
    blocks = [launch["blocks"] for launch in launches if launch["blocks"] > 0]  # of no fill
    return [
        f"`{case['name']}`",
        format_bytes(case["ideal_bytes"]),
        str(len(launches)),
        str(case["of_library"]),
        " / ".join(f"{count:,}" for count in sorted({min(blocks), max(blocks)})),
        *(f"{over_ideal(case, what):.2f}" for what in RATIOS),
        *(f"{(launch := longest(case, what))[what]:,} in `{launch['kernel']}`" for what in LENGTHS),
        f"{sum(launch['adds'] for launch in launches):,}",
    ]


def _worst(cases: Sequence[Case], measure: Callable[[Case], float]) -> tuple[float, str]:
    """The largest measure of a case, and the case's name."""
    worst = max(cases, key=measure)
    return measure(worst), worst["name"]


def _only(case: Case, kernel: str) -> Case:
    own = [launch for launch in case["launches"] if launch["kernel"] == kernel]
    return {**case, "launches": own}


def worst_by_kernel(cases: Sequence[Case]) -> list[list[str]]:
    """What each kernel does at its worst, of rows that are not narrow: a line each."""
    wide = [case for case in cases if case["row_bytes"] >= WIDE_ROW]
    names = {launch["kernel"] for case in wide for launch in case["launches"]}
    rows = []
    for name in sorted(names):
        own = [only for case in wide if (only := _only(case, name))["launches"]]
        row = [f"`{name}`"]
        for what in RATIOS:
            ratio, where = _worst(own, partial(over_ideal, what=what))
            row.append(f"{ratio:.2f} in `{where}`")
        for what in LENGTHS:
            length, where = _worst(own, partial(chain, what=what))
            row.append(f"{length:,} in `{where}`")
        rows.append(row)
    return rows


def _environment(results: dict[str, Any]) -> str:
    environment = results["environment"]
    commit = (environment["commit"] or "unknown")[:12]
    changed = ", with changes that are not committed" if environment["dirty"] else ""
    return (
        f"Commit {commit}{changed}; {environment['compiler']}; torch {environment['torch']}; "
        f"{environment['date']}."
    )


def _tables(cases: Sequence[Case]) -> list[str]:
    parts = ["## Each call"]
    for op in unique(op_of(case) for case in cases):
        rows = [call_row(case) for case in cases if op_of(case) == op]
        parts += [f"### {op}", markdown_table(HEADER, rows)]
    return [*parts, WORST, markdown_table(WORST_HEADER, worst_by_kernel(cases))]


def _differences(arch: str, cases: Sequence[Case], first: Sequence[Case]) -> list[str]:
    """What an architecture's tables would say that the first one's do not."""
    title = f"## What differs on {arch}"
    known = [call_row(case) for case in first]
    calls = [row for row in map(call_row, cases) if row not in known]
    if not calls:
        return [title, "Nothing."]
    known = worst_by_kernel(first)
    worst = [row for row in worst_by_kernel(cases) if row not in known]
    return [title, markdown_table(HEADER, calls), markdown_table(WORST_HEADER, worst)]


def render(results: dict[str, Any]) -> str:
    (first, cases), *others = results["counts"].items()
    parts = [
        "# Counted on an emulated CUDA device, not timed",
        f"{_environment(results)} Code for {first}{'; others at the end' if others else ''}.",
        EXPLANATION,
        *_tables(cases),
    ]
    for arch, own in others:
        parts += _differences(arch, own, cases)
    return "\n\n".join(parts) + "\n"
