"""Peak memory of training one table, in a process of its own.

python -m benchmarks.training.memory TRAINER NUM_EMBEDDINGS EMBEDDING_DIM TOKENS

prints the bytes of the table, and the most that the process held beside what it held before it had
one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.memory import peak_bytes, reset_peak, resident_bytes
from benchmarks.processes import output_of

DEVICE = "cpu"
STEPS = 5


def available() -> bool:
    """Whether this system tells: Windows does not."""
    return find_spec("resource") is not None


def measure(trainer_key: str, num_embeddings: int, width: int, tokens: int) -> tuple[int, int]:
    """The table's bytes and the peak, measured by a child process."""
    output = output_of(sys.executable, "-m", __name__, trainer_key, num_embeddings, width, tokens)
    table, peak = output.split()
    return int(table), int(peak)


def main(arguments: Sequence[str]) -> None:
    from benchmarks.training.trainers import TRAINERS

    (trainer,) = [trainer for trainer in TRAINERS if trainer.key == arguments[0]]
    num_embeddings, width, tokens = map(int, arguments[1:])
    grad_output = torch.ones(tokens, width)

    def batch(rows: int) -> list[Tensor]:
        return [torch.randint(rows, (tokens,)) for _ in range(trainer.step.uses)]

    # What a first step loads is no memory of the table's.
    small = trainer.build(torch.zeros(1000, width), 0.1)
    small.step(batch(1000), grad_output)
    before = resident_bytes(DEVICE)
    reset_peak(DEVICE)
    weight = torch.empty(num_embeddings, width).uniform_(-1, 1)
    trained = trainer.build(weight, 0.1)
    for _ in range(STEPS):
        trained.step(batch(num_embeddings), grad_output)
    print(weight.nbytes, peak_bytes(DEVICE) - before)


if __name__ == "__main__":
    main(sys.argv[1:])
