"""The command line: options, the run, and its verdict."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

import embed_ext
from skipgram import report
from skipgram.batches import batch_stream
from skipgram.corpus import Corpus, build_corpus, source_files
from skipgram.memory import Memory, measure_memory
from skipgram.model import OPTIMIZERS, EmbeddingClass
from skipgram.train import (
    LOSS_RTOL,
    Contender,
    largest_disagreement,
    make_contender,
    train_side_by_side,
    with_progress,
)

EMBEDDINGS: dict[str, EmbeddingClass] = {
    "nn.Embedding": torch.nn.Embedding,
    "embed_ext.Embedding": embed_ext.Embedding,
    "embed_ext.optim": partial(embed_ext.Embedding, coalesced=True),
}
BY_ROWS = "embed_ext.optim"  # trained by it, on sparse gradients; the others by torch.optim
QUERIES = ("self", "int", "open", "lock", "socket", "json", "thread", "float", "True")
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "output"
SMALL = {"tokens": 300_000, "vocab": 10_000, "dim": 64, "batch": 4096, "steps": 60}
MEMORY_STEPS = 3


@dataclass(frozen=True)
class Options:
    """A run's settings, as the command line gives them."""

    tokens: int
    vocab: int
    dim: int
    window: int
    negatives: int
    batch: int
    steps: int
    optimizer: str
    lr: float | None
    seed: int
    threads: int
    out: Path


def parse_options(arguments: list[str] | None = None) -> Options:
    """Options from ``arguments`` (by default the process's own)."""
    parser = argparse.ArgumentParser(
        prog="train_skipgram.py",
        description="Train skip-gram with negative sampling on Python's own source, with "
        "nn.Embedding, embed_ext.Embedding and embed_ext.optim side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--small", action="store_true", help=f"a short run; the same as {_as_flags(SMALL)}")
    add("--tokens", type=int, default=0, help="words to read (0: the whole standard library)")
    add("--vocab", type=int, default=50_000, help="rows of each table: the most frequent words")
    add("--dim", type=int, default=100, help="columns of each table")
    add("--window", type=int, default=5, help="the longest distance between paired words")
    add("--negatives", type=int, default=5, help="negative samples for each pair")
    add("--batch", type=int, default=16_384, help="pairs in a batch")
    add("--steps", type=int, default=500, help="training steps of each model")
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adagrad",
        help="sparse-*: sparse gradients for all",
    )
    add("--lr", type=float, help="learning rate (without it, one that suits the optimizer)")
    add("--seed", type=int, default=0, help="seed of the weights and of the batches")
    add("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    add("--out", type=Path, default=DEFAULT_OUTPUT, help="folder for the plot and the figures")
    early, _ = parser.parse_known_args(arguments)
    if early.small:
        parser.set_defaults(**SMALL)  # so that a flag beside --small still has its way
    values = vars(parser.parse_args(arguments))
    del values["small"]
    return Options(**values)


def _as_flags(values: dict[str, int]) -> str:
    return " ".join(f"--{name} {value}" for name, value in values.items())


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; returns 0 if the loss curves agree and 1 if they do not."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    print(report.machine())

    started = time.perf_counter()
    corpus = build_corpus(source_files(), options.tokens, options.vocab)
    print(
        f"Corpus: {len(corpus.tokens):,} tokens, {len(corpus.words):,} different words, "
        f"read in {time.perf_counter() - started:.1f} s",
        flush=True,
    )
    if not len(corpus.tokens):
        print("No Python source found to train on.", file=sys.stderr)
        return 1

    contenders = _train(options, corpus)
    memory = _measure_memory(options, corpus)
    return _conclude(options, corpus, contenders, memory)


def _contender(options: Options, name: str, vocab_size: int) -> Contender:
    return make_contender(
        name,
        EMBEDDINGS[name],
        vocab_size,
        dim=options.dim,
        optimizer=options.optimizer,
        lr=options.lr,
        by_rows=name == BY_ROWS,
    )


def _train(options: Options, corpus: Corpus) -> list[Contender]:
    torch.manual_seed(options.seed)
    contenders = [_contender(options, name, len(corpus.words)) for name in EMBEDDINGS]
    batches = batch_stream(
        corpus, options.batch, options.window, options.negatives, seed=options.seed
    )
    print(
        f"Training with {options.optimizer}: {options.steps} steps of {options.batch:,} "
        f"pairs with {options.negatives} negatives, two tables of "
        f"{len(corpus.words):,} x {options.dim}",
        flush=True,
    )
    finished = train_side_by_side(contenders, batches, options.steps)
    with_progress(finished, options.steps, contenders)
    return contenders


def _measure_memory(options: Options, corpus: Corpus) -> dict[str, Memory]:
    measured = {}
    for name in EMBEDDINGS:
        batches = batch_stream(
            corpus, options.batch, options.window, options.negatives, seed=options.seed
        )
        build = partial(_contender, options, name)
        measured[name] = measure_memory(
            build, len(corpus.words), batches, MEMORY_STEPS, options.threads
        )
    return measured


def _conclude(
    options: Options, corpus: Corpus, contenders: list[Contender], memory: dict[str, Memory]
) -> int:
    compared = [c for c in contenders if not _difference(options, c)]
    disagreement = max(largest_disagreement(compared[0].losses, c.losses) for c in compared[1:])
    agree = disagreement <= LOSS_RTOL

    print("\nNearest neighbours by cosine (two lines where the models differ):")
    print("\n".join(report.neighbour_lines(corpus, contenders, QUERIES)))
    print("\nWhere a step's time goes (the batch is made once, for all):")
    print("\n".join(report.time_lines(contenders)))
    print(f"\nMemory of {MEMORY_STEPS} steps, each model alone, the least of three processes:")
    print("\n".join(report.memory_lines(memory)))

    options.out.mkdir(parents=True, exist_ok=True)
    figures = options.out / "skipgram.json"
    figures.write_text(json.dumps(_figures(options, corpus, contenders, memory), indent=2) + "\n")
    print(f"\nSaved {figures}")
    _plot(options, corpus, contenders, memory, disagreement)

    print(f"\nLoss at first {contenders[0].losses[0]:.4f}, and at the end:")
    print("\n".join(report.loss_lines(contenders, partial(_difference, options))))
    print(
        f"Largest relative difference of the curves {disagreement:.1e}, of which {LOSS_RTOL:.0e} "
        f"is allowed.\nThe loss curves {'agree' if agree else 'DISAGREE'}."
    )
    return 0 if agree else 1


def _difference(options: Options, contender: Contender) -> str:
    """Why a contender need not have the others' curve; empty if it must."""
    return OPTIMIZERS[options.optimizer].difference if contender.name == BY_ROWS else ""


def _plot(
    options: Options,
    corpus: Corpus,
    contenders: list[Contender],
    memory: dict[str, Memory],
    disagreement: float,
) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("No plot: matplotlib is not installed")
        return
    # Here and not above: the processes that measure memory import this module and plot nothing.
    from skipgram.plot import save_plot

    plot = options.out / "skipgram.png"
    title = (
        f"Skip-gram on the standard library of Python: two tables of {len(corpus.words):,} x "
        f"{options.dim}, batches of {options.batch:,} pairs, {options.optimizer}, "
        f"threads {options.threads}"
    )
    save_plot(contenders, memory, disagreement, title, plot)
    print(f"Saved {plot}")


def _figures(
    options: Options, corpus: Corpus, contenders: list[Contender], memory: dict[str, Memory]
) -> dict[str, object]:
    settings = {key: value for key, value in asdict(options).items() if key != "out"}
    return {
        "machine": report.machine(),
        "settings": settings,
        "tokens": len(corpus.tokens),
        "vocab_size": len(corpus.words),
        "losses": {c.name: c.losses for c in contenders},
        "median_ms": {c.name: c.median_ms() for c in contenders},
        "memory_mib": {name: asdict(m) for name, m in memory.items()},
    }
