"""Named sets of cases."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks import gpu_suites
from benchmarks.cases import Case
from benchmarks.providers import BASELINE, KEPT, SUBJECT
from benchmarks.steps import OPTIMIZERS, Step, combine

MAX_OUTPUT_BYTES = 512 * 2**20
LOW_PRECISION = "bfloat16"


@dataclass(frozen=True)
class Suite:
    name: str
    description: str
    cases: tuple[Case, ...]
    max_output_bytes: int = MAX_OUTPUT_BYTES
    # What is measured unless the command line says otherwise; if empty, what is usual.
    modes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    # What is measured beside that, at one number of tokens.
    extra_modes: tuple[str, ...] = ()
    extra_tokens: int = 0


def _tiny() -> Iterable[Case]:
    yield Case(10, 100, 2)
    yield Case(10, 3, 4)


def _quick() -> Iterable[Case]:
    yield from _tiny()
    yield Case(100, 100, 256)
    yield Case(100_000, 128, 4096)
    yield Case(100_000, 128, 4096, "zipf")
    yield Case(1_000_000, 64, 4096)
    yield Case(50_257, 768, 2048, "zipf")
    yield Case(50_257, 768, 2048, "zipf", LOW_PRECISION)
    yield Case(32_000, 512, 8192, "half-padding")


def _cpu() -> Iterable[Case]:
    tables = [
        (100, 100),
        (100_000, 128),
        (32_000, 512),
        (1_000_000, 16),
        (1_000_000, 64),
        (50_257, 768),
        (32_000, 4096),
        (128_256, 1024),
    ]
    for table in tables:
        for tokens in (1, 16, 256, 4096, 32_768, 262_144):
            yield Case(*table, tokens)
        for tokens in (4096, 32_768, 262_144):
            yield Case(*table, tokens, "zipf")
        for distribution in ("all-same", "sorted", "half-padding"):
            yield Case(*table, 32_768, distribution)
        for tokens, distribution in ((16, "uniform"), (4096, "uniform"), (32_768, "zipf")):
            yield Case(*table, tokens, distribution, LOW_PRECISION)


def _scaling() -> Iterable[Case]:
    for num_embeddings in (1000, 10_000, 100_000, 1_000_000, 4_000_000):
        yield Case(num_embeddings, 64, 4096)
    for tokens in (1, 16, 256, 4096, 32_768, 262_144):
        yield Case(1_000_000, 64, tokens)


def _llm() -> Iterable[Case]:
    for table in ((50_257, 768), (32_000, 4096), (128_256, 2048)):
        for tokens in (1, 2048, 16_384):
            for dtype in ("float32", LOW_PRECISION):
                yield Case(*table, tokens, "zipf", dtype)


def _recsys() -> Iterable[Case]:
    for table in ((100_000, 128), (1_000_000, 64), (10_000_000, 16)):
        for tokens in (4096, 65_536, 262_144):
            for distribution in ("uniform", "zipf"):
                yield Case(*table, tokens, distribution)


STEP_MODES = tuple(step.name for step in combine(["sgd"], [False, True], [1, 2]))
STEP_TOKENS = 4096
EXTRA_STEPS = (
    Step("adamw"),
    Step("adagrad"),
    Step(uses=4),
    Step(tied=True),
    Step(accumulate=4),
    Step(clip=True, foreach=False),
)


STEP_TABLES = ((100, 100), (200_000, 64), (32_000, 512), (1_000_000, 64), (50_257, 768))


def _optimizer_modes() -> Iterable[str]:
    for foreach in (None, True):  # by default torch goes without it on a CPU
        for step in combine(list(OPTIMIZERS), [False, True], [1], foreach=foreach):
            yield step.name


def _optimizers() -> Iterable[Case]:
    for table in STEP_TABLES:
        yield Case(*table, STEP_TOKENS, "zipf-sorted")


def _step() -> Iterable[Case]:
    for table in STEP_TABLES:
        for tokens in (64, STEP_TOKENS, 16_384 if table[1] == 768 else 65_536):
            for distribution in ("uniform", "zipf", "zipf-sorted"):
                yield Case(*table, tokens, distribution)


def _suite(name: str, description: str, cases: Iterable[Case]) -> Suite:
    unique = dict.fromkeys(case for case in cases if case.output_bytes <= MAX_OUTPUT_BYTES)
    return Suite(name, description, tuple(unique))


def _gpu_suite(
    name: str, description: str, cases: Iterable[Case], providers: tuple[str, ...]
) -> Suite:
    limit = gpu_suites.MAX_OUTPUT_BYTES
    unique = dict.fromkeys(case for case in cases if case.output_bytes <= limit)
    return Suite(name, description, tuple(unique), limit, gpu_suites.MODES, providers)


SUITES = {
    suite.name: suite
    for suite in (
        _suite("tiny", "two calls whose cost is overhead alone; seconds", _tiny()),
        _suite("quick", "one case of each kind; a minute or two", _quick()),
        _suite("cpu", "the whole grid of tables, tokens and distributions; long", _cpu()),
        _suite("scaling", "cost against table size, tokens and threads", _scaling()),
        _suite("llm", "vocabularies of language models, Zipf tokens", _llm()),
        _suite("recsys", "tall tables of recommenders, large batches", _recsys()),
        Suite(
            "step",
            "whole training steps: optimizers, clipping, several uses; half an hour",
            tuple(_step()),
            modes=("forward-backward", *STEP_MODES),
            providers=(SUBJECT, BASELINE, KEPT),
            extra_modes=tuple(step.name for step in EXTRA_STEPS),
            extra_tokens=STEP_TOKENS,
        ),
        Suite(
            "optimizers",
            "whole training steps, every optimizer, clipped or not, foreach or not; twenty minutes",
            tuple(_optimizers()),
            modes=tuple(_optimizer_modes()),
            providers=(SUBJECT, BASELINE, KEPT),
        ),
        _gpu_suite(
            "gpu-quick",
            "for a GPU: one case of each kind; a minute",
            gpu_suites.quick(),
            gpu_suites.PROVIDERS_OF_FEW_TOKENS,
        ),
        _gpu_suite(
            "gpu-llm",
            "for a GPU: vocabularies of language models, chosen from a grid",
            gpu_suites.llm(),
            gpu_suites.PROVIDERS_OF_FEW_TOKENS,
        ),
        _gpu_suite(
            "gpu-recsys",
            "for a GPU: tall tables, large batches, chosen from a grid",
            gpu_suites.recsys(),
            gpu_suites.PROVIDERS,
        ),
    )
}


def select_cases(
    suite: str,
    *,
    patterns: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    index_dtype: str = "int64",
) -> list[Case]:
    """The suite's cases whose names match any of the patterns, in each of the dtypes.

    A pattern is a part of a name, such as ``zipf``, or a glob, such as ``100000x*/4096/*``.
    ``dtypes`` replaces the dtypes that the suite asks for.
    """
    chosen = SUITES[suite]
    cases = [replace(case, index_dtype=index_dtype) for case in chosen.cases]
    if dtypes:
        cases = [replace(case, dtype=dtype) for case in cases for dtype in dtypes]
        cases = [c for c in dict.fromkeys(cases) if c.output_bytes <= chosen.max_output_bytes]
    if patterns:
        globs = [f"*{pattern}*" for pattern in patterns]
        cases = [c for c in cases if any(fnmatch.fnmatchcase(c.name, glob) for glob in globs)]
    return cases
