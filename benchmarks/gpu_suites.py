"""Cases for GPUs, chosen from two grids that are too long to be run whole.

Language models: V {32,000, 128,256, 256,000} x D {1024, 2048, 4096, 8192} x N {1, 512, 3072, 3073,
16,384, 65,536}. Recommenders: V {1M, 10M, 50M} x D {16, 32, 50, 64, 65, 128} x N {65,536, 1M, 4M}.
Both in bfloat16 and float32, and with every distribution of indices.

Each grid has a centre, from which one axis is varied at a time, all of its values; then a few
corners, where a choice made for the centre would show as wrong. Tokens are Zipf-distributed, as
they are in use, wherever the distribution is not what varies. nn.Embedding changes its backward
between 3072 and 3073 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases import Case

MAX_OUTPUT_BYTES = 2 * 2**30  # what is compared in float64 is some ten times as large
MODES = ("forward-no-grad", "forward-backward", "graph-forward", "graph-forward-backward")
PROVIDERS = (
    "embed_ext",
    "nn.Embedding",
    "embed_ext-deterministic",
    "nn.Embedding-deterministic",
    "embed_ext-sparse",
    "nn.Embedding-sparse",
)
# Its backward adds up hot bfloat16 rows by compare-and-swap: seconds a call for a million tokens.
PROVIDERS_OF_FEW_TOKENS = (*PROVIDERS, "index_select")

VARIED_DISTRIBUTIONS = ("uniform", "zipf-1.2", "all-same", "half-padding", "sorted")

Shape = tuple[int, int, int]  # rows and columns of the table, tokens


def _in_both(shape: Shape, distribution: str = "zipf") -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        yield Case(*shape, distribution, dtype)


def quick() -> Iterator[Case]:
    yield Case(10, 100, 2)
    for tokens in (1, 3073, 16_384):
        yield from _in_both((128_256, 4096, tokens))
    for distribution in ("uniform", "all-same", "half-padding"):
        yield Case(32_000, 4096, 16_384, distribution, "bfloat16")
    yield Case(1_000_000, 16, 65_536, "zipf")
    yield Case(1_000_000, 65, 65_536, "zipf")
    yield from _in_both((10_000_000, 64, 1_000_000))


def llm() -> Iterator[Case]:
    rows, dim, tokens = 128_256, 4096, 16_384
    for varied_tokens in (tokens, 1, 512, 3072, 3073, 65_536):
        yield from _in_both((rows, dim, varied_tokens))
    for distribution in VARIED_DISTRIBUTIONS:
        yield from _in_both((rows, dim, tokens), distribution)
    for varied_dim in (1024, 2048, 8192):
        yield from _in_both((rows, varied_dim, tokens))
    for varied_rows in (32_000, 256_000):
        yield from _in_both((varied_rows, dim, tokens))
    # Many tokens a row, few tokens a row, and one token of the largest table.
    yield from _in_both((32_000, 1024, 65_536))
    yield from _in_both((256_000, 1024, 512))
    yield from _in_both((256_000, 8192, 1))


def recsys() -> Iterator[Case]:
    rows, dim, tokens = 10_000_000, 64, 1_000_000
    for varied_dim in (dim, 16, 32, 50, 65, 128):
        yield from _in_both((rows, varied_dim, tokens))
    for distribution in VARIED_DISTRIBUTIONS:
        yield from _in_both((rows, dim, tokens), distribution)
    for varied_tokens in (65_536, 4_000_000):
        yield from _in_both((rows, dim, varied_tokens))
    for varied_rows in (1_000_000, 50_000_000):
        yield from _in_both((varied_rows, dim, tokens))
    # A table that fits the L2 cache, hot rows in wide ones, and the largest gradient.
    yield from _in_both((1_000_000, 16, 65_536))
    yield from _in_both((1_000_000, 128, 4_000_000))
    yield from _in_both((50_000_000, 128, 65_536))
