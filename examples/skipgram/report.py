"""What the run found, as text."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from skipgram.corpus import Corpus
from skipgram.memory import Memory
from skipgram.model import SkipGram
from skipgram.train import PHASES, Contender, largest_disagreement, weight_distance

# A word seen a handful of times has barely moved from its random start; it would only add noise.
MIN_COUNT_OF_NEIGHBOUR = 100


def machine() -> str:
    """One line on what the figures were measured with."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.machine()}, threads {torch.get_num_threads()}, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}"
    )


@torch.no_grad()
def nearest(corpus: Corpus, model: SkipGram, word: str, count: int) -> list[str]:
    """The ``count`` words whose centre vectors point most nearly the way of ``word``'s.

    Only words that occur at least ``MIN_COUNT_OF_NEIGHBOUR`` times are considered, or the more
    frequent half of a vocabulary too small to have ``count`` of them.
    """
    frequent = int((corpus.counts >= MIN_COUNT_OF_NEIGHBOUR).sum())
    if frequent <= count:
        frequent = max(count + 1, len(corpus.words) // 2)
    query = corpus.ids[word]
    vectors: Tensor = F.normalize(model.inputs.weight, dim=1)  # [vocab_size, dim]
    similarity = vectors[:frequent] @ vectors[query]  # [frequent]
    if query < frequent:
        similarity[query] = -torch.inf
    best = similarity.topk(min(count, frequent - 1)).indices
    return [corpus.words[i] for i in best.tolist()]


def neighbour_lines(
    corpus: Corpus, contenders: list[Contender], words: Iterable[str], count: int = 6
) -> list[str]:
    """One line per word known to the corpus; a second one where the models answer differently."""
    lines = []
    for word in words:
        if word not in corpus.ids:
            continue
        answers = {c.name: ", ".join(nearest(corpus, c.model, word, count)) for c in contenders}
        if len(set(answers.values())) == 1:
            lines.append(f"  {word:<9} {next(iter(answers.values()))}")
        else:
            lines += [f"  {word:<9} {answer}  ({name})" for name, answer in answers.items()]
    return lines


def time_lines(contenders: list[Contender]) -> list[str]:
    """A table of median times: a column per contender, and how many times the first one's speed."""
    first, *others = contenders
    medians = [c.median_ms() for c in contenders]
    header = "".join(f"{c.name:>21}{'ratio':>7}" for c in others)
    lines = [f"  {'ms, median':<11}{first.name:>14}{header}"]
    labels = {phase: phase for phase in PHASES} | {"total": "whole step"}
    for phase, label in labels.items():
        theirs, *rest = [median[phase] for median in medians]
        cells = "".join(f"{ms:>21.2f}{theirs / ms:>7.2f}" for ms in rest)
        lines.append(f"  {label:<11}{theirs:>14.2f}{cells}")
    return lines


def loss_lines(contenders: list[Contender], difference: Callable[[Contender], str]) -> list[str]:
    """Where each curve ended and how far from the first, with the ``difference`` of what it did."""
    first, *others = contenders
    lines = [f"  {first.name:<22} {first.losses[-1]:.4f}"]
    for other in others:
        lines.append(
            f"  {other.name:<22} {other.losses[-1]:.4f}, "
            f"the curve {largest_disagreement(first.losses, other.losses):.1e} apart at most, "
            f"the weights {weight_distance(first.model, other.model):.1e} of their length"
        )
        if difference(other):
            lines.append(f"    not held to the others' curve: {difference(other)}")
    return lines


def memory_lines(memory: dict[str, Memory]) -> list[str]:
    """One line per contender."""
    return [
        f"  {name:<22} {m.training_mib:7.1f} MiB for training, peak {m.peak_mib:7.1f} MiB"
        for name, m in memory.items()
    ]
