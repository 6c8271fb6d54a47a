"""Where the examples are, and a corpus small enough to train on in a test."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from skipgram import corpus  # noqa: E402


def tiny_corpus() -> corpus.Corpus:
    return corpus.build_corpus(corpus.source_files(), max_tokens=6000, vocab_size=500)
