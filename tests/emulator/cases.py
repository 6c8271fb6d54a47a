"""Which random cases test_fuzz.py and test_fuzz_updates.py draw."""

from __future__ import annotations

import os

import pytest

FIRST = int(os.environ.get("EMULATOR_SEED", "0"))
every_case = pytest.mark.parametrize(
    "number", range(FIRST, FIRST + int(os.environ.get("EMULATOR_CASES", "40")))
)

WIDTHS = (1, 2, 3, 4, 7, 8, 16, 31, 33, 50, 64, 65, 100, 128, 130, 257, 513, 1030)
ROWS = (1, 2, 5, 31, 33, 100, 257, 1000, 4097)
MOST_ELEMENTS = 60_000  # of a gradient or a table: each is an access or so
