"""README shows what the committed results say."""

from __future__ import annotations

from pathlib import Path

from benchmarks import readme

ROOT = Path(__file__).resolve().parent.parent


def test_figures_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text()

    assert readme.with_figures(text) == text
