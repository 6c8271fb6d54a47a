"""The corpus: identifiers and words of the running Python's standard library."""

from __future__ import annotations

import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

WORD = re.compile(r"[A-Za-z_]\w*")

# What other people installed next to the standard library differs from machine to machine.
FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages"})


@dataclass(frozen=True)
class Corpus:
    """A token stream over a vocabulary ordered from the most to the least frequent word."""

    words: list[str]  # word of each id
    counts: Tensor  # [vocab_size] int64, occurrences of each id
    tokens: Tensor  # [num_tokens] int32, ids in reading order
    files: Tensor  # [num_tokens] int32, non-decreasing: the file each token came from

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each word."""
        return {word: i for i, word in enumerate(self.words)}


def source_files(root: Path | None = None) -> list[Path]:
    """Every Python file under ``root`` (by default the standard library), in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in FOREIGN_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def build_corpus(files: Iterable[Path], max_tokens: int, vocab_size: int) -> Corpus:
    """Tokenise ``files`` until ``max_tokens`` words are read (0: all of them).

    Words outside the ``vocab_size`` most frequent ones are dropped from the stream, so that a
    window reaches past them to the next known word, as in word2vec.
    """
    documents: list[list[str]] = []
    remaining = max_tokens
    for path in files:
        document = WORD.findall(path.read_text(encoding="utf-8", errors="replace"))
        documents.append(document[:remaining] if max_tokens else document)
        remaining -= len(documents[-1])
        if max_tokens and remaining == 0:
            break

    occurrences: Counter[str] = Counter()
    for document in documents:
        occurrences.update(document)
    # most_common keeps words of equal count in order of first appearance: ids are reproducible.
    vocabulary = occurrences.most_common(vocab_size)
    ids = {word: i for i, (word, _) in enumerate(vocabulary)}
    encoded = [[ids[word] for word in document if word in ids] for document in documents]
    lengths = torch.tensor([len(document) for document in encoded])
    return Corpus(
        words=list(ids),
        counts=torch.tensor([count for _, count in vocabulary], dtype=torch.int64),
        tokens=torch.tensor([i for document in encoded for i in document], dtype=torch.int32),
        files=torch.arange(len(encoded), dtype=torch.int32).repeat_interleave(lengths),
    )


def keep_probability(counts: Tensor, threshold: float) -> Tensor:
    """How likely an occurrence of each word survives subsampling, word2vec's ``sqrt(t / f)``.

    Args:
        counts: [vocab_size] occurrences of each word.
        threshold: the frequency above which a word is thinned out.

    Returns:
        [vocab_size] probabilities in float32.
    """
    frequency = counts.double() / counts.sum()
    return (threshold / frequency).sqrt().clamp(max=1.0).float()
