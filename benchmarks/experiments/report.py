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


def render(results: dict[str, Any]) -> str:
    copies: Rows = results["row_copies"]
    pages = [{**row, "share": f"{row['share']:.0%}"} for row in results["page_faults"]]

    def copied(row: dict[str, Any]) -> str:
        return f"{row['tokens']:,} rows of {row['row_bytes']:,} B out of {row['rows']:,}"

    environment = results["environment"]
    parts = [
        "# What the experiments measured",
        f"{environment['cpu']}, {environment['cores']} cores; torch {environment['torch']}; "
        f"{environment['date']}; load {environment['load_average']}. All times are medians in "
        "microseconds. [The experiments](../experiments/README.md) say what follows from them.",
        "## 256 MiB of zeros, of which a share of the 4 KiB pages is written",
        pivot(pages, lambda row: row["memory"], "share", "us"),
        "## The same, and a pass that writes to every page",
        pivot(pages, lambda row: row["memory"], "share", "us_with_pass"),
        "## Copying scattered rows, alone",
        pivot(copies, copied, "way", "us"),
        "## Copying scattered rows, and a pass that reads the output",
        pivot(copies, copied, "way", "us_with_consumer"),
        "## The backward of a training loop with zero_grad()",
        pivot(
            results["kept_gradients"],
            lambda row: f"{row['case']}, {row['threads']} thread{'s' * (row['threads'] > 1)}",
            "who",
            "us",
        ),
        "## A training step, by who gets huge pages",
        pivot(
            results["huge_pages"],
            lambda row: f"{row['case']}; huge pages: {row['huge_pages']}",
            "who",
            "us",
        ),
        "## The backward of many small tables",
        pivot(results["many_tables"], lambda row: f"{row['tables']:,} tables", "who", "us"),
        "## A tiny forward and backward",
        markdown_table(["who", "us"], [[r["who"], f"{r['us']}"] for r in results["tiny_calls"]]),
    ]
    return "\n\n".join(parts) + "\n"
