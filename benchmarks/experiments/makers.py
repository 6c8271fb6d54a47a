"""The modules that the experiments compare, by the names that the results have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

import embed_ext
from benchmarks.providers import BASELINE, KEPT, SUBJECT

# From num_embeddings and embedding_dim.
MAKERS: Mapping[str, Callable[[int, int], nn.Embedding]] = {
    BASELINE: nn.Embedding,
    SUBJECT: embed_ext.Embedding,
    KEPT: partial(embed_ext.Embedding, keep_grad_buffer=True),
}
