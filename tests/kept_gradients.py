"""Pairs of tables to compare: one that keeps its gradient's memory, and an equal one."""

from __future__ import annotations

import torch

import embed_ext

ROWS, WIDTH, TOKENS = 300, 24, 40
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


Kept = embed_ext.Embedding


def tables(dtype: torch.dtype = torch.float32, **options: object) -> tuple[Kept, Kept]:
    """One that keeps its gradient, and an equal one that does not."""
    kept = embed_ext.Embedding(ROWS, WIDTH, dtype=dtype, keep_grad_buffer=True, **options)
    plain = embed_ext.Embedding(ROWS, WIDTH, dtype=dtype, **options)
    plain.load_state_dict(kept.state_dict())
    return kept, plain


def backward(module: Kept, seed: int, tokens: int = TOKENS) -> None:
    # integers, whose sums are exact in any order
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(ROWS, (tokens,), generator=generator)
    grad = torch.randint(-3, 4, (tokens, WIDTH), generator=generator).to(module.weight.dtype)
    module(indices).backward(grad)


def assert_same_grad(kept: Kept, plain: Kept) -> None:
    torch.testing.assert_close(kept.weight.grad, plain.weight.grad, rtol=0, atol=0)


def memory_of(module: Kept) -> int:
    return module.weight.grad.data_ptr()
