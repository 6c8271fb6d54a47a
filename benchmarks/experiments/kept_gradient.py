"""The backward of a training loop, and what copying its rows into place costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import embed_ext

ROUNDS = 15
TABLES = [
    (1_000_000, 64, 65_536),
    (1_000_000, 64, 4096),
    (128_256, 1024, 4096),
    (32_000, 512, 2048),
    (100_000, 128, 4096),
]


def measure(num_embeddings: int, embedding_dim: int, tokens: int) -> dict[str, float]:
    """Medians in seconds; everyone takes turns, each with a batch of its own in each round."""
    kept = embed_ext.Embedding(num_embeddings, embedding_dim, keep_grad_buffer=True)
    weight = kept.weight.detach()
    modules: dict[str, nn.Embedding] = {
        "keep_grad_buffer": kept,
        "default": embed_ext.Embedding.from_pretrained(weight, freeze=False),  # type: ignore[no-untyped-call]
        "nn.Embedding": nn.Embedding.from_pretrained(weight, freeze=False),  # type: ignore[no-untyped-call]
    }
    grad_output = torch.rand(tokens, embedding_dim)
    table = torch.zeros(num_embeddings, embedding_dim)
    batches = [torch.randint(num_embeddings, (tokens,)) for _ in range(4)]
    times: dict[str, list[float]] = {name: [] for name in [*modules, "rows copied into place"]}
    for step in range(ROUNDS + len(batches)):  # the first ones fill the kept memory's pages
        indices = batches[step % len(batches)]
        for name, module in modules.items():
            output = module(indices)
            times[name].append(_timed(partial(_step, module, output, grad_output)))
        copy = partial(table.index_copy_, 0, indices, grad_output)
        times["rows copied into place"].append(_timed(copy))
    return {name: sorted(seconds[len(batches) :])[ROUNDS // 2] for name, seconds in times.items()}


def _step(module: nn.Embedding, output: torch.Tensor, grad_output: torch.Tensor) -> None:
    output.backward(grad_output)  # type: ignore[no-untyped-call]
    module.zero_grad()


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
