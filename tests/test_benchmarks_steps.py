"""The benchmarks' training steps: names, options, data and arithmetic."""

from __future__ import annotations

import argparse
import itertools

import pytest
import torch
from torch import nn

from benchmarks import cli, modes, steps, suites
from benchmarks.cases import Case, CaseData, make_data, make_indices
from benchmarks.providers import BASELINE, KEPT, SUBJECT, Lookup
from benchmarks.record import Settings
from benchmarks.steps import OPTIMIZERS, Step, make_step_data, training_step

EVERY_STEP = [
    Step(*parts)
    for parts in itertools.product(
        OPTIMIZERS, (False, True), (1, 2), (False, True), (None, True, False), (1, 3)
    )
]


def data_of(case: Case) -> CaseData:
    return make_data(case, batches=2, device="cpu", seed=0)


def step_data_of(data: CaseData, step: Step) -> steps.StepData:
    return make_step_data(data, step, batches=2, seed=0, device="cpu")


# Names and options.


def test_a_step_is_known_by_its_name() -> None:
    assert Step("sgd", clip=True, uses=2, tied=True).name == "step-sgd-clip-x2-tied"
    assert Step("adamw", foreach=False, accumulate=4).name == "step-adamw-accumulate4-no-foreach"
    assert len({step.name for step in EVERY_STEP}) == len(EVERY_STEP)
    for step in EVERY_STEP:
        assert Step.parse(step.name) == step
        mode = modes.get_mode(step.name)
        assert (mode.name, mode.step, mode.grad, mode.backward) == (step.name, step, True, True)
        assert mode.description.startswith("zero_grad()") and "step()" in mode.description


@pytest.mark.parametrize("name", ["step-", "step-sgd-", "step-adam", "step-sgd-x1", "step-sgd-x02"])
def test_names_of_no_step_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a training step"):
        modes.get_mode(name)
    with pytest.raises(ValueError, match="no mode 'backwards'"):
        modes.get_mode("backwards")


def test_options_spell_out_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(options: argparse.Namespace, *_: object) -> int:
        asked.append([*options.modes, *options.extra_modes])
        return 0

    monkeypatch.setattr(cli, "_run", run)
    cli.main(["--optimizer", "sgd", "adagrad", "--clip", "off", "on", "--uses", "2", "--tied"])
    cli.main(["--modes", "forward-grad", "step", "--accumulate", "3", "--no-foreach"])
    cli.main(["--modes", "step-adamw-x4"])
    cli.main(["--suite", "step"])
    assert asked[0] == [
        f"step-{optimizer}{clip}-x2-tied"
        for optimizer in ("sgd", "adagrad")
        for clip in ("", "-clip")
    ]
    assert asked[1] == ["forward-grad", "step-sgd-accumulate3-no-foreach"]
    assert asked[2] == ["step-adamw-x4"]
    suite = suites.SUITES["step"]
    assert asked[3] == [*suite.modes, *suite.extra_modes]
    for mistake in (["--modes", "forward-grad", "--tied"], ["--modes", "step-adam"]):
        with pytest.raises(SystemExit):
            cli.main(mistake)
    assert "does not name step" in capsys.readouterr().err


def test_the_step_suite_has_its_grid_and_its_extras_once_a_table() -> None:
    suite = suites.SUITES["step"]
    tables = {(case.num_embeddings, case.embedding_dim) for case in suite.cases}
    assert tables == {(200_000, 64), (1_000_000, 64), (50_257, 768), (32_000, 512), (100, 100)}
    assert {case.distribution for case in suite.cases} == {"uniform", "zipf", "zipf-sorted"}
    assert {case.tokens for case in suite.cases} == {64, 4096, 16_384, 65_536}
    assert set(suite.providers) == {BASELINE, SUBJECT, KEPT}
    for name in (*suite.modes, *suite.extra_modes):
        modes.get_mode(name)
    settings = Settings("step", ["a"], [1], extra_modes=["b"], extra_tokens=4096)
    assert settings.modes_of(4096) == ["a", "b"]
    assert settings.modes_of(64) == ["a"]


def test_the_optimizers_suite_has_each_clipped_and_foreach_or_not() -> None:
    suite = suites.SUITES["optimizers"]
    steps = [Step.parse(name) for name in suite.modes]
    assert {(s.optimizer, s.clip, s.foreach) for s in steps} == {
        (optimizer, clip, foreach)
        for optimizer in ("sgd", "adamw", "adagrad")
        for clip in (False, True)
        for foreach in (None, True)
    }
    assert {case.num_embeddings for case in suite.cases} == {
        case.num_embeddings for case in suites.SUITES["step"].cases
    }


def test_the_list_shows_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--suite", "step", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "step-sgd-clip-x2" in listed and "step-adamw" in listed and "zipf-sorted" in listed


# Data.


def test_sorted_zipf_has_its_frequent_rows_first() -> None:
    (indices,) = make_indices(Case(100, 8, 20_000, "zipf-sorted"), batches=1, seed=0)
    counts = indices.bincount(minlength=100).double()
    assert float(counts[0] / counts[9]) == pytest.approx(10**1.05, rel=0.25)
    assert counts[:10].tolist() == sorted(counts[:10].tolist(), reverse=True)


def test_every_use_of_every_micro_batch_has_its_own_indices_and_one_order_of_rows() -> None:
    data = data_of(Case(1000, 2, 500, "zipf-1.2"))
    made = step_data_of(data, Step(uses=2, accumulate=3))
    assert len(made.batches) == 2
    assert all(len(batch) == 3 and all(len(uses) == 2 for uses in batch) for batch in made.batches)
    drawn = list(steps.named_rows(made.batches))
    assert len({tuple(indices.tolist()) for indices in drawn}) == len(drawn) == 12
    hottest = {int(indices.bincount().argmax()) for indices in drawn}
    assert len(hottest) == 1
    again = step_data_of(data, Step(uses=2, accumulate=3))
    assert torch.equal(next(iter(steps.named_rows(again.batches))), drawn[0])


# What a step does.


def test_a_step_trains_the_table_as_written_out_by_hand() -> None:
    data = data_of(Case(20, 3, 8, dtype="float64"))
    made = step_data_of(data, Step(clip=True, uses=2, tied=True, accumulate=2))
    module = nn.Embedding(20, 3, _weight=data.weight.clone())
    training_step(Lookup(module, module.weight), made, 0.5)(made.batches[0])
    grad = torch.zeros_like(data.weight)
    for uses in made.batches[0]:
        for indices in uses:
            grad.index_add_(0, indices, made.grad_output)
        grad += made.grad_logits.T @ made.hidden
    norm = float(grad.norm())
    assert norm > made.max_norm
    expected = data.weight - 0.5 * grad * made.max_norm / norm
    torch.testing.assert_close(module.weight.detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.weight.grad.norm().item(), made.max_norm, rtol=1e-5, atol=0)


def test_a_step_begins_without_the_last_gradient() -> None:
    data = data_of(Case(20, 3, 8))
    made = step_data_of(data, Step())
    module = nn.Embedding(20, 3, _weight=data.weight.clone())
    train = training_step(Lookup(module, module.weight), made, 1.0)
    train(made.batches[0])
    first = module.weight.grad.clone()
    train(made.batches[0])
    assert torch.equal(module.weight.grad, first)


def test_bytes_of_a_step_written_out_by_hand() -> None:
    case = Case(10, 5, 4, "half-padding")
    row, indices = 5 * 4, 4 * 8
    data = make_step_data(
        make_data(case, batches=1, device="cpu", seed=0), Step(), batches=1, seed=0, device="cpu"
    )

    def moved(step: Step, *batch: tuple[list[int], ...]) -> int:
        tensors = tuple(tuple(torch.tensor(use) for use in uses) for uses in batch)
        logits = torch.ones(3, 10) if step.tied else None
        made = steps.StepData(step, [tensors], data.grad_output, None, logits)
        return steps.step_bytes(made, case)

    # Three distinct rows of which two are trained; two tokens are padding.
    lookup = 2 * indices + (3 + 4 + 2) * row
    use = [0, 0, 3, 7]
    assert moved(Step(), (use,)) == lookup + (2 + 2 + 2 * 2) * row
    assert moved(Step(clip=True), (use,)) == lookup + (2 + 2 + 2 * 2 + 3 * 2) * row
    assert moved(Step("adagrad"), (use,)) == lookup + (2 + 2 + 2 * 4) * row
    assert moved(Step("adamw"), (use,)) == lookup + (2 + 2 + 6 * 10) * row
    assert moved(Step(uses=2), (use, use)) == 2 * lookup + (2 + 2 + 2 * 2) * row
    assert moved(Step(accumulate=2), (use,), (use,)) == 2 * lookup + (6 + 2 + 2 * 2) * row
    tied = lookup + (2 + 10 + 2 * 10 + 2 * 10) * row + 2 * 30 * 4
    assert moved(Step(tied=True), (use,)) == tied
