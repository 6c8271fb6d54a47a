"""Calls recorded as CUDA graphs, so that a replay shows what the GPU does without Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.modes import Mode, deterministic

WARM_UP_CALLS = 3


def replay(
    call: Callable[[Tensor], object], mode: Mode, batches: Sequence[Tensor], is_deterministic: bool
) -> Callable[[Tensor], object]:
    """A function of one of ``batches``, each [tokens], that replays what ``call`` does with it.

    A graph for each batch reads it where it lies, so that a replay copies no indices.
    """
    with torch.set_grad_enabled(mode.grad), deterministic(is_deterministic):
        # What the graphs allocate they share, as they run one after the other.
        pool = torch.cuda.graph_pool_handle()
        graphs = {id(indices): _record(call, indices, pool) for indices in batches}
    return lambda indices: graphs[id(indices)].replay()


def _record(call: Callable[[Tensor], object], indices: Tensor, pool: Any) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):  # what is made once must not be made while recording
            call(indices)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        call(indices)
    return graph
