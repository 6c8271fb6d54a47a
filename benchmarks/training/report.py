"""The table and the plot of what training a table costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.formats import format_bytes, format_ratio, format_seconds, markdown_table, unique
from benchmarks.training.measure import Timing
from benchmarks.training.trainers import (
    ADAM_CLIPPED,
    DECAY,
    EPS_CLIPPED,
    MAX_NORM,
    MOMENTUM,
    SGD_CAUGHT_UP,
    SGD_TWO_USES,
    SUBJECT,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND = "training"
# What a method's steps have that others have not.
NOTES = {
    ADAM_CLIPPED: f"With `clip_grad_norm_` to a norm of {MAX_NORM:g} before `optimizer.step()`: "
    f"{SUBJECT}'s own of the sparse gradient, and torch's of the dense one. `eps` is "
    f"{EPS_CLIPPED:g}.",
    SGD_TWO_USES: "The table is looked up twice, by as many indices of its own each time, and one "
    "backward adds up the gradients of both.",
    SGD_CAUGHT_UP: f"Momentum {MOMENTUM:g}, weight decay {DECAY:g}, `embed_ext.optim.catch_up`: a "
    "row that is looked up has done what torch's dense optimizer would have done to it. What "
    "`flush()` takes for all others is not in a step.",
}


def render(results: dict[str, Any]) -> str:
    """The whole report."""
    environment, timings = results["environment"], [Timing(**raw) for raw in results["timings"]]
    lines = [
        f"# Training a table: {results['name']}",
        "",
        "A whole step: `zero_grad()`, forward, backward, `optimizer.step()`; of FBGEMM's table, "
        f"whose backward updates it, forward and backward. Medians of interleaved rounds; in "
        f"brackets the median over {SUBJECT}'s of the same method, so above 1 is slower than "
        f"{SUBJECT}. What all do to a table was compared before.",
        "",
        f"- {environment['cpu']}, {environment['cores']} cores, {results['threads']} threads; "
        f"torch {environment['torch']}; commit {environment['commit']}; {environment['date']}",
        f"- up to {results['rounds']} rounds; load when it began {environment['load_average']}",
    ]
    if environment.get("dirty"):
        lines.append("- Measured with changes that are not committed.")
    lines += [f"- **{name} is missing**: {why}" for name, why in results["unavailable"].items()]
    sections = ["\n".join(lines)]
    for method in unique(timing.method for timing in timings):
        sections += [f"## {method}", *([NOTES[method]] if method in NOTES else [])]
        sections.append(_table([t for t in timings if t.method == method]))
    if results["memory"]:
        sections += ["## Peak memory", _memory(results["memory"])]
    return "\n\n".join(sections) + "\n"


def _table(timings: Sequence[Timing]) -> str:
    trainers = unique(timing.trainer for timing in timings)
    cells = {(timing.case, timing.trainer): timing for timing in timings}
    rows = []
    for case in unique(timing.case for timing in timings):
        subject = cells[case, SUBJECT].median
        row = [f"`{case}`"]
        for trainer in trainers:
            timing = cells.get((case, trainer))
            if timing is None:
                row.append("-")
            elif trainer == SUBJECT:
                row.append(format_seconds(timing.median))
            else:
                ratio = format_ratio(timing.median / subject)
                row.append(f"{format_seconds(timing.median)} ({ratio})")
        rows.append(row)
    return markdown_table(["case", *trainers], rows)


def _memory(entries: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            entry["trainer"],
            f"{entry['num_embeddings']:,} x {entry['width']}, {entry['tokens']:,} tokens",
            format_bytes(entry["table"]),
            format_bytes(entry["peak"]),
            f"{entry['peak'] / entry['table']:.3f}",
        ]
        for entry in entries
    ]
    header = ["", "table", "its bytes", "most that was held beside what a process holds", "ratio"]
    return markdown_table(header, rows)


def draw(results: dict[str, Any], path: Path) -> bool:
    """Save a plot of a step's time against the table's rows, of the methods that have several.

    False if there is nothing to draw, or no matplotlib to draw it with.
    """
    timings = [Timing(**raw) for raw in results["timings"]]
    scaling = [t for t in timings if t.case in results["scaling"]]
    sizes = {(timing.method, timing.num_embeddings) for timing in scaling}
    sizes_of = Counter(method for method, _ in sizes)
    methods = [m for m in unique(timing.method for timing in scaling) if sizes_of[m] > 1]
    if not methods or find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(methods), figsize=(4 * len(methods), 3.8), sharey=True, squeeze=False
    )
    for axis, method in zip(axes[0], methods, strict=True):
        _draw_method(axis, method, [t for t in scaling if t.method == method])
    axes[0][0].set_ylabel("ms a step")
    environment = results["environment"]
    figure.suptitle("A training step costs what the rows in use cost")
    figure.text(
        0.5,
        0.01,
        f"65,536 tokens, uniform, rows of 64 float32; {environment['cpu']}, "
        f"{results['threads']} threads, torch {environment['torch']}; medians",
        ha="center",
        fontsize=8,
        color="0.35",
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _draw_method(axis: Axes, method: str, timings: Sequence[Timing]) -> None:
    for trainer in unique(timing.trainer for timing in timings):
        own = sorted((t for t in timings if t.trainer == trainer), key=lambda t: t.num_embeddings)
        axis.plot(
            [timing.num_embeddings for timing in own],
            [timing.median * 1e3 for timing in own],
            marker="o",
            markersize=3.5,
            linewidth=2.2 if trainer == SUBJECT else 1.3,
            label=trainer,
        )
    axis.set(xscale="log", yscale="log", title=method, xlabel="rows of the table")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
