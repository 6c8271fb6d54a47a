"""The example trains sharded tables and ends with the loss of the unsharded run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import embed_ext
from tests.distributed import common as _skips_without_gloo  # noqa: F401
from tests.skipgram_corpus import EXAMPLES

TINY = ("--tokens", "6000", "--vocab", "500", "--dim", "8", "--batch", "256", "--steps", "8")


def run_example(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(
        filter(None, [str(Path(embed_ext.__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_sharded_training_agrees() -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    finished = run_example(*torchrun, str(EXAMPLES / "train_sharded.py"), *TINY)

    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = re.search(r"table \((\d+), 8\): this process has \((\d+), 8\)", finished.stdout)
    assert int(rows[2]) == -(-int(rows[1]) // 2)
    assert f"({rows[2]}, 8) of its gradient" in finished.stdout
    losses = re.search(r"loss: ([\d.]+) at the first step, ([\d.]+) at step 8", finished.stdout)
    assert float(losses[2]) < float(losses[1])
    assert "The loss agrees with the unsharded run" in finished.stdout


def test_without_torchrun_it_says_how() -> None:
    finished = run_example(str(EXAMPLES / "train_sharded.py"))

    assert finished.returncode == 1
    assert finished.stderr.startswith("Start it with: torchrun")
