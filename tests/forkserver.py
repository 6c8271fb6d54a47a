"""Start processes that are forked from one that has loaded what tests use, so that none need to."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from typing import Any

from torch.multiprocessing.spawn import ProcessContext, start_processes

set_forkserver_preload(
    ["pytest", "torch._dynamo", "torch.distributed.tensor.parallel", "torch.testing", "embed_ext"]
)


def start(function: Callable[..., None], args: tuple[Any, ...], count: int) -> ProcessContext:
    """Call function(rank, *args), which can be pickled, in each of `count` processes.

    ``join()`` of what is returned raises the first error of one of them.
    """
    return start_processes(function, args, count, join=False, start_method="forkserver")
