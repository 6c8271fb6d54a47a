"""The benchmark of whole training steps: that it checks what it times, and shows what it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.training import __main__ as cli
from benchmarks.training import memory, report
from benchmarks.training.measure import BATCHES, Options, measure
from benchmarks.training.report import NOTES, draw, render
from benchmarks.training.trainers import (
    ADAM_CLIPPED,
    EPS_CLIPPED,
    PLAIN,
    SGD_TWO_USES,
    SUBJECT,
    TRAINERS,
    Step,
    Trained,
    Trainer,
    theirs,
)
from benchmarks.verify import WrongResult

CASE = Case(200, 8, 300, "zipf")
QUICK = Options(rounds=2, budget=0.0)
METHODS = sorted({trainer.method for trainer in TRAINERS})


def of(method: str) -> list[Trainer]:
    return [trainer for trainer in TRAINERS if trainer.method == method]


@pytest.mark.parametrize("method", METHODS)
def test_every_trainer_does_the_same_and_is_timed(method: str) -> None:
    timings = list(measure(CASE, of(method), QUICK))
    present = [trainer.name for trainer in of(method) if trainer.unavailable() is None]
    assert [timing.trainer for timing in timings] == present
    assert SUBJECT in present
    assert all(timing.rounds == 2 and timing.median > 0 for timing in timings)


Uses = Sequence[Tensor]  # indices [tokens] of each


def with_step(
    trainer: Trainer, name: str, change: Callable[[Uses, Tensor], tuple[Uses, Tensor]]
) -> Trainer:
    """One that takes its steps on what is made of the indices and the gradient."""

    def make(weight: Tensor, learning_rate: float, step: Step) -> Trained:
        trained = trainer.make(weight, learning_rate, step)
        return replace(trained, step=lambda uses, grad: trained.step(*change(uses, grad)))

    return replace(trainer, name=name, make=make)


def without_last_token(uses: Uses, grad_output: Tensor) -> tuple[Uses, Tensor]:
    """Whose row has no other."""
    return [indices[:-1] for indices in uses], grad_output[:-1]


def without_second_use(uses: Uses, grad_output: Tensor) -> tuple[Uses, Tensor]:
    """As if an earlier gradient were lost."""
    return uses[:1], grad_output


FAULTS = {
    **{f"{method}, a token less": (method, without_last_token) for method in METHODS},
    "one use less": (SGD_TWO_USES, without_second_use),
    "one use twice": (SGD_TWO_USES, lambda uses, grad: ([uses[0], uses[0]], grad)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_that_differs_is_not_timed(name: str) -> None:
    method, fault = FAULTS[name]
    subject = of(method)[0]
    with pytest.raises(WrongResult, match="faulty moves an element by"):
        list(measure(Case(5000, 8, 40), [subject, with_step(subject, "faulty", fault)], QUICK))


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_does_not_clip_is_not_timed(number: int) -> None:
    subject, other = of(ADAM_CLIPPED)
    unclipped = replace((subject, other)[number], name="unclipped", step=PLAIN)
    with pytest.raises(WrongResult, match="unclipped moves an element by"):
        list(measure(CASE, [subject, unclipped], QUICK))


@pytest.mark.parametrize("method", METHODS)
def test_no_batch_is_looked_up_twice(method: str) -> None:
    """But in a later turn: in a training loop too, each step has rows of its own."""
    seen: list[Uses] = []

    def note(uses: Uses, grad_output: Tensor) -> tuple[Uses, Tensor]:
        seen.append(uses)
        return uses, grad_output

    subject = of(method)[0]
    list(measure(CASE, [with_step(subject, SUBJECT, note)], QUICK))
    assert {len(uses) for uses in seen} == {subject.step.uses}
    rotation = [tuple(indices.tolist()) for uses in seen[1 : 1 + BATCHES] for indices in uses]
    assert len(set(rotation)) == len(rotation) == BATCHES * subject.step.uses


def test_sparse_adam_is_not_measured_with_clipping() -> None:
    """With that eps it takes another step than Adam does, clipped or not."""
    assert [trainer.name for trainer in of(ADAM_CLIPPED)] == [SUBJECT, "torch, dense"]
    sparse_adam = theirs(partial(torch.optim.SparseAdam, eps=EPS_CLIPPED), sparse=True)
    subject = replace(of(ADAM_CLIPPED)[0], step=PLAIN)
    with pytest.raises(WrongResult, match="SparseAdam moves an element by"):
        list(measure(CASE, [subject, replace(subject, name="SparseAdam", make=sparse_adam)], QUICK))


def results_of(folder: Path, *arguments: str) -> dict[str, Any]:
    cli.main(
        ["--quiet", "--rounds", "1", "--budget", "0", "--results-dir", str(folder), *arguments]
    )
    found: dict[str, Any] = json.loads((folder / "mine.json").read_text())
    return found


def test_the_command_writes_results_and_their_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "CASES", (CASE,))
    monkeypatch.setattr(cli, "SCALING", (replace(CASE, num_embeddings=100), CASE))
    results = results_of(tmp_path, "--only", "SGD", "Adam", "--out", "mine", "--no-memory")
    assert {timing["method"] for timing in results["timings"]} == {"SGD", "Adam"}
    text = (tmp_path / "mine.md").read_text()
    assert text == render(results)
    assert f"`{CASE.name}`" in text and "## Adam" in text and "## Adagrad" not in text
    has_plot = (tmp_path / "mine.png").exists()
    assert has_plot == (find_spec("matplotlib") is not None)
    assert not has_plot or (tmp_path / "mine.png").stat().st_size > 1000


def test_only_what_was_measured_on_several_tables_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the figures need the bench extra")
    drawn: list[str] = []
    monkeypatch.setattr(report, "_draw_method", lambda axis, method, timings: drawn.append(method))
    monkeypatch.setattr(cli, "CASES", (CASE,))
    monkeypatch.setattr(cli, "SCALING", (replace(CASE, num_embeddings=100), CASE))
    results = results_of(tmp_path, "--only", "SGD", *NOTES, "--out", "mine", "--no-memory")
    assert drawn == ["SGD"]
    for method, note in NOTES.items():
        assert f"## {method}\n\n{note}\n\n| case |" in render(results)
    results["timings"] = [one for one in results["timings"] if one["method"] in NOTES]
    assert not draw(results, tmp_path / "none.png")


def test_without_matplotlib_there_is_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    monkeypatch.setattr(cli, "CASES", (CASE,))
    monkeypatch.setattr(cli, "SCALING", (replace(CASE, num_embeddings=100), CASE))
    results_of(tmp_path, "--only", "SGD", "--out", "mine", "--no-memory")
    assert (tmp_path / "mine.md").exists() and not (tmp_path / "mine.png").exists()


def test_a_pass_over_a_very_large_table_is_left_out() -> None:
    options = cli.parse([])
    large = [trainers for case, trainers in cli.runs(options) if case.num_embeddings == 10_000_000]
    assert large
    assert not any(trainer.passes_over_the_table for trainers in large for trainer in trainers)


def test_steps_with_more_in_them_are_timed_on_the_main_tables_alone() -> None:
    chosen = list(cli.runs(cli.parse([])))
    for method in METHODS:
        cases = {case for case, trainers in chosen if trainers[0].method == method}
        assert cases == {*cli.CASES, *(cli.SCALING if of(method)[0].step == PLAIN else ())}
        assert {trainer.step for trainer in of(method)} == {of(method)[0].step}
    assert {trainers[0].method for _, trainers in chosen} == set(METHODS)
    assert set(NOTES) == {trainer.method for trainer in TRAINERS if trainer.step != PLAIN}


def test_nothing_to_draw(tmp_path: Path) -> None:
    results = {"timings": [], "scaling": [], "environment": {}, "threads": 1}
    assert not draw(results, tmp_path / "none.png")


@pytest.mark.skipif(not memory.available(), reason="nothing here says what a process holds")
def test_memory_is_measured_beside_what_a_process_holds() -> None:
    table, peak = memory.measure(f"SGD: {SUBJECT}", 300_000, 64, 1000)
    assert table == 300_000 * 64 * torch.float32.itemsize
    assert table * 0.9 < peak < table * 1.5
    _, dense = memory.measure("SGD: torch, dense", 300_000, 64, 1000)
    assert dense > peak + table * 0.5
