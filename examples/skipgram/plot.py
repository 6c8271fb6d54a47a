"""The picture of a run: loss curves on the left, where a step's time goes on the right."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from skipgram.train import PHASES, Contender

COLOURS = ("#a9bfdb", "#b3261e")
# The first curve is wide and pale, so that the second one drawn over it does not hide it.
LINE_WIDTHS = (4.5, 1.2)


def save_plot(contenders: list[Contender], disagreement: float, title: str, path: Path) -> None:
    """Draw both panels of a run and write them to ``path`` as PNG."""
    figure, (loss_axes, time_axes) = plt.subplots(
        1, 2, figsize=(11.5, 4.2), width_ratios=(1.15, 1), layout="constrained"
    )
    _draw_losses(loss_axes, contenders, disagreement)
    _draw_times(time_axes, contenders)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, format="png", dpi=140)
    plt.close(figure)


def _draw_losses(axes: Axes, contenders: list[Contender], disagreement: float) -> None:
    for contender, colour, width in zip(contenders, COLOURS, LINE_WIDTHS, strict=True):
        steps = range(1, len(contender.losses) + 1)
        axes.plot(steps, contender.losses, label=contender.name, color=colour, linewidth=width)
    axes.set(
        title=f"Loss (largest relative difference {disagreement:.1e})",
        xlabel="step",
        ylabel="loss per pair",
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_times(axes: Axes, contenders: list[Contender]) -> None:
    # Bars side by side, not stacked: a sum of medians is not the median of the sum.
    rows = [*PHASES, "total"]
    height = 0.38
    for i, (contender, colour) in enumerate(zip(contenders, COLOURS, strict=True)):
        median = contender.median_ms()
        places = [row + (i - 0.5) * height for row in range(len(rows))]
        bars = axes.barh(
            places, [median[row] for row in rows], height, color=colour, label=contender.name
        )
        axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title="Time of a step (median, lower is better)", xlabel="ms")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
