"""The counts of the emulated device: what must be moved, and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="the figures need the bench extra")

from benchmarks import cli
from benchmarks.cases import Case
from benchmarks.counts import __main__ as counts
from benchmarks.counts.cases import CASES, PERMUTATION, CountedCase, select
from benchmarks.counts.report import render, worst_by_kernel


@pytest.mark.parametrize(
    ("op", "dtype", "expected"),
    [
        # A table of 10 rows of 4 elements; 6 tokens, which name rows 0, 1, 1, 2, 2 and 2.
        ("gather", "float32", 2 * 6 * 16 + 8 * 6),
        ("gather-transposed", "bfloat16", 2 * 6 * 8 + 8 * 6),
        ("dense", "float32", 10 * 16 + 6 * 16 + 3 * 16 + 8 * 6),
        ("dense", "float64", 10 * 32 + 6 * 32 + 3 * 32 + 8 * 6),
        ("dense", "bfloat16", 10 * 8 + 6 * 8 + 8 * 6),
        ("dense-deterministic", "float32", 10 * 16 + 6 * 16 + 8 * 6),
        ("dense-scaled", "float32", 10 * 16 + 6 * 16 + 8 * 6),
        ("grad-add", "bfloat16", 6 * 8 + 3 * 16 + 8 * 6),
        ("sparse", "float32", 6 * 16 + 6 * 16 + 8 * 6 + 8 * 6),
        ("sparse-coalesced", "float32", 6 * 16 + 3 * 16 + 8 * 6 + 8 * 3),
        ("renorm", "float32", 2 * 3 * 16 + 8 * 6),
    ],
)
def test_ideal_bytes(op: str, dtype: str, expected: int) -> None:
    case = CountedCase(op, Case(10, 4, 6, dtype=dtype))
    assert case.ideal_bytes(torch.tensor([0, 1, 1, 2, 2, 2])) == expected


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        # Of the 6 tokens, 2 are padding: their rows need not be read.
        ("sparse", 4 * 16 + 4 * 16 + 8 * 6 + 8 * 4),
        ("sparse-coalesced", 4 * 16 + 2 * 16 + 8 * 6 + 8 * 2),
    ],
)
def test_padding_is_in_no_ideal(op: str, expected: int) -> None:
    case = CountedCase(op, Case(10, 4, 6, "half-padding"))
    assert case.ideal_bytes(torch.tensor([0, 1, 1, 0, 2, 2])) == expected


def test_cases_are_what_their_names_say() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    # Of those that differ in their rows alone, one: they have the same indices.
    kinds = {(c.case.num_embeddings, c.case.tokens, c.case.distribution): c for c in CASES}
    for case in kinds.values():
        indices = case.indices()
        assert indices.shape == (case.case.tokens,) and indices.dtype == torch.int64
        assert 0 <= int(indices.min()) and int(indices.max()) < case.case.num_embeddings
        assert torch.equal(indices, case.indices())
        if case.case.distribution == PERMUTATION:
            assert len(set(indices.tolist())) == case.case.tokens
        if case.case.distribution == "zipf-sorted" and case.case.tokens > 1000:
            times = indices.bincount()
            assert times[0] == times.max() and times[:10].min() > times[100:].max()


def test_cases_are_chosen_by_patterns() -> None:
    assert select([]) == list(CASES)
    assert {case.op for case in select(["renorm"])} == {"renorm"}
    assert all("zipf" in c.name or c.op == "renorm" for c in select(["zipf", "renorm"]))
    assert select(["gather 4000x*/bfloat16"])
    with pytest.raises(SystemExit):
        counts.parse(["--cases", "no such case"])


def test_some_of_the_cases_do_not_replace_the_results_of_all() -> None:
    assert counts.parse([]).out == counts.NAME
    assert counts.parse(["--cases", "renorm"]).out is None
    assert counts.parse(["--arch", "sm_90"]).out is None
    assert counts.parse(["--arch", "sm_90", "--out", "mine"]).out == "mine"


def launch(kernel: str, moved: int, longest: int = 0, blocks: int = 0) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "blocks": blocks,
        "requested_bytes": 2 * moved,
        "fetched_bytes": moved,
        "longest": longest,
        "longest_reads": longest // 2,
        "adds": longest * blocks,
    }


def case_of(name: str, *launches: dict[str, Any], row_bytes: int = 256) -> dict[str, Any]:
    return {
        "name": name,
        "row_bytes": row_bytes,
        "ideal_bytes": 1000,
        "of_library": 1,
        "launches": list(launches),
    }


def results_of(**by_arch: list[dict[str, Any]]) -> dict[str, Any]:
    environment = {"commit": "c" * 40, "dirty": False, "torch": "2", "date": "now"}
    environment["compiler"] = "a compiler"
    return {"kind": "counts", "environment": environment, "counts": by_arch}


FIRST = case_of(
    "dense 10x64", launch("memset", 100), launch("add", 1000, 8, 3), launch("sum", 150, 10, 40)
)
SECOND = case_of("gather 10x64", launch("sum", 500, 4, 2))
NARROW = case_of("gather 10x1", launch("sum", 9000, 90, 2), row_bytes=4)


def test_a_line_sums_up_a_call() -> None:
    text = render(results_of(sm_90=[FIRST, SECOND]))
    assert text.splitlines()[0] == "# Counted on an emulated CUDA device, not timed"
    assert "### dense\n" in text and "### gather\n" in text
    expected = (
        "| `dense 10x64` | 1000 B | 3 | 1 | 3 / 40 | 2.50 | 1.25 | 10 in `sum` | 5 in `sum` | 424 |"
    )
    assert expected in text.splitlines()
    assert "| `gather 10x64` | 1000 B | 1 | 1 | 2 |" in text


def test_another_architecture_is_shown_where_it_differs() -> None:
    other = case_of("gather 10x64", launch("sum", 700, 4, 2))
    text = render(results_of(sm_90=[FIRST, SECOND], sm_80=[FIRST, other]))
    differing = text.split("## What differs on sm_80")[1]
    assert "| `gather 10x64` | 1000 B |" in differing and "`dense 10x64` | 1000" not in differing
    assert "| `sum` | 1.40 in `gather 10x64`" in differing and "| `add`" not in differing
    same = render(results_of(sm_90=[FIRST], sm_80=[FIRST]))
    assert "## What differs on sm_80\n\nNothing.\n" in same


def test_the_worst_of_each_kernel() -> None:
    rows = worst_by_kernel([FIRST, SECOND, NARROW])  # of the last nothing is seen
    assert [row[0] for row in rows] == ["`add`", "`memset`", "`sum`"]
    assert rows[2][1:3] == ["1.00 in `gather 10x64`", "0.50 in `gather 10x64`"]
    assert rows[2][3:] == ["10 in `dense 10x64`", "5 in `dense 10x64`"]


def test_the_report_is_made_again_from_the_results(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(results_of(sm_90=[FIRST])))
    assert cli.main(["report", str(path)]) == 0
    assert path.with_suffix(".md").read_text() == render(results_of(sm_90=[FIRST]))
