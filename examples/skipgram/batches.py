"""From the token stream to training batches, with tensor operations only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from skipgram.corpus import Corpus, keep_probability

SUBSAMPLING_THRESHOLD = 1e-4
NEGATIVE_POWER = 0.75


@dataclass(frozen=True)
class Batch:
    """One step's input; column 0 of ``candidates`` is the true context, the rest are negatives."""

    centres: Tensor  # [batch] int64
    candidates: Tensor  # [batch, 1 + negatives] int64


def subsample(corpus: Corpus, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Thin out frequent words; returns the surviving (tokens, files), [num_kept] each."""
    keep = keep_probability(corpus.counts, SUBSAMPLING_THRESHOLD)[corpus.tokens]
    survives = torch.rand(len(keep), generator=generator) < keep
    return corpus.tokens[survives], corpus.files[survives]


def make_pairs(
    tokens: Tensor, files: Tensor, window: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Every (centre, context) pair of one pass over the stream, in both directions.

    A pair ``d`` tokens apart is kept with probability ``(window - d + 1) / window``, which is
    what word2vec's randomly shrunk window comes to, and never joins two files.

    Args:
        tokens: [num_tokens] ids in reading order.
        files: [num_tokens] the file each token came from.
        window: the longest distance between the two words of a pair.
        generator: the source of randomness.

    Returns:
        (centres, contexts), [num_pairs] each, in the dtype of ``tokens``.
    """
    centres, contexts = [], []
    for distance in range(1, min(window, len(tokens) - 1) + 1):
        left, right = tokens[:-distance], tokens[distance:]
        chosen = files[:-distance] == files[distance:]
        chosen &= torch.rand(len(left), generator=generator) * window < window - distance + 1
        left, right = left[chosen], right[chosen]
        centres += [left, right]
        contexts += [right, left]
    if not centres:
        return tokens[:0], tokens[:0]
    return torch.cat(centres), torch.cat(contexts)


class NegativeSampler:
    """Draws word ids with probability proportional to ``count ** 0.75``."""

    def __init__(self, counts: Tensor) -> None:
        weights = counts.double() ** NEGATIVE_POWER  # [vocab_size]
        self.cumulative = (weights.cumsum(0) / weights.sum()).float()  # [vocab_size]
        self.last = len(counts) - 1

    def draw(self, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        """Ids [rows, columns] int64."""
        uniform = torch.rand(rows, columns, generator=generator)
        # In float32 the cumulative sum may end a hair below 1, and a draw may fall past it.
        return torch.searchsorted(self.cumulative, uniform, right=True).clamp_(max=self.last)


def batch_stream(
    corpus: Corpus, batch_size: int, window: int, negatives: int, seed: int
) -> Iterator[Batch]:
    """Batches without end: each pass over the corpus subsamples, pairs and shuffles afresh."""
    generator = torch.Generator().manual_seed(seed)
    sampler = NegativeSampler(corpus.counts)
    while True:
        tokens, files = subsample(corpus, generator)
        centres, contexts = make_pairs(tokens, files, window, generator)
        if len(centres) < batch_size:
            raise ValueError(
                f"the corpus gives {len(centres)} pairs, fewer than one batch of {batch_size}; "
                "read more tokens or use a smaller batch"
            )
        order = torch.randperm(len(centres), generator=generator)
        # The last, shorter batch is left out: every step then does the same amount of work.
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            drawn = sampler.draw(batch_size, negatives, generator)
            positives = contexts[chosen].long().unsqueeze(1)
            yield Batch(centres[chosen].long(), torch.cat([positives, drawn], dim=1))
