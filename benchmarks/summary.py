"""From the samples of a case and mode to the measurement that is written down."""

from __future__ import annotations

import dataclasses

from benchmarks.cases import Case
from benchmarks.modes import Mode
from benchmarks.providers import BASELINE
from benchmarks.record import Measurement, significant
from benchmarks.stats import summarise
from benchmarks.timing import Samples


def summarise_samples(
    case: Case,
    mode: Mode,
    threads: int,
    provider: str,
    samples: dict[str, Samples],
    bytes_moved: int,
) -> Measurement:
    """A provider's median and quantiles, and its ratio to the baseline timed in the same rounds."""
    own = samples[provider]
    summary = summarise(own.seconds)
    ratio = ratio_p10 = ratio_p90 = None
    if baseline := samples.get(BASELINE):
        ratio = significant(summarise(baseline.seconds).median / summary.median)
        paired = [b / s for b, s in zip(baseline.seconds, own.seconds, strict=True)]
        spread = summarise(paired)
        ratio_p10, ratio_p90 = significant(spread.p10), significant(spread.p90)
    return Measurement(
        case=case.name,
        **dataclasses.asdict(case),
        threads=threads,
        mode=mode.name,
        provider=provider,
        median=significant(summary.median),
        p10=significant(summary.p10),
        p90=significant(summary.p90),
        rounds=len(own.seconds),
        inner=own.inner,
        ratio=ratio,
        ratio_p10=ratio_p10,
        ratio_p90=ratio_p90,
        minimum_bytes=bytes_moved,
        gb_per_second=significant(bytes_moved / summary.median / 1e9),
        copy_share=None,
        page_faults=None,
        error_roundings=0.0,
    )
