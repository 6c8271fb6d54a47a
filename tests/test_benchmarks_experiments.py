"""The experiments: a part of them can be measured anew, and the tables say where and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("tqdm", reason="the experiments need the bench extra")

from benchmarks.experiments import __main__ as experiments
from benchmarks.experiments import ddp, dense_passes
from benchmarks.experiments.makers import MAKERS
from benchmarks.experiments.report import SECTIONS, render
from benchmarks.providers import KEPT
from benchmarks.record import RESULTS_DIR
from benchmarks.verify import WrongResult

COMMITTED = RESULTS_DIR / "experiments.json"
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


def results_of(date: str) -> dict[str, Any]:
    return {
        "environment": {"cpu": "a CPU", "cores": 2, "torch": "2", "date": date, "load_average": 0},
        "tiny_calls": [{"who": "mine", "us": 1.25}],
    }


@pytest.mark.skipif(not COMMITTED.exists(), reason="this copy of the sources has no results")
def test_committed_tables_are_those_of_the_committed_results() -> None:
    results = json.loads(COMMITTED.read_text())
    text = COMMITTED.with_suffix(".md").read_text()
    assert render(results) == text
    assert all(f"## {title}" in text for name, title, _ in SECTIONS if name in results)


def test_every_experiment_has_a_section() -> None:
    assert {name for name, _, _ in SECTIONS} == set(experiments.EXPERIMENTS)


def test_experiments_measured_by_name_keep_the_others_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "experiments.json"
    path.write_text(json.dumps(results_of("yesterday")))
    rows = [{"step": "SGD", "who": "mine", "ms": 2.5}]
    monkeypatch.setitem(experiments.EXPERIMENTS, "ddp", lambda: rows)
    monkeypatch.setattr(
        experiments, "describe_environment", lambda _: results_of("today")["environment"]
    )
    experiments.main(["ddp"], tmp_path)
    results = json.loads(path.read_text())
    assert results["ddp"] == rows
    assert results["tiny_calls"] == results_of("yesterday")["tiny_calls"]
    before, after = (tmp_path / "experiments.md").read_text().split("## A training step of two")
    assert "yesterday" in before and "today" not in before and "1.25" in before
    assert "Measured apart from the others: a CPU" in after and "today" in after and "2.5" in after
    with pytest.raises(SystemExit, match="nothing: expected any of page_faults"):
        experiments.main(["nothing"], tmp_path)
    assert json.loads(path.read_text()) == results


@needs_gloo
@pytest.mark.slow
def test_ddp_is_measured_in_two_processes() -> None:
    rows = ddp.measure(ddp.Sizes(num_embeddings=50, embedding_dim=4, tokens=16, rounds=2))
    assert [(row["step"], row["who"]) for row in rows] == [
        (step, who) for step in ddp.STEPS for who in [*MAKERS, ddp.ALL_REDUCE]
    ]
    assert all(row["ms"] > 0 for row in rows)


def test_steps_are_measured_beside_their_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_passes, "TABLES", ((50, 4),))
    monkeypatch.setattr(dense_passes, "ROUNDS", 2)
    threads = torch.get_num_threads()
    try:
        rows = list(dense_passes.measure())
    finally:
        torch.set_num_threads(threads)
    assert [row["who"] for row in rows] == 4 * [*dense_passes.LOOKUPS, *dense_passes.PASSES]
    assert all(row["ms"] > 0 for row in rows)


@needs_gloo
def test_ddp_of_a_wrong_gradient_is_not_timed(tmp_path: Path) -> None:
    sizes = ddp.Sizes(num_embeddings=50, embedding_dim=4, tokens=16)
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        variants = {who: ddp.Trained.make(make, sizes, True) for who, make in MAKERS.items()}
        pairs = torch.randint(50, (2, 16))
        ddp.check_step(variants, pairs)
        table = variants[KEPT].model.module.table
        table.weight.register_hook(lambda grad: grad.roll(1, dims=1))
        with pytest.raises(WrongResult, match=f"{KEPT}: gradient of module.table.weight differs"):
            ddp.check_step(variants, pairs)
    finally:
        dist.destroy_process_group()
