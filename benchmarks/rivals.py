"""Lookups of other packages, which are measured where they are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

import torch
from torch import Tensor, nn

from benchmarks.lookup import Lookup, needs

LIGER = "liger_kernel.ops.experimental.embedding"


def installed(*distributions: str) -> str:
    """The first of the distributions that is installed, or else the first."""
    for name in distributions:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    return distributions[0]


def fbgemm(weight: Tensor, padding_idx: int | None) -> Lookup:
    ops = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    table = ops.DenseTableBatchedEmbeddingBagsCodegen(
        [tuple(weight.shape)], pooling_mode=common.PoolingMode.NONE, use_cpu=not weight.is_cuda
    )
    parameter = nn.Parameter(weight)
    del table.weights  # it wants the table flat, and ours is to get the gradient

    def call(indices: Tensor) -> Tensor:
        table.weights = parameter.view(-1)
        # One bag a token; a training loop has its offsets ready, so they are not timed twice.
        return table(indices, offsets(indices.numel())).view(-1, weight.size(1))  # type: ignore[no-any-return]

    @functools.lru_cache
    def offsets(tokens: int) -> Tensor:
        return torch.arange(tokens + 1, device=weight.device)

    return Lookup(call, parameter)


def liger(weight: Tensor, padding_idx: int | None) -> Lookup:
    function = importlib.import_module(LIGER).LigerEmbeddingFunction
    parameter = nn.Parameter(weight)
    return Lookup(lambda indices: function.apply(parameter, indices), parameter)


def liger_missing() -> str | None:
    if not torch.cuda.is_available():
        return "Liger's kernels run on GPUs only"
    return needs(LIGER)()
