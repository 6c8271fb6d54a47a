"""Whole runs of the benchmark harness: what they reject, write and refuse."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib", reason="the figures need the bench extra")

from benchmarks import cli, modes, providers, suites
from benchmarks.bandwidth import measure_bandwidth
from benchmarks.cases import Case
from benchmarks.environment import git_state, without_folders
from benchmarks.memory import measure_memory
from benchmarks.providers import BASELINE, Lookup, Provider
from benchmarks.record import Results, Settings
from benchmarks.runner import Runner


def doubled(weight: Tensor, padding_idx: int | None) -> Lookup:
    """A lookup whose forward is right and whose gradient is twice what it should be."""
    parameter = nn.Parameter(weight)
    parameter.register_hook(lambda grad: 2 * grad)  # type: ignore[no-untyped-call]
    return Lookup(lambda indices: parameter.index_select(0, indices), parameter)


def quick_settings(**changes: object) -> Settings:
    return Settings(
        suite="tiny",
        modes=list(modes.MODES),
        threads=[1],
        rounds=2,
        min_time=1e-6,
        bandwidth_mib=1,
        **changes,  # type: ignore[arg-type]
    )


def test_a_wrong_provider_is_reported_and_not_timed() -> None:
    baseline = providers.get_provider(BASELINE)
    unloadable = Provider(
        "absent", "not there", baseline.build, unavailable=providers.needs("no_such_module")
    )
    wrong = Provider("doubled", "a wrong gradient", doubled)
    runner = Runner("run", quick_settings(), [baseline, wrong, unloadable])
    results = runner.run(suites.SUITES["tiny"].cases, progress=False)
    assert {m.provider for m in results.measurements} == {BASELINE}
    assert {(r.provider, r.kind) for r in results.rejections} == {("doubled", "wrong")}
    assert len(results.rejections) == 2
    assert results.providers[2].unavailable is not None
    assert "no_such_module" in results.providers[2].unavailable


def test_a_provider_that_raises_does_not_end_the_run() -> None:
    def build(weight: Tensor, padding_idx: int | None) -> Lookup:
        raise RuntimeError("no luck\nsecond line")

    names = [providers.get_provider(BASELINE), Provider("unlucky", "raises", build)]
    results = Runner("run", quick_settings(), names).run([Case(10, 3, 4)], progress=False)
    assert results.complete
    assert [(r.kind, r.reason) for r in results.rejections] == [("failed", "RuntimeError: no luck")]


def test_the_tiny_suite_writes_json_csv_markdown_and_figures(tmp_path: Path) -> None:
    arguments = ["--rounds", "2", "--min-time", "1e-6", "--threads", "1", "--bandwidth-mib", "1"]
    arguments += ["--providers", "index_select", "nn.Embedding-sparse", "--quiet"]
    arguments += ["--out", "run", "--results-dir", str(tmp_path)]
    threads = torch.get_num_threads()
    assert cli.main(arguments) == 0
    assert torch.get_num_threads() == threads
    results = Results.from_json((tmp_path / "run.json").read_text())
    assert results.complete
    assert len(results.measurements) == 2 * 3 * 3
    assert all(m.median > 0 and m.p10 <= m.median <= m.p90 for m in results.measurements)
    assert results.bandwidth["1"]["copy"] > 0
    assert results.environment["torch"] == torch.__version__
    assert Results.from_json(results.to_json()) == results
    with (tmp_path / "run.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["provider"] for row in rows] == [m.provider for m in results.measurements]
    assert [float(row["median"]) for row in rows] == [m.median for m in results.measurements]
    markdown = (tmp_path / "run.md").read_text()
    for text in ("10x100/2/uniform/float32", "index_select", "run-speedup.png", "forward-grad"):
        assert text in markdown
    for kind in ("speedup", "times"):
        assert (tmp_path / f"run-{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_is_made_again_from_json(tmp_path: Path) -> None:
    settings = quick_settings()
    runner = Runner("again", settings, [providers.get_provider(BASELINE)])
    runner.results.complete = False
    json_path, _ = runner.results.write(tmp_path)
    assert cli.main(["report", str(json_path)]) == 0
    assert "interrupted" in (tmp_path / "again.md").read_text()
    raw = json.loads(json_path.read_text())
    json_path.write_text(json.dumps({**raw, "schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        cli.main(["report", str(json_path)])


def test_list_and_mistakes_run_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["--list", "--suite", "cpu", "--cases", "100x100"]) == 0
    listed = capsys.readouterr().out
    assert "100x100/1/uniform/float32" in listed
    assert all(provider.name in listed for provider in providers.all_providers())
    for mistake in (["--providers", "nobody"], ["--cases", "nothing"], ["--dtype", "float31"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*mistake, "--results-dir", str(tmp_path)])
        assert stopped.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_providers_are_selected_with_the_baseline() -> None:
    assert [p.name for p in providers.select_providers(["indexing"])] == [BASELINE, "indexing"]
    assert providers.select_providers(["all"]) == providers.all_providers()
    assert all(provider.default for provider in providers.select_providers([]))
    with pytest.raises(ValueError, match="registered already"):
        providers.register(providers.get_provider(BASELINE))


def test_bandwidths_are_positive_numbers() -> None:
    measured = measure_bandwidth("cpu", 2**20)
    assert {"copy", "random-row-64"} <= set(measured)
    assert all(math.isfinite(value) and value > 0 for value in measured.values())


@pytest.mark.slow
def test_memory_of_a_dense_gradient_is_at_least_the_table() -> None:
    case = Case(100_000, 64, 1000)
    measured = {
        name: measure_memory(case, name, "forward-backward", threads=1, device="cpu", seed=0)
        for name in (BASELINE, "nn.Embedding-sparse")
    }
    assert measured[BASELINE] > 0.9 * case.table_bytes
    assert measured["nn.Embedding-sparse"] < 0.5 * case.table_bytes
    with pytest.raises(RuntimeError, match="nobody"):
        measure_memory(case, "nobody", "forward-backward", threads=1, device="cpu", seed=0)


def test_results_name_no_folders() -> None:
    message = "cannot load (/home/someone/lib/_C.so: bad): try `make build` and/or /opt/x/y.py"
    assert without_folders(message) == "cannot load (_C.so: bad): try `make build` and/or y.py"


def test_git_state_outside_a_repository_is_what_one_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EMBED_EXT_COMMIT", raising=False)
    assert git_state(tmp_path) == (None, None)
    monkeypatch.setenv("EMBED_EXT_COMMIT", "1234abc")
    assert git_state(tmp_path) == ("1234abc", None)
