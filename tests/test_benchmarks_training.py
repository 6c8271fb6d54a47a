"""The benchmark of whole training steps: that it checks what it times, and shows what it found."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.training import __main__ as cli
from benchmarks.training import memory, report
from benchmarks.training.measure import Options, measure
from benchmarks.training.report import draw, render
from benchmarks.training.trainers import SUBJECT, TRAINERS, Trained, Trainer
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


def faulty(trainer: Trainer) -> Trainer:
    """One that forgets the last token, whose row has no other."""

    def build(weight: Tensor, learning_rate: float) -> Trained:
        trained = trainer.build(weight, learning_rate)
        return replace(trained, step=lambda indices, grad: trained.step(indices[:-1], grad[:-1]))

    return replace(trainer, name="faulty", build=build)


@pytest.mark.parametrize("method", METHODS)
def test_one_that_differs_is_not_timed(method: str) -> None:
    subject = of(method)[0]
    with pytest.raises(WrongResult, match="faulty moves an element by"):
        list(measure(Case(5000, 8, 40), [subject, faulty(subject)], QUICK))


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
