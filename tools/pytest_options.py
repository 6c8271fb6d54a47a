"""Print the pytest options that the plugins at hand allow: run in parallel, stop a hung test."""

from __future__ import annotations

import importlib.util
import os

MAX_WORKERS = 8  # each one imports torch, some 300 MB
TIMEOUT_S = 900


def options() -> list[str]:
    """Return the options; none if neither pytest-xdist nor pytest-timeout is installed."""
    found = []
    if importlib.util.find_spec("xdist"):
        workers = min(MAX_WORKERS, os.cpu_count() or 1)
        found += ["-n", str(workers), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        found += ["--timeout", str(TIMEOUT_S)]
    return found


if __name__ == "__main__":
    print(" ".join(options()))
