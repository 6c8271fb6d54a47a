"""The few statistics that results are made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    median: float
    p10: float
    p90: float


def quantile(values: Sequence[float], fraction: float) -> float:
    """The quantile by linear interpolation between the nearest two of the sorted values."""
    if not values:
        raise ValueError("quantile of no values")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarise(values: Sequence[float]) -> Summary:
    return Summary(statistics.median(values), quantile(values, 0.1), quantile(values, 0.9))


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean, the fair mean of ratios; None of no values."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else None
