"""The experiments' tables as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.formats import markdown_table

Rows = Sequence[dict[str, Any]]


def pivot(rows: Rows, line: Callable[[dict[str, Any]], str], column: str, value: str) -> str:
    """A table with a line for each `line` of the rows and a column for each value of `column`."""
    columns = list(dict.fromkeys(row[column] for row in rows))
    cells = {(line(row), row[column]): f"{row[value]:,}" for row in rows}
    names = list(dict.fromkeys(line(row) for row in rows))
    body = [[name, *(cells[name, c] for c in columns)] for name in names]
    return markdown_table(["", *columns], body)


def _copied(row: dict[str, Any]) -> str:
    return f"{row['tokens']:,} rows of {row['row_bytes']:,} B out of {row['rows']:,}"


def _of_pages(rows: Rows, value: str) -> str:
    shown = [{**row, "share": f"{row['share']:.0%}"} for row in rows]
    return pivot(shown, lambda row: row["memory"], "share", value)


def _kept_gradients(rows: Rows) -> str:
    def line(row: dict[str, Any]) -> str:
        return f"{row['case']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"

    return pivot(rows, line, "who", "us")


def _huge_pages(rows: Rows) -> str:
    return pivot(rows, lambda row: f"{row['case']}; huge pages: {row['huge_pages']}", "who", "us")


# The experiment, a title and its table.
SECTIONS: Sequence[tuple[str, str, Callable[[Rows], str]]] = (
    (
        "page_faults",
        "256 MiB of zeros, of which a share of the 4 KiB pages is written",
        lambda rows: _of_pages(rows, "us"),
    ),
    (
        "page_faults",
        "The same, and a pass that writes to every page",
        lambda rows: _of_pages(rows, "us_with_pass"),
    ),
    (
        "row_copies",
        "Copying scattered rows, alone",
        lambda rows: pivot(rows, _copied, "way", "us"),
    ),
    (
        "row_copies",
        "Copying scattered rows, and a pass that reads the output",
        lambda rows: pivot(rows, _copied, "way", "us_with_consumer"),
    ),
    (
        "clearing",
        "Clearing a gradient that has its pages, and the passes that follow",
        lambda rows: pivot(rows, lambda row: f"{row['mebibytes']} MiB; {row['step']}", "way", "us"),
    ),
    ("kept_gradients", "The backward of a training loop with zero_grad()", _kept_gradients),
    ("huge_pages", "A training step, by who gets huge pages", _huge_pages),
    (
        "many_tables",
        "The backward of many small tables",
        lambda rows: pivot(rows, lambda row: f"{row['tables']:,} tables", "who", "us"),
    ),
    (
        "stacked_uses",
        "Several lookups of a table in one step, and one of all their indices",
        lambda rows: pivot(rows, lambda row: f"{row['case']}; {row['who']}", "uses", "us"),
    ),
    (
        "tiny_calls",
        "A tiny forward and backward",
        lambda rows: markdown_table(["who", "us"], [[r["who"], f"{r['us']}"] for r in rows]),
    ),
    (
        "ddp",
        "A training step of two processes with DistributedDataParallel, in milliseconds",
        lambda rows: pivot(rows, lambda row: row["step"], "who", "ms"),
    ),
    (
        "dense_passes",
        "A step of SGD, and torch's passes over a dense gradient alone, in milliseconds",
        lambda rows: pivot(rows, lambda row: row["case"], "who", "ms"),
    ),
)


def _measured_on(environment: dict[str, Any]) -> str:
    return (
        f"{environment['cpu']}, {environment['cores']} cores; torch {environment['torch']}; "
        f"{environment['date']}; load {environment['load_average']}."
    )


def render(results: dict[str, Any]) -> str:
    parts = [
        "# What the experiments measured",
        f"{_measured_on(results['environment'])} All times are medians, in microseconds where no "
        "other unit is named. [The experiments](../experiments/README.md) say what follows from "
        "them.",
    ]
    for experiment, title, table in SECTIONS:
        if experiment not in results:
            continue
        parts.append(f"## {title}")
        if environment := results.get("apart", {}).get(experiment):
            parts.append(f"Measured apart from the others: {_measured_on(environment)}")
        parts.append(table(results[experiment]))
    return "\n\n".join(parts) + "\n"
