"""How numbers are written: what the reports, the figures and the terminal share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.record import Measurement
from benchmarks.stats import geometric_mean


def format_seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def format_bytes(size: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def format_ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}x"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    alignment = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, alignment, *rows])


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def mean_ratio(measurements: Iterable[Measurement]) -> float | None:
    """The geometric mean of the ratios to the baseline."""
    return geometric_mean(m.ratio for m in measurements if m.ratio is not None)
