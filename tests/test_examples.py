"""The examples run, give nn.Embedding's numbers, and fail when an embedding is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import embed_ext
from tests.skipgram_corpus import EXAMPLES, tiny_corpus

from skipgram import batches, cli, corpus, memory, model, report, train  # isort: skip

TINY = {"tokens": 6000, "vocab": 500, "dim": 8, "batch": 256, "steps": 12, "seed": 3}


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example as a user would, with the embed_ext that this test imported."""
    package_root = str(Path(embed_ext.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


# --- the two lookups ---------------------------------------------------------------------------


def expected_lookup(name: str) -> tuple[Tensor, Tensor]:
    """The (indices, output) nn.Embedding gives with the seed of example ``name``."""
    torch.manual_seed(0)
    if name == "lookup_two.py":
        stock = torch.nn.Embedding(num_embeddings=10, embedding_dim=100)
        indices = torch.randint(0, 10, (20,))[:2]
    else:
        stock = torch.nn.Embedding(num_embeddings=10, embedding_dim=3)
        indices = torch.tensor([1, 2, 3, 4])
    return indices, stock(indices)


@pytest.mark.parametrize("name", ["lookup_two.py", "lookup_four.py"])
def test_lookup_gives_the_numbers_of_nn_embedding(name: str) -> None:
    _, expected = expected_lookup(name)

    names = runpy.run_path(str(EXAMPLES / name))

    assert type(names["embedding"]) is embed_ext.Embedding
    assert torch.equal(names["output"], expected)
    assert names["output"].grad_fn is not None


@pytest.mark.parametrize("name", ["lookup_two.py", "lookup_four.py"])
def test_lookup_prints_what_it_looked_up(name: str) -> None:
    indices, expected = expected_lookup(name)

    finished = run_script(name)

    assert finished.returncode == 0, finished.stderr
    if name == "lookup_two.py":
        printed = f"{indices}\n{expected.shape}\n"
        shown = expected[:, :4]
    else:
        printed = ""
        shown = expected
    # The numbers are nn.Embedding's; only the name of the autograd node is embed_ext's own.
    numbers = str(shown).split(", grad_fn")[0]
    assert finished.stdout.startswith(printed + numbers)
    assert ("grad_fn=<" in finished.stdout) and ("Backward" in finished.stdout)


# --- training ----------------------------------------------------------------------------------


class ForgetfulEmbedding(torch.nn.Embedding):
    """A wrong gather: looking a row up twice passes on the gradient of one of the two."""

    def forward(self, input: Tensor) -> Tensor:
        flat = input.flatten()
        position = torch.zeros(self.num_embeddings, dtype=torch.int64)
        position[flat] = torch.arange(len(flat))
        counted = torch.zeros(len(flat), 1)
        counted[position[flat]] = 1.0
        output = super().forward(flat)
        output = output * counted + output.detach() * (1 - counted)
        return output.view(*input.shape, -1)


def disagreement_with_stock(
    rival: model.EmbeddingClass,
    optimizer: str,
    *,
    by_rows: bool = False,
    batch_size: int = 512,
    steps: int = 12,
) -> float:
    """How far the loss curve of ``rival`` is from nn.Embedding's in a tiny training."""
    text = tiny_corpus()
    torch.manual_seed(0)
    # The stock rate of plain SGD is for batches that meet each word less often than these.
    lr = 10.0 if optimizer in ("sgd", "sparse-sgd") else None
    make = partial(
        train.make_contender, vocab_size=len(text.words), dim=8, optimizer=optimizer, lr=lr
    )
    stock = make("stock", torch.nn.Embedding)
    other = make("rival", rival, by_rows=by_rows)
    stream = batches.batch_stream(text, batch_size, window=3, negatives=4, seed=0)
    for _ in train.train_side_by_side([stock, other], stream, steps):
        pass
    assert stock.losses[-1] < stock.losses[0]
    return train.largest_disagreement(stock.losses, other.losses)


@pytest.mark.parametrize("optimizer", model.OPTIMIZERS)
def test_loss_curves_agree_under_every_optimizer(optimizer: str) -> None:
    assert disagreement_with_stock(embed_ext.Embedding, optimizer) <= train.LOSS_RTOL


@pytest.mark.parametrize(
    "optimizer", [name for name, choice in model.OPTIMIZERS.items() if not choice.difference]
)
def test_rows_trained_by_embed_ext_optim_have_the_curve_of_torchs_optimizer(optimizer: str) -> None:
    # A pass over the tiny corpus is 29 such batches: three passes, and rows that come and go.
    table = partial(embed_ext.Embedding, coalesced=True)
    apart = disagreement_with_stock(table, optimizer, by_rows=True, batch_size=128, steps=87)
    assert apart <= 1e-6


def test_a_wrong_gradient_is_noticed() -> None:
    assert disagreement_with_stock(ForgetfulEmbedding, "adagrad") > 10 * train.LOSS_RTOL


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_never_agrees(broken: float) -> None:
    assert train.largest_disagreement([1.0, 2.0], [1.0, broken]) > train.LOSS_RTOL
    assert train.largest_disagreement([1.0, broken], [1.0, broken]) > train.LOSS_RTOL


@pytest.mark.parametrize("name", ["embed_ext.Embedding", "embed_ext.optim"])
def test_main_fails_when_the_curves_disagree(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ForgetfulEmbedding
    monkeypatch.setitem(cli.EMBEDDINGS, name, wrong)
    monkeypatch.setattr(cli, "_measure_memory", lambda options, text: {})

    assert cli.main([*tiny_flags(), "--out", str(tmp_path)]) == 1
    assert "DISAGREE" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adam", "sparse-adam"])
def test_main_says_what_an_optimizer_does_differently(
    optimizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "_measure_memory", lambda options, text: {})

    flags = ["--optimizer", optimizer, "--lr", "0.1", "--out", str(tmp_path)]
    assert cli.main([*tiny_flags(), *flags]) == 0
    printed = capsys.readouterr().out
    assert f"not held to the others' curve: {model.OPTIMIZERS[optimizer].difference}" in printed
    curves = json.loads((tmp_path / "skipgram.json").read_text())["losses"]
    stock, same, rows = curves.values()
    assert train.largest_disagreement(stock, same) <= train.LOSS_RTOL
    assert train.largest_disagreement(stock, rows) > train.LOSS_RTOL


def test_nearest_word_is_the_most_similar_one() -> None:
    text = corpus.Corpus(
        words=["a", "b", "c"],
        counts=torch.tensor([300, 200, 200]),
        tokens=torch.zeros(0, dtype=torch.int32),
        files=torch.zeros(0, dtype=torch.int32),
    )
    skipgram = model.SkipGram(torch.nn.Embedding, vocab_size=3, dim=2, sparse=False)
    with torch.no_grad():
        skipgram.inputs.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.1], [5.0, 1.0]]))

    assert report.nearest(text, skipgram, "a", count=2) == ["c", "b"]


@pytest.mark.slow
def test_memory_counts_the_tables_and_their_gradients() -> None:
    stream = batches.batch_stream(tiny_corpus(), 256, window=3, negatives=4, seed=0)
    build = partial(
        train.make_contender, "stock", torch.nn.Embedding, dim=64, optimizer="sgd", lr=0.1
    )

    measured = memory.measure_memory(build, 2**16, stream, steps=2, threads=1)

    tables = 2 * 2**16 * 64 * 4 / memory.MIB
    assert 1.8 * tables < measured.training_mib < 4 * tables


# --- the demo as a whole -----------------------------------------------------------------------


def tiny_flags() -> list[str]:
    return [part for name, value in TINY.items() for part in (f"--{name}", str(value))]


def test_small_is_only_a_default() -> None:
    options = cli.parse_options(["--small", "--steps", "7"])

    assert options.steps == 7
    assert options.vocab == cli.SMALL["vocab"]


@pytest.mark.slow
def test_demo_runs_and_leaves_its_figures(tmp_path: Path) -> None:
    finished = run_script(
        "train_skipgram.py", *tiny_flags(), "--threads", "1", "--out", str(tmp_path / "out")
    )

    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "The loss curves agree." in finished.stdout
    assert re.search(r"^  self +\w+", finished.stdout, re.MULTILINE)
    assert "step    12/12" in finished.stderr
    plot = tmp_path / "out" / "skipgram.png"
    if importlib.util.find_spec("matplotlib"):
        assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    else:
        assert "No plot: matplotlib is not installed" in finished.stdout
        assert not plot.exists()

    figures = json.loads((tmp_path / "out" / "skipgram.json").read_text())
    names = ["nn.Embedding", "embed_ext.Embedding", "embed_ext.optim"]
    assert figures["settings"]["seed"] == 3
    assert list(figures["losses"]) == list(figures["median_ms"]) == names
    assert all(len(losses) == 12 for losses in figures["losses"].values())
    for name in names:
        assert set(figures["median_ms"][name]) == {*train.PHASES, "total"}
        assert figures["memory_mib"][name]["peak_mib"] >= figures["memory_mib"][name]["before_mib"]
