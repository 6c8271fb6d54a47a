"""What the benchmarks write of training steps and of models, and that old results still load."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the figures need the bench extra")

from benchmarks import cli, model_report, model_zoo, models, readme
from benchmarks.cases import Case
from benchmarks.counts import report as counts_report
from benchmarks.memory import measure_memory
from benchmarks.providers import BASELINE, KEPT, SUBJECT
from benchmarks.record import RESULTS_DIR, Measurement, Results
from benchmarks.report import render_markdown
from benchmarks.training import report as training_report
from benchmarks.verify import WrongResult

QUICK = ["--rounds", "1", "--min-time", "1e-6", "--bandwidth-mib", "0", "--threads", "1", "--quiet"]


def committed() -> list[Path]:
    paths = sorted(RESULTS_DIR.glob("*.json")) if RESULTS_DIR.is_dir() else []
    return [path for path in paths if path.name != "experiments.json"]


@pytest.mark.skipif(not committed(), reason="this copy of the sources comes without results")
def test_committed_results_load_and_are_shown() -> None:
    for path in committed():
        text = path.read_text()
        kind = json.loads(text).get("kind")
        if kind == counts_report.KIND:
            assert counts_report.render(json.loads(text)) == path.with_suffix(".md").read_text()
        elif kind == training_report.KIND:
            assert training_report.render(json.loads(text)) == path.with_suffix(".md").read_text()
        elif kind == model_report.KIND:
            results = model_report.ModelResults.from_json(text)
            assert model_report.render(results).startswith("# Training steps of models")
        else:
            assert "## Machine and software" in render_markdown(Results.from_json(text))


def test_steps_are_written_and_shown(tmp_path: Path) -> None:
    arguments = [*QUICK, "--suite", "step", "--cases", "100x100/4096/zipf", "--out", "step-cpu"]
    assert cli.main([*arguments, "--results-dir", str(tmp_path)]) == 0
    results = Results.from_json((tmp_path / "step-cpu.json").read_text())
    assert results.complete and results.settings.extra_tokens == 4096
    assert {m.provider for m in results.measurements} == {BASELINE, SUBJECT, KEPT}
    names = {m.mode for m in results.measurements}
    assert names == {*results.settings.modes, *results.settings.extra_modes}
    assert {"forward-backward", "step-sgd-clip-x2", "step-adamw", "step-sgd-tied"} <= names
    with (tmp_path / "step-cpu.csv").open() as stream:
        assert {row["mode"] for row in csv.DictReader(stream)} == names
    markdown = (tmp_path / "step-cpu.md").read_text()
    assert "## Whole training steps" in markdown and "| `step-sgd-x4` | 2 |" in markdown
    assert (tmp_path / "step-cpu-speedup.png").read_bytes().startswith(b"\x89PNG")
    shown = "\n".join(readme.step_figures(results))
    assert "| 100 × 100 |" in shown and "AdamW at 4,096 tokens" in shown
    assert " - " not in shown


def measurement(provider: str, mode: str, ratio: float) -> Measurement:
    case = Case(10, 3, 4)
    return Measurement(
        case=case.name,
        num_embeddings=10,
        embedding_dim=3,
        tokens=4,
        distribution="uniform",
        dtype="float32",
        index_dtype="int64",
        threads=1,
        mode=mode,
        provider=provider,
        median=1e-3 / ratio,
        p10=1e-3,
        p90=1e-3,
        rounds=1,
        inner=1,
        ratio=ratio,
        ratio_p10=ratio,
        ratio_p90=ratio,
        minimum_bytes=1,
        gb_per_second=1.0,
        copy_share=None,
        page_faults=None,
        error_roundings=0.0,
    )


def test_every_case_below_one_is_listed_the_worst_first(tmp_path: Path) -> None:
    arguments = [*QUICK, "--cases", "10x3/", "--providers", SUBJECT, "--out", "run"]
    assert cli.main([*arguments, "--results-dir", str(tmp_path)]) == 0
    results = Results.from_json((tmp_path / "run.json").read_text())
    mode = "step-sgd"
    results.measurements = [
        measurement(BASELINE, mode, 1.0),
        measurement(SUBJECT, mode, 0.9),
        measurement(KEPT, mode, 0.5),
        measurement("index_select", mode, 0.1),
    ]
    markdown = render_markdown(results)
    listed = markdown.split(f"## Slower than {BASELINE}")[1].split("##")[0]
    assert "0.5x" in listed and "0.9x" in listed and "0.1x" not in listed
    assert listed.index("0.5x") < listed.index("0.9x")
    results.measurements = [measurement(BASELINE, mode, 1.0), measurement(SUBJECT, mode, 1.5)]
    assert "below 1 nowhere" in render_markdown(results)


def test_the_readme_gives_geometric_means_and_the_slowest(tmp_path: Path) -> None:
    assert (
        cli.main([*QUICK, "--cases", "10x3/", "--out", "run", "--results-dir", str(tmp_path)]) == 0
    )
    results = Results.from_json((tmp_path / "run.json").read_text())
    results.measurements = [
        measurement(provider, "step-sgd", ratio)
        for provider, ratio in ((SUBJECT, 2.0), (SUBJECT, 8.0), (KEPT, 3.0), (KEPT, 12.0))
    ]
    lines = "\n".join(readme.step_figures(results)).splitlines()
    assert next(line for line in lines if "10 × 3" in line).startswith(
        "| 10 × 3 | 4.0 / 6.0 | - / -"
    )
    assert any(line.startswith("| the slowest case | 2.0 / 3.0 |") for line in lines)
    elsewhere = dataclasses.replace(
        results,
        environment={**results.environment, "cpu": "another CPU"},
        measurements=[measurement(SUBJECT, "step-sgd", 5.0)],
    )
    lines = "\n".join(readme.step_figures(results, elsewhere)).splitlines()
    assert any(line.startswith("| **all** | 4.0 / 6.0 |") for line in lines)
    assert any(line.startswith("| **all**, another CPU | 5.0 / - |") for line in lines)
    assert any(line.startswith("| the slowest case, another CPU | 5.0 / - |") for line in lines)


@pytest.mark.slow
def test_memory_of_adamw_is_more_than_that_of_sgd() -> None:
    case = Case(100_000, 64, 1000)
    sgd, adamw = (
        measure_memory(case, BASELINE, mode, threads=1, device="cpu", seed=0)
        for mode in ("step-sgd", "step-adamw")
    )
    assert adamw - sgd > 1.5 * case.table_bytes


# Models.


def small_transe() -> model_zoo.ModelCase:
    return model_zoo.ModelCase(
        "small",
        "a small TransE",
        lambda: model_zoo.TransE(200, 5, 8),
        model_zoo.make_triples(200, 5),
        model_zoo.own_loss,
        ("sgd-clip", "adagrad"),
    )


def options_for(tmp_path: Path, **changes: object) -> argparse.Namespace:
    settings = {
        "cases": [],
        "optimizer": None,
        "clip": None,
        "list": False,
        "threads": [1],
        "rounds": 2,
        "budget": 5.0,
        "batches": 2,
        "seed": 0,
        "out": None,
        "time_limit": None,
        "quiet": True,
        "results_dir": tmp_path,
    }
    return argparse.Namespace(**{**settings, **changes})


def test_models_are_measured_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, paths = models.run_models(options_for(tmp_path), [small_transe()])
    assert status == 0 and {path.name for path in paths} == {"models-cpu.json", "models-cpu.md"}
    results = model_report.ModelResults.from_json((tmp_path / "models-cpu.json").read_text())
    assert results.complete
    assert [(m.step, m.variant) for m in results.measurements] == [
        (step, variant) for step in ("sgd-clip", "adagrad") for variant in models.VARIANTS
    ]
    for m in results.measurements:
        assert m.rounds == 2 and set(m.phases) == set(model_report.PHASES)
        assert 0 < max(m.phases.values()) <= m.p90
        assert m.loss_difference <= models.LARGEST_DIFFERENCE
    before = (tmp_path / "models-cpu.md").read_text()
    assert "| small, adagrad, 1 thread |" in before
    assert cli.main(["report", str(tmp_path / "models-cpu.json")]) == 0
    assert (tmp_path / "models-cpu.md").read_text() == before


def test_models_of_a_wrong_gradient_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(case: model_zoo.ModelCase, step: str, seed: int) -> dict[str, models.Trained]:
        made = original(case, step, seed)
        weight = made[KEPT].model.get_parameter("entities.weight")
        weight.register_hook(lambda grad: grad.roll(1, dims=1))
        return made

    original = models.make_variants
    variants = original(small_transe(), "sgd", 0)
    assert [type(v.model.entities).__module__ for v in variants.values()] == [
        "torch.nn.modules.sparse",
        "embed_ext.modules",
        "embed_ext.modules",
    ]
    assert [getattr(v.model.entities, "keep_grad_buffer", None) for v in variants.values()] == [
        None,
        False,
        True,
    ]
    monkeypatch.setattr(models, "make_variants", make)
    status, _ = models.run_models(options_for(tmp_path), [small_transe()])
    assert status == 1
    results = model_report.ModelResults.from_json((tmp_path / "models-cpu.json").read_text())
    assert results.measurements == []
    assert {r.kind for r in results.rejections} == {"wrong"}
    assert f"losses of {KEPT}" in results.rejections[0].reason
    with pytest.raises(WrongResult):
        models.measure(small_transe(), "sgd", torch.get_num_threads(), options_for(tmp_path))


def test_without_transformers_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    chosen = [model_zoo.MODELS["gpt2"], small_transe()]
    status, _ = models.run_models(options_for(tmp_path), chosen)
    assert status == 0
    assert "pip install 'embed_ext[models]'" in capsys.readouterr().out
    text = (tmp_path / "models-cpu.md").read_text()
    assert "**gpt2 is missing**" in text and "| small, sgd-clip, 1 thread |" in text


def test_models_are_listed_and_refused_on_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--suite", "models", "--results-dir", str(tmp_path)]
    assert cli.main([*arguments, "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in model_zoo.MODELS)
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--device", "cuda"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_language_models_are_tied_and_give_a_loss(name: str) -> None:
    pytest.importorskip("transformers", reason="needs the models extra")
    model = getattr(model_zoo, name)(vocabulary=97, dim=16)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    case = model_zoo.MODELS[name]
    (batch,) = case.batches(1, 0)
    loss = case.loss(model, tuple(indices % 97 for indices in batch))
    loss.backward()
    assert loss.isfinite() and model.get_input_embeddings().weight.grad is not None


def test_geometric_model_draws_the_same_for_each_variant(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric", reason="needs the models extra")
    small = dataclasses.replace(
        model_zoo.MODELS["distmult"],
        build=lambda: model_zoo.distmult(200, 5, 8),
        batches=model_zoo.make_triples(200, 5),
    )
    status, _ = models.run_models(options_for(tmp_path), [small])
    results = model_report.ModelResults.from_json((tmp_path / "models-cpu.json").read_text())
    assert status == 0 and results.complete and not results.rejections
    assert {m.step for m in results.measurements} == {"adagrad", "sgd-clip"}
    first, second = small.batches(2, 0)
    model = small.build()
    losses = [float(small.loss(model, batch).detach()) for batch in (first, first, second)]
    assert losses[0] == losses[1] != losses[2]
