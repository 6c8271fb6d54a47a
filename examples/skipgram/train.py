"""Models trained in turns on the same batches, every phase of every step timed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice, permutations
from statistics import median

import torch
from torch import nn

from skipgram.batches import Batch
from skipgram.model import OPTIMIZERS, EmbeddingClass, SkipGram

PHASES = ("data", "forward", "backward", "optimizer")

# All do the same float32 maths; only the order in which a row's gradients are added may
# differ. That is about 1e-7 of a gradient per step, which training carries forward: adding in the
# reverse order moved the curve by 7e-6 in 120 full-size steps. A gradient that drops the repeats
# of a word moves it by far more than this bound within a dozen.
LOSS_RTOL = 1e-3


@dataclass
class Contender:
    """One model and its optimizer in training, with what was recorded of it."""

    name: str
    model: SkipGram
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})

    def step(self, batch: Batch, data_seconds: float) -> None:
        """One optimizer step; ``data_seconds`` is what making the batch took."""
        started = time.perf_counter()
        loss = self.model(batch)
        forward_done = time.perf_counter()
        loss.backward()
        backward_done = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        finished = time.perf_counter()

        self.losses.append(loss.item())
        self.seconds["data"].append(data_seconds)
        self.seconds["forward"].append(forward_done - started)
        self.seconds["backward"].append(backward_done - forward_done)
        self.seconds["optimizer"].append(finished - backward_done)

    def median_ms(self) -> dict[str, float]:
        """The median time of each phase, and of the whole step as ``total``."""
        per_step = [sum(phases) for phases in zip(*self.seconds.values(), strict=True)]
        medians = {phase: 1e3 * median(times) for phase, times in self.seconds.items()}
        return {**medians, "total": 1e3 * median(per_step)}


def make_contender(
    name: str,
    embedding: EmbeddingClass,
    vocab_size: int,
    *,
    dim: int,
    optimizer: str,
    lr: float | None,
    by_rows: bool = False,
) -> Contender:
    """A model over ``embedding`` and its optimizer; ``lr=None`` takes the optimizer's own rate.

    ``by_rows`` takes the class of ``embed_ext.optim`` in place of torch's, and sparse gradients.
    """
    choice = OPTIMIZERS[optimizer]
    model = SkipGram(embedding, vocab_size, dim, choice.sparse or by_rows)
    build = choice.by_rows if by_rows else choice.build
    return Contender(name, model, build(model.parameters(), lr=choice.lr if lr is None else lr))


def train_side_by_side(
    contenders: list[Contender], batches: Iterator[Batch], steps: int
) -> Iterator[int]:
    """Train all ``contenders`` on the same ``steps`` batches, yielding each finished step.

    They start from the first one's weights and go in every order in turn, so that neither a busy
    moment of the machine nor a warm cache favours one of them.
    """
    start = contenders[0].model.state_dict()
    for other in contenders[1:]:
        other.model.load_state_dict(start)
    for step, order in enumerate(islice(cycle(permutations(contenders)), steps)):
        started = time.perf_counter()
        batch = next(batches)
        data_seconds = time.perf_counter() - started
        for contender in order:
            contender.step(batch, data_seconds)
        yield step


def with_progress(finished: Iterable[int], steps: int, contenders: list[Contender]) -> None:
    """Drive the training, with a bar on a terminal and about ten plain lines elsewhere."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            bar = tqdm(finished, total=steps, unit="step")
            for _ in bar:
                bar.set_postfix({c.name: f"{c.losses[-1]:.3f}" for c in contenders})
            return
    every = max(1, steps // 10)
    for step in finished:
        if (step + 1) % every == 0 or step + 1 == steps:
            losses = ", ".join(f"{c.name} {c.losses[-1]:.4f}" for c in contenders)
            print(f"step {step + 1:>5}/{steps}  loss: {losses}", file=sys.stderr, flush=True)


def largest_disagreement(left: list[float], right: list[float]) -> float:
    """The largest relative difference between two loss curves, infinite if one is not finite."""
    expected = torch.tensor(left, dtype=torch.float64)
    actual = torch.tensor(right, dtype=torch.float64)
    difference = (actual - expected).abs() / expected.abs()
    return float(torch.nan_to_num(difference, nan=torch.inf).max())


def weight_distance(left: nn.Module, right: nn.Module) -> float:
    """The distance between all parameters of two models, relative to the length of the first's."""
    a = nn.utils.parameters_to_vector(left.parameters()).detach()
    b = nn.utils.parameters_to_vector(right.parameters()).detach()
    return float((a - b).norm() / a.norm())
