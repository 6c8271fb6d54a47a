"""Results as figures: speed-ups, times of a small suite, and scaling curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # chosen before pyplot is imported; no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.formats import format_seconds, mean_ratio, unique
from benchmarks.providers import BASELINE, SUBJECT
from benchmarks.record import Measurement, Results

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ["#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#0072B2", "#8C6D31", "#F0E442", "#999999"]
FIXED_COLOURS = {SUBJECT: "#D55E00", BASELINE: "#333333"}
MAX_TIME_ROWS = 24
MAX_COLUMNS = 4
NARROW = 100  # an axis of less than two decades may show one power of ten, or none
AXES = {"num_embeddings": "rows of the table", "tokens": "tokens", "threads": "threads"}


def draw_figures(results: Results, directory: Path) -> list[Path]:
    """Draw what the results allow: NAME-speedup.png, NAME-times.png, NAME-scaling.png."""
    drawn = {
        "speedup": draw_speedup(results),
        "times": draw_times(results),
        "scaling": draw_scaling(results),
    }
    paths = []
    for kind, figure in drawn.items():
        path = directory / f"{results.name}-{kind}.png"
        # A figure of an earlier run of this name must not outlive what it showed.
        path.unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(path, dpi=150)
            plt.close(figure)
            paths.append(path)
    return paths


def _colours(results: Results) -> dict[str, str]:
    others = [p.name for p in results.providers if p.name not in FIXED_COLOURS]
    cycle = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    return {**FIXED_COLOURS, **cycle}


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _caption(figure: Figure, results: Results) -> None:
    environment = results.environment
    text = f"{environment.get('gpu') or environment['cpu']}, torch {environment['torch']}"
    figure.supxlabel(f"{text}, {str(environment['date'])[:10]}", fontsize=8, color="#666666")


def draw_speedup(results: Results) -> Figure | None:
    """Ratios to the baseline: a dot for each case, a diamond for the geometric mean."""
    measured = [m for m in results.measurements if m.provider != BASELINE and m.ratio is not None]
    if not measured:
        return None
    modes = unique(m.mode for m in measured)
    rows = sorted(
        {(m.provider, m.threads) for m in measured},
        key=lambda row: (list(_colours(results)).index(row[0]), row[1]),
    )
    columns = min(MAX_COLUMNS, len(modes))
    lines = -(-len(modes) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(1.6 + 3.4 * columns, 1 + (0.7 + 0.42 * len(rows)) * lines),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(modes) :]:
        axes.set_visible(False)
    for axes, mode in zip(grid.flat, modes, strict=False):
        _draw_ratios(axes, [m for m in measured if m.mode == mode], rows, _colours(results))
        axes.set_title(mode, fontsize=10)
    threads = sorted({m.threads for m in measured})
    labels = [p if len(threads) == 1 else f"{p}, {t} thr." for p, t in rows]
    grid[0][0].set_yticks(range(len(rows)), labels)
    grid[0][0].set_ylim(len(rows) - 0.4, -0.7)
    figure.suptitle(
        f"Times faster than {BASELINE} (dots: cases; diamonds: geometric means)", fontsize=11
    )
    _caption(figure, results)
    return figure


def _draw_ratios(
    axes: Axes,
    measured: Sequence[Measurement],
    rows: Sequence[tuple[str, int]],
    colours: dict[str, str],
) -> None:
    axes.axvline(1, color=FIXED_COLOURS[BASELINE], linewidth=1)
    for height, (provider, threads) in enumerate(rows):
        own = [m for m in measured if (m.provider, m.threads) == (provider, threads)]
        mean = mean_ratio(own)
        if mean is None:
            continue
        ratios = [m.ratio for m in own if m.ratio is not None]
        axes.scatter(ratios, [height] * len(ratios), s=14, alpha=0.45, color=colours[provider])
        axes.scatter([mean], [height], marker="D", s=42, color=colours[provider], edgecolor="white")
        axes.annotate(
            f"{mean:.2g}x",
            (mean, height),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    low, high = axes.get_xlim()
    narrow = high / low < NARROW
    axes.xaxis.set_minor_formatter(FuncFormatter(_minor_label) if narrow else NullFormatter())
    axes.tick_params(labelsize=8, which="both")
    _style(axes)


def _minor_label(value: float, _: int) -> str:
    return f"{value:g}x" if f"{value:.0e}"[0] in "25" else ""


def draw_times(results: Results) -> Figure | None:
    """Medians with p10 to p90 of every case, if the suite is small enough to read."""
    rows = list(dict.fromkeys((m.case, m.threads) for m in results.measurements))
    modes = unique(m.mode for m in results.measurements)
    if not rows or len(rows) > MAX_TIME_ROWS or len(modes) > MAX_COLUMNS:
        return None
    providers = unique(m.provider for m in results.measurements)
    colours = _colours(results)
    figure, grid = plt.subplots(
        1,
        len(modes),
        figsize=(2.6 + 3.2 * len(modes), 1.6 + (0.14 + 0.11 * len(providers)) * len(rows)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, mode in zip(grid[0], modes, strict=True):
        for place, provider in enumerate(providers):
            # Providers of one row stand below each other, or equal times would hide each other.
            shift = 0.6 * ((place + 0.5) / len(providers) - 0.5)
            own = [m for m in results.measurements if (m.mode, m.provider) == (mode, provider)]
            axes.errorbar(
                [m.median for m in own],
                [rows.index((m.case, m.threads)) + shift for m in own],
                xerr=[
                    [max(0.0, m.median - m.p10) for m in own],
                    [max(0.0, m.p90 - m.median) for m in own],
                ],
                fmt="o",
                markersize=4,
                linewidth=1,
                color=colours[provider],
                label=provider,
            )
        _log_time_axis(axes, "x")
        axes.set_title(mode, fontsize=10)
        _style(axes)
    labels = [f"{case}, {threads} thr." for case, threads in rows]
    grid[0][0].set_yticks(range(len(rows)), labels, fontsize=8)
    grid[0][0].set_ylim(len(rows) - 0.5, -0.5)
    _legend(figure, grid[0][0])
    _caption(figure, results)
    return figure


def _log_time_axis(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_formatter(FuncFormatter(lambda seconds, _: format_seconds(seconds)))
    low, high = axis.get_view_interval()
    narrow = high / low < NARROW
    axis.set_minor_formatter(
        FuncFormatter(lambda s, _: format_seconds(s) if f"{s:.0e}"[0] in "25" else "")
        if narrow
        else NullFormatter()
    )
    axes.tick_params(axis="x" if which == "x" else "y", which="both", labelsize=8)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)


Group = list[Measurement]


def scaling_group(measurements: Sequence[Measurement], axis: str) -> Group:
    """The measurements that differ in ``axis`` alone, in the group with the most values of it.

    Of groups with as many values, the one whose call does the most work; [] below two values.
    """
    groups: dict[tuple[object, ...], Group] = {}
    fixed = [
        name for name in ("num_embeddings", "embedding_dim", "tokens", "threads") if name != axis
    ] + ["distribution", "dtype", "index_dtype"]
    for measurement in measurements:
        key = tuple(getattr(measurement, name) for name in fixed)
        groups.setdefault(key, []).append(measurement)

    def weight(group: Group) -> tuple[int, int, int]:
        values = {getattr(m, axis) for m in group}
        return len(values), max(m.minimum_bytes for m in group), max(m.threads for m in group)

    best = max(groups.values(), key=weight, default=[])
    return best if best and weight(best)[0] >= 2 else []


def draw_scaling(results: Results) -> Figure | None:
    """Time against table size, tokens and threads, each with the rest fixed."""
    groups = {axis: scaling_group(results.measurements, axis) for axis in AXES}
    # Two points make a curve for threads; of sizes they would only repeat the table.
    groups = {
        axis: group
        for axis, group in groups.items()
        if len({getattr(m, axis) for m in group}) >= (2 if axis == "threads" else 3)
    }
    if not set(groups) - {"threads"}:
        return None
    modes = unique(m.mode for m in results.measurements)[:MAX_COLUMNS]
    figure, grid = plt.subplots(
        len(groups),
        len(modes),
        figsize=(1 + 3.4 * len(modes), 0.8 + 2.6 * len(groups)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for row, (axis, group) in zip(grid, groups.items(), strict=True):
        for axes, mode in zip(row, modes, strict=True):
            _draw_curves(axes, [m for m in group if m.mode == mode], axis, _colours(results))
            axes.set_title(f"{mode}\n{_fixed(group[0], axis)}", fontsize=8)
    _legend(figure, grid[0][0])
    _caption(figure, results)
    return figure


def _draw_curves(axes: Axes, group: Group, axis: str, colours: dict[str, str]) -> None:
    for provider in unique(m.provider for m in group):
        own = sorted(
            (m for m in group if m.provider == provider), key=lambda m: float(getattr(m, axis))
        )
        values = [getattr(m, axis) for m in own]
        axes.plot(
            values,
            [m.median for m in own],
            "o-",
            ms=4,
            lw=1.5,
            color=colours[provider],
            label=provider,
        )
        axes.fill_between(
            values,
            [m.p10 for m in own],
            [m.p90 for m in own],
            alpha=0.15,
            color=colours[provider],
            linewidth=0,
        )
    if axis == "threads":
        axes.set_xticks(sorted({m.threads for m in group}))
    else:
        axes.set_xscale("log")
    _log_time_axis(axes, "y")
    axes.set_xlabel(AXES[axis], fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    _style(axes)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _fixed(measurement: Measurement, axis: str) -> str:
    parts = {
        "num_embeddings": f"{measurement.num_embeddings:,} rows",
        "embedding_dim": f"dim {measurement.embedding_dim}",
        "tokens": f"{measurement.tokens:,} tokens",
        "distribution": measurement.distribution,
        "threads": f"{measurement.threads} thr.",
    }
    return ", ".join(text for name, text in parts.items() if name != axis)
