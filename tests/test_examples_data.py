"""The example's corpus, pairs and negatives are what word2vec says they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.skipgram_corpus import tiny_corpus

from skipgram import batches, corpus  # isort: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
