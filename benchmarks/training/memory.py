"""Peak memory of training one table, in a process of its own.

python -m benchmarks.training.memory TRAINER NUM_EMBEDDINGS EMBEDDING_DIM TOKENS

prints the bytes of the table and the most that the process held beside what it held before.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
STEPS = 5


def peak_bytes() -> int:
    """The most real memory that this process has held."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def available() -> bool:
    """Whether this system tells."""
    return STATUS.exists()


def measure(trainer_key: str, num_embeddings: int, width: int, tokens: int) -> tuple[int, int]:
    """The table's bytes and the peak, measured by a child process."""
    command = [sys.executable, "-m", __name__, trainer_key]
    command += [str(number) for number in (num_embeddings, width, tokens)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table, peak = output.split()
    return int(table), int(peak)


def main(arguments: Sequence[str]) -> None:
    from benchmarks.training.trainers import TRAINERS

    (trainer,) = [trainer for trainer in TRAINERS if trainer.key == arguments[0]]
    num_embeddings, width, tokens = map(int, arguments[1:])
    grad_output = torch.ones(tokens, width)
    # What a first step loads is no memory of the table's.
    small = trainer.build(torch.zeros(1000, width), 0.1)
    small.step(torch.randint(1000, (tokens,)), grad_output)
    before = peak_bytes()
    weight = torch.empty(num_embeddings, width).uniform_(-1, 1)
    trained = trainer.build(weight, 0.1)
    for _ in range(STEPS):
        trained.step(torch.randint(num_embeddings, (tokens,)), grad_output)
    print(weight.nbytes, peak_bytes() - before)


if __name__ == "__main__":
    main(sys.argv[1:])
