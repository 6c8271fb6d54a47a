"""Counts on the emulated device, in a process that has its package: a line of JSON each case.

python -m benchmarks.counts.emulated [PATTERN ...]    # in build/emulated/sm_90, or sm_80
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.counts.cases import DETERMINISTIC, CountedCase, select
from tests.common import EMULATED
from tests.emulator import control
from tests.emulator.counts import LaunchCounts, counted


def figures(launch: LaunchCounts) -> dict[str, Any]:
    return {
        **asdict(launch),
        "requested_bytes": launch.requested_bytes,
        "fetched_bytes": launch.fetched_bytes,
    }


def count(case: CountedCase) -> dict[str, Any]:
    indices = case.indices()
    call = case.prepare(indices)
    torch.use_deterministic_algorithms(case.op == DETERMINISTIC)
    try:
        with counted() as launches:
            call()
    finally:
        torch.use_deterministic_algorithms(False)
    if reports := control.take_reports():
        raise SystemExit(f"{case.name}: {reports[0]}")
    return {
        "name": case.name,
        "row_bytes": case.row_bytes,
        "ideal_bytes": case.ideal_bytes(indices),
        "of_library": sum(launch.is_library for launch in launches),
        "launches": [figures(launch) for launch in launches if not launch.is_library],
    }


def main(patterns: Sequence[str]) -> None:
    if not EMULATED:
        raise SystemExit("this is not the emulated device's package: see tests/emulator/build.py")
    for case in select(patterns):
        print(json.dumps(count(case)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
