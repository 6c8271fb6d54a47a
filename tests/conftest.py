"""Fixtures that every test file shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

import embed_ext
from tests.common import HAS_CUDA


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Each test that takes `device` runs on both."""
    if request.param == "cuda" and not HAS_CUDA:
        pytest.skip("no CUDA device, or a CPU-only build")
    return str(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers that a test does not seed itself are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def verified_gradients() -> Iterator[None]:
    """Every kept gradient is searched for numbers that should not be there."""
    embed_ext.set_verify_kept_gradients(True)
    yield
    embed_ext.set_verify_kept_gradients(False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once for each reason how many tests were skipped for it."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        where = report.longrepr
        reasons[where[2] if isinstance(where, tuple) else str(where)] += 1
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} {reason[0].lower() + reason[1:]}")
