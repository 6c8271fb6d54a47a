"""Fixtures that every test file shares."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

import embed_ext
from tests.common import EMULATED, HAS_CUDA, index_check_is
from tests.emulator import control

DEVICES = (
    [pytest.param("emulated", marks=pytest.mark.emulated)]
    if EMULATED
    else ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each test that takes `device` runs on all that this build has kernels for."""
    if request.param == "cuda" and not HAS_CUDA:
        pytest.skip("no CUDA device, or a CPU-only build")
    return "cpu" if request.param == "emulated" else str(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the emulated build, leave out what does not call the emulated kernels."""
    if EMULATED:
        chosen: dict[bool, list[pytest.Item]] = {True: [], False: []}
        for item in items:
            chosen[item.get_closest_marker("emulated") is not None].append(item)
        config.hook.pytest_deselected(items=chosen[False])
        items[:] = chosen[True]


@pytest.fixture(autouse=EMULATED)
def emulated_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test has a schedule of its own; what the device finds wrong fails the test."""
    name = request.node.nodeid.encode()
    control.set_seed(zlib.crc32(name) + int(os.environ.get("EMULATOR_SEED", "0")))
    yield
    try:
        embed_ext.check_indices()  # what a test left to be raised later
    except IndexError:
        pass
    assert control.take_reports() == []


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers that a test does not seed itself are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def reports_at_once() -> Iterator[None]:
    """On a GPU too, the call itself reports its bad index."""
    with index_check_is("sync"):
        yield


@pytest.fixture
def reports_later() -> Iterator[None]:
    """On a GPU a later call reports a bad index; no report waits at first, and none is left."""
    embed_ext.check_indices()
    with index_check_is("lazy"):
        yield
    embed_ext.check_indices()


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
