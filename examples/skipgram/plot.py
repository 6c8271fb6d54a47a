"""The picture of a run: loss curves, where a step's time goes, and the memory it takes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from skipgram.memory import Memory
from skipgram.train import PHASES, Contender

COLOURS = ("#a9bfdb", "#b3261e", "#1f1f1f")
# The first curve is wide and pale and the last one dotted: none hides those that it is drawn over.
LINE_WIDTHS = (4.5, 1.2, 1.6)
LINE_STYLES = ("solid", "solid", "dotted")


def save_plot(
    contenders: list[Contender],
    memory: dict[str, Memory],
    disagreement: float,
    title: str,
    path: Path,
) -> None:
    """Draw the panels of a run and write them to ``path`` as PNG."""
    figure, (loss_axes, time_axes, memory_axes) = plt.subplots(
        1, 3, figsize=(14.5, 4.2), width_ratios=(1.15, 1, 0.55), layout="constrained"
    )
    _draw_losses(loss_axes, contenders, disagreement)
    _draw_times(time_axes, contenders)
    _draw_memory(memory_axes, memory)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, format="png", dpi=140)
    plt.close(figure)


def _draw_losses(axes: Axes, contenders: list[Contender], disagreement: float) -> None:
    looks = zip(COLOURS, LINE_WIDTHS, LINE_STYLES, strict=True)
    for contender, (colour, width, style) in zip(contenders, looks, strict=True):
        axes.plot(
            range(1, len(contender.losses) + 1),
            contender.losses,
            label=contender.name,
            color=colour,
            linewidth=width,
            linestyle=style,
        )
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
    height = 0.78 / len(contenders)
    for i, (contender, colour) in enumerate(zip(contenders, COLOURS, strict=True)):
        median = contender.median_ms()
        places = [row + (i - (len(contenders) - 1) / 2) * height for row in range(len(rows))]
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


def _draw_memory(axes: Axes, memory: dict[str, Memory]) -> None:
    bars = axes.bar(
        range(len(memory)),
        [m.training_mib for m in memory.values()],
        color=COLOURS[: len(memory)],
    )
    axes.bar_label(bars, fmt="%.0f", padding=4)
    axes.set_xticks([])  # the colours are those of the other panels
    axes.margins(y=0.12)
    axes.set(title="Peak memory of training", ylabel="MiB")
    axes.spines[["top", "right"]].set_visible(False)
