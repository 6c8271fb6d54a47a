"""Programs that are run for what they print."""

from __future__ import annotations

import subprocess

from benchmarks.environment import ROOT

TIMEOUT_SECONDS = 600


def output_of(*command: object) -> str:
    """What a program prints; RuntimeError if it fails, or takes too long."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no result in {TIMEOUT_SECONDS} seconds") from None
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout
