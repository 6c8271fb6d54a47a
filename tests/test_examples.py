"""The examples run, give nn.Embedding's numbers, and fail when an embedding is wrong."""

from __future__ import annotations

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

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from skipgram import batches, cli, corpus, memory, model, report, train  # noqa: E402

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


def tiny_corpus() -> corpus.Corpus:
    return corpus.build_corpus(corpus.source_files(), max_tokens=6000, vocab_size=500)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


# --- the corpus --------------------------------------------------------------------------------


def test_source_files_are_the_standard_library_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a.py", "site-packages/theirs.py", "notes.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("x = 1\n")

    found = [path.relative_to(tmp_path).as_posix() for path in corpus.source_files(tmp_path)]

    assert found == ["a.py", "a/z.py", "b.py"]
    assert any(path.name == "tokenize.py" for path in corpus.source_files())


def test_corpus_of_known_files(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("a = b + a  # rare a")
    (tmp_path / "two.py").write_text("b(a, 3)")

    built = corpus.build_corpus(corpus.source_files(tmp_path), max_tokens=0, vocab_size=2)

    assert built.words == ["a", "b"]
    assert built.counts.tolist() == [4, 2]
    assert built.tokens.tolist() == [0, 1, 0, 0, 1, 0]  # "rare" is not in the vocabulary
    assert built.files.tolist() == [0, 0, 0, 0, 1, 1]
    assert built.ids == {"a": 0, "b": 1}


def test_corpus_stops_at_max_tokens_and_repeats_itself() -> None:
    first, second = tiny_corpus(), tiny_corpus()

    assert first.words == second.words
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.files, second.files)
    assert torch.equal(first.tokens.long().bincount(minlength=500), first.counts)
    everything = corpus.build_corpus(corpus.source_files(), max_tokens=6000, vocab_size=6000)
    assert len(everything.tokens) == 6000


def test_keep_probability_thins_out_only_the_frequent() -> None:
    counts = torch.tensor([900, 90, 10])

    keep = corpus.keep_probability(counts, threshold=0.09)

    torch.testing.assert_close(keep, torch.tensor([0.1**0.5, 1.0, 1.0]))


# --- pairs and negatives -----------------------------------------------------------------------


def test_neighbouring_pairs_are_all_there_and_stay_in_their_file() -> None:
    tokens = torch.tensor([10, 11, 12, 20, 21], dtype=torch.int32)
    files = torch.tensor([0, 0, 0, 1, 1])

    centres, contexts = batches.make_pairs(tokens, files, window=1, generator=generator())

    pairs = set(zip(centres.tolist(), contexts.tolist(), strict=True))
    assert pairs == {(10, 11), (11, 10), (11, 12), (12, 11), (20, 21), (21, 20)}
    assert len(centres) == len(pairs)


def test_distant_pairs_are_kept_as_often_as_word2vec_keeps_them() -> None:
    tokens = torch.arange(40_000)

    centres, contexts = batches.make_pairs(
        tokens, torch.zeros_like(tokens), window=4, generator=generator()
    )

    distances = (centres - contexts).abs().bincount(minlength=5)[1:]
    expected = 2 * 40_000 * torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(distances.float(), expected, rtol=0.03, atol=0.0)


@pytest.mark.parametrize("length", [0, 1])
def test_no_pairs_in_a_stream_too_short_for_one(length: int) -> None:
    tokens = torch.zeros(length, dtype=torch.int32)

    centres, contexts = batches.make_pairs(tokens, tokens, window=5, generator=generator())

    assert centres.tolist() == contexts.tolist() == []


def test_negatives_follow_the_smoothed_counts() -> None:
    counts = torch.tensor([1000, 100, 10, 1])

    drawn = batches.NegativeSampler(counts).draw(20_000, 5, generator())

    weights = counts.double() ** 0.75
    observed = drawn.flatten().bincount(minlength=4).double() / drawn.numel()
    torch.testing.assert_close(observed, weights / weights.sum(), rtol=0.0, atol=0.005)


def test_batches_repeat_themselves_across_passes() -> None:
    text = tiny_corpus()

    def first_batches() -> list[batches.Batch]:
        # One pass holds two such batches, so six take three passes.
        stream = batches.batch_stream(text, batch_size=1024, window=2, negatives=3, seed=1)
        return [next(stream) for _ in range(6)]

    for left, right in zip(first_batches(), first_batches(), strict=True):
        assert left.centres.shape == (1024,)
        assert left.candidates.shape == (1024, 4)
        assert torch.equal(left.centres, right.centres)
        assert torch.equal(left.candidates, right.candidates)


def test_a_batch_larger_than_the_corpus_is_refused() -> None:
    stream = batches.batch_stream(tiny_corpus(), 10**6, window=2, negatives=3, seed=1)

    with pytest.raises(ValueError, match="fewer than one batch of 1000000"):
        next(stream)


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


def disagreement_with_stock(rival: type[torch.nn.Embedding], optimizer: str) -> float:
    """How far the loss curve of ``rival`` is from nn.Embedding's in a tiny training."""
    text = tiny_corpus()
    torch.manual_seed(0)
    # The stock rate of plain SGD is for batches that meet each word less often than these.
    lr = 10.0 if optimizer in ("sgd", "sparse-sgd") else None
    contenders = [
        train.make_contender(name, embedding, len(text.words), dim=8, optimizer=optimizer, lr=lr)
        for name, embedding in [("stock", torch.nn.Embedding), ("rival", rival)]
    ]
    stream = batches.batch_stream(text, 512, window=3, negatives=4, seed=0)
    for _ in train.train_side_by_side(contenders, stream, steps=12):
        pass
    stock, other = contenders
    assert stock.losses[-1] < stock.losses[0]
    return train.largest_disagreement(stock.losses, other.losses)


@pytest.mark.parametrize("optimizer", model.OPTIMIZERS)
def test_loss_curves_agree_under_every_optimizer(optimizer: str) -> None:
    assert disagreement_with_stock(embed_ext.Embedding, optimizer) <= train.LOSS_RTOL


def test_a_wrong_gradient_is_noticed() -> None:
    assert disagreement_with_stock(ForgetfulEmbedding, "adagrad") > 10 * train.LOSS_RTOL


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_never_agrees(broken: float) -> None:
    assert train.largest_disagreement([1.0, 2.0], [1.0, broken]) > train.LOSS_RTOL
    assert train.largest_disagreement([1.0, broken], [1.0, broken]) > train.LOSS_RTOL


def test_main_fails_when_the_curves_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.EMBEDDINGS, "embed_ext.Embedding", ForgetfulEmbedding)
    monkeypatch.setattr(cli, "_measure_memory", lambda options, text: {})

    assert cli.main([*tiny_flags(), "--out", str(tmp_path)]) == 1
    assert "DISAGREE" in capsys.readouterr().out


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
    assert (tmp_path / "out" / "skipgram.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    figures = json.loads((tmp_path / "out" / "skipgram.json").read_text())
    names = ["nn.Embedding", "embed_ext.Embedding"]
    assert figures["settings"]["seed"] == 3
    assert list(figures["losses"]) == list(figures["median_ms"]) == names
    assert all(len(losses) == 12 for losses in figures["losses"].values())
    for name in names:
        assert set(figures["median_ms"][name]) == {*train.PHASES, "total"}
        assert figures["memory_mib"][name]["peak_mib"] > figures["memory_mib"][name]["before_mib"]
