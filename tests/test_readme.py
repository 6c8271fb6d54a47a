"""README shows what the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.record import RESULTS_DIR

ROOT = Path(__file__).resolve().parent.parent


def test_figures_are_those_of_the_results() -> None:
    if not RESULTS_DIR.is_dir():
        pytest.skip("this copy of the sources comes without benchmarks/results")
    text = (ROOT / "README.md").read_text()

    assert readme.with_figures(text) == text
