"""Clipping of gradients that several processes share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import utils

import embed_ext
from tests.common import assert_close, make_table
from tests.distributed.common import mesh, place, run_ranks, whole

from torch.distributed.tensor import Shard  # isort: skip


def check_dense_gradients() -> None:
    ranks = mesh(2)
    grads = [make_table(10, 5, seed=seed) for seed in range(2)]
    for norm_type in (2.0, 1.0, torch.inf, -torch.inf):
        shared, single = [], []
        for grad in grads:
            single.append(nn.Parameter(torch.zeros_like(grad)))
            single[-1].grad = grad.clone()
            shared.append(nn.Parameter(place(torch.zeros_like(grad), ranks, Shard(0))))
            shared[-1].grad = place(grad, ranks, Shard(0))
        norm = embed_ext.clip_grad_norm_(shared, 0.5, norm_type)
        assert_close(whole(norm), utils.clip_grad_norm_(single, 0.5, norm_type))
        embed_ext.clip_grad_value_(shared, 0.01)
        utils.clip_grad_value_(single, 0.01)
        for parameter, other in zip(shared, single, strict=True):
            assert_close(whole(parameter.grad), other.grad)


def test_dense_gradients_are_torchs_to_clip() -> None:
    run_ranks(check_dense_gradients, 2)
