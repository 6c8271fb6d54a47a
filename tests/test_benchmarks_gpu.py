"""What the benchmark harness has for GPUs: suites, deterministic providers, graphs and limits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import cli, graphs, modes, providers, rejections, runner, suites
from benchmarks.cases import DISTRIBUTIONS, Case, make_data
from benchmarks.providers import BASELINE, Lookup, Provider
from benchmarks.record import Results, Settings
from benchmarks.timing import Sampler
from tests.common import HAS_CUDA

needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device, or a CPU-only build"),
]
GRAPH_MODES = [name for name, mode in modes.MODES.items() if mode.graph]


def settings_for(*names: str, **changes: object) -> Settings:
    return Settings(
        suite="tiny",
        modes=list(names),
        threads=[1],
        rounds=2,
        min_time=1e-6,
        bandwidth_mib=0,
        **changes,  # type: ignore[arg-type]
    )


def run(cases: list[Case], settings: Settings, *names: str) -> Results:
    chosen = [providers.get_provider(name) for name in (BASELINE, *names)]
    return runner.Runner("run", settings, chosen).run(cases, progress=False)


# On any machine.


@pytest.mark.parametrize(
    ("suite", "axes"),
    [
        (
            "gpu-llm",
            (
                {32_000, 128_256, 256_000},
                {1024, 2048, 4096, 8192},
                {1, 512, 3072, 3073, 16_384, 65_536},
            ),
        ),
        (
            "gpu-recsys",
            (
                {1_000_000, 10_000_000, 50_000_000},
                {16, 32, 50, 64, 65, 128},
                {65_536, 1_000_000, 4_000_000},
            ),
        ),
    ],
)
def test_a_gpu_suite_has_every_value_of_its_grid(suite: str, axes: tuple[set[int], ...]) -> None:
    cases = suites.SUITES[suite].cases
    found = zip(*((c.num_embeddings, c.embedding_dim, c.tokens) for c in cases), strict=True)
    assert tuple(set(values) for values in found) == axes
    for dtype in ("bfloat16", "float32"):
        varied = {c.distribution for c in cases if c.dtype == dtype}
        assert varied == set(DISTRIBUTIONS) - {"zipf-sorted"}


def test_a_suite_says_what_is_measured_unless_one_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = suites.SUITES["gpu-quick"]
    assert {"embed_ext", BASELINE} <= set(chosen.providers)
    assert set(GRAPH_MODES) <= set(chosen.modes) <= set(modes.MODES)
    arguments = ["--suite", "gpu-quick", "--list"]
    assert cli.main(arguments) == 0
    assert " *embed_ext-deterministic" in capsys.readouterr().out
    assert cli.main([*arguments, "--providers", "indexing"]) == 0
    assert " *embed_ext-deterministic" not in capsys.readouterr().out


def test_graphs_are_refused_on_the_cpu_and_left_out_of_its_defaults(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--modes", *GRAPH_MODES])
    assert "need --device cuda" in capsys.readouterr().err
    arguments = ["--suite", "gpu-quick", "--cases", "10x100", "--rounds", "1", "--out", "run"]
    arguments += ["--min-time", "1e-6", "--bandwidth-mib", "0", "--results-dir", str(tmp_path)]
    assert cli.main([*arguments, "--providers", BASELINE, "--quiet"]) == 0
    results = Results.from_json((tmp_path / "run.json").read_text())
    assert {m.mode for m in results.measurements} == {"forward-no-grad", "forward-backward"}
    assert all(m.launches is None for m in results.measurements)


def test_deterministic_providers_are_timed_where_there_is_a_backward() -> None:
    seen = []

    def build(weight: Tensor, padding_idx: int | None) -> Lookup:
        module = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]

        def call(indices: Tensor) -> Tensor:
            seen.append(torch.are_deterministic_algorithms_enabled())
            output: Tensor = module(indices)
            return output

        return Lookup(call, module.weight)

    mine = Provider("mine", "records the flag", build, deterministic=True)
    chosen = [providers.get_provider(BASELINE), mine]
    names = ("forward-no-grad", "forward-backward")
    results = runner.Runner("run", settings_for(*names), chosen).run(
        [Case(10, 3, 4)], progress=False
    )
    assert {m.mode for m in results.measurements if m.provider == "mine"} == {"forward-backward"}
    assert seen and all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_case_that_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = Case(10, 3, 4), Case(1000, 3, 4)
    monkeypatch.setattr(rejections, "available_memory_bytes", lambda device: small.working_bytes)
    results = run([small, large], settings_for("forward-grad"))
    assert {m.case for m in results.measurements} == {small.name}
    assert [(r.case, r.kind) for r in results.rejections] == [(large.name, "skipped")]
    assert results.rejections[0].reason.endswith("GiB of memory")


def test_a_provider_that_runs_out_of_memory_is_skipped() -> None:
    def build(weight: Tensor, padding_idx: int | None) -> Lookup:
        raise torch.OutOfMemoryError("no 3 GiB left")

    chosen = [Provider("greedy", "takes too much", build)]
    made = runner.Runner("run", settings_for("forward-grad"), chosen)
    results = made.run([Case(10, 3, 4)], progress=False)
    assert [(r.kind, r.reason) for r in results.rejections] == [
        ("skipped", "OutOfMemoryError: no 3 GiB left")
    ]


def test_no_case_begins_after_the_time_limit() -> None:
    results = run([Case(10, 3, 4)], settings_for("forward-grad", time_limit=1e-9))
    assert results.measurements == []
    assert not results.complete
    assert run([Case(10, 3, 4)], settings_for("forward-grad", time_limit=1e9)).complete


def test_no_tqdm_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    arguments = ["--rounds", "1", "--min-time", "1e-6", "--bandwidth-mib", "0"]
    arguments += ["--providers", BASELINE, "--results-dir", str(tmp_path), "--out", "run"]
    assert cli.main(arguments) == 0
    assert "tqdm is not installed" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["complete"]


# On a GPU.


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("distribution", DISTRIBUTIONS)
    def test_data_are_made_there_and_stay_inside_the_table(self, distribution: str) -> None:
        case = Case(1000, 8, 333, distribution)
        first, again = (make_data(case, batches=2, device="cuda", seed=3) for _ in range(2))
        assert first.weight.is_cuda and first.grad_output.is_cuda
        for indices, same in zip(first.batches, again.batches, strict=True):
            assert torch.equal(indices, same)
            assert 0 <= int(indices.min()) and int(indices.max()) < 1000
        assert torch.equal(first.grad_output, again.grad_output)

    @pytest.mark.parametrize("is_deterministic", [False, True])
    def test_a_replay_does_what_the_call_does_with_each_batch(self, is_deterministic: bool) -> None:
        data = make_data(Case(100, 8, 40), batches=3, device="cuda", seed=0)
        module = nn.Embedding(100, 8, _weight=data.weight)
        kept = torch.zeros(100, 8, device="cuda")

        def call(indices: Tensor) -> None:
            (grad,) = torch.autograd.grad(module(indices), module.weight, data.grad_output)
            kept.copy_(grad)

        mode = modes.MODES["graph-forward-backward"]
        replay = graphs.replay(call, mode, data.batches, is_deterministic)
        for indices in data.batches:
            expected = torch.zeros(100, 8, device="cuda").index_add_(0, indices, data.grad_output)
            kept.zero_()
            replay(indices)
            assert torch.allclose(kept, expected)

    def test_launches_are_counted(self) -> None:
        ones = torch.ones(10, device="cuda")
        mode = modes.MODES["forward-no-grad"]
        sampler = Sampler(lambda indices: ones.add_(1).mul_(2), mode, [ones], "cuda", cold=True)
        assert sampler.launches() in (2, None)  # None: the machine keeps its counters to itself
        assert sampler.page_faults() is None
        assert sampler.sample(1) > 0

    @pytest.mark.parametrize("cold", [False, True])
    def test_every_mode_runs(self, cold: bool) -> None:
        names = ["embed_ext", "embed_ext-deterministic", "nn.Embedding-deterministic"]
        settings = settings_for(*modes.MODES, device="cuda", cold=cold)
        results = run([Case(1000, 64, 300, "zipf", "bfloat16")], settings, *names)
        assert results.rejections == []
        assert {m.mode for m in results.measurements} == set(modes.MODES)
        assert {m.provider for m in results.measurements} == {BASELINE, *names}
        assert results.environment["gpu"]
