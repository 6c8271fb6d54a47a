"""The benchmark harness finds wrong training steps, so that none is timed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import modes, providers, rejections, runner, steps
from benchmarks.cases import Case, CaseData, make_data, make_weight
from benchmarks.providers import BASELINE, KEPT, SUBJECT, Lookup, Provider
from benchmarks.record import Settings
from benchmarks.steps import OPTIMIZERS, Step, make_step_data
from benchmarks.verify import WrongResult
from benchmarks.verify_steps import make_step_reference, verify_step

CHECKED = [
    *(Step(name) for name in OPTIMIZERS),
    Step(clip=True),
    Step(uses=2),
    Step(tied=True),
    Step("adagrad", clip=True, uses=4, tied=True, foreach=True, accumulate=2),
]


def data_of(case: Case) -> CaseData:
    return make_data(case, batches=2, device="cpu", seed=0)


def step_data_of(data: CaseData, step: Step) -> steps.StepData:
    return make_step_data(data, step, batches=2, seed=0, device="cpu")


@pytest.mark.parametrize("step", CHECKED, ids=lambda step: step.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distribution", ["zipf-sorted", "half-padding", "uniform"])
@pytest.mark.parametrize("name", [BASELINE, SUBJECT, KEPT])
def test_right_steps_pass_and_leave_the_table_as_it_was(
    step: Step, dtype: str, distribution: str, name: str
) -> None:
    provider = providers.get_provider(name)
    assert provider.unavailable() is None
    case = Case(60, 6, 100, distribution, dtype)
    data = data_of(case)
    original, made = data.weight.clone(), step_data_of(data, step)
    reference = make_step_reference(original, made, case)
    lookup = provider.build(data.weight, case.padding_idx)
    for _ in range(2):
        verify_step(lookup, made, reference)
        assert torch.equal(lookup.weight.detach(), original)
        assert lookup.weight.grad is None


@pytest.mark.parametrize("name", [BASELINE, SUBJECT])
def test_the_error_of_a_long_norm_is_not_the_lookups(name: str) -> None:
    provider = providers.get_provider(name)
    assert provider.unavailable() is None
    case = Case(32_000, 512, 4096, "zipf-sorted")
    data = data_of(case)
    original, made = data.weight.clone(), step_data_of(data, Step(clip=True, uses=2))
    grad = torch.zeros_like(original)
    for indices in steps.named_rows(made.batches[:1]):
        grad.index_add_(0, indices, made.grad_output)
    exact = float(grad.double().norm())
    assert abs(float(grad.norm()) / exact - 1) > 1e-4  # which is what makes this a test
    reference = make_step_reference(original, made, case)
    verify_step(provider.build(data.weight, None), made, reference)


def faulty(weight: Tensor, fault: str) -> Lookup:
    """A lookup whose gradient [num_embeddings, embedding_dim] goes wrong as ``fault`` says."""
    parameter = nn.Parameter(weight.clone())
    seen: list[Tensor] = []

    def wrong(grad: Tensor) -> Tensor:
        if fault == "doubled":
            return 2 * grad
        grad = grad.clone()
        if fault == "stray":
            grad[-1] = 1.0
        if fault == "stale":  # rows of the step before are not cleared
            seen.append(grad)
            return grad + (seen[-2] if len(seen) > 1 else 0)
        return grad

    parameter.register_hook(wrong)

    def call(indices: Tensor) -> Tensor:
        return parameter.index_select(0, indices)

    return Lookup(call, parameter)


# AdamW and Adagrad divide a gradient by its own size, and so does clipping: there only rows that
# should have none show.
FOUND = [
    (step, fault)
    for step in CHECKED
    for fault in ("doubled", "stray", "stale")
    if (step.optimizer == "sgd" or not step.tied and fault != "doubled")
    and not (step.clip and fault == "doubled")
]


@pytest.mark.parametrize(("step", "fault"), FOUND, ids=lambda part: getattr(part, "name", part))
def test_a_wrong_step_is_found(step: Step, fault: str) -> None:
    case = Case(60, 6, 40, "zipf-sorted")
    data = data_of(case)
    made = step_data_of(data, step)
    # No token names the last row, which the stray gradient is for.
    for indices in steps.named_rows(made.batches):
        indices.clamp_(max=58)
    reference = make_step_reference(data.weight.clone(), made, case)
    with pytest.raises(WrongResult, match="step:"):
        verify_step(faulty(data.weight, fault), made, reference)


def loses_second_use(weight: Tensor, padding_idx: int | None) -> Lookup:
    """A lookup of which a second use in one graph gets no gradient."""
    parameter = nn.Parameter(weight)
    waiting: list[int] = []
    parameter.register_hook(lambda grad: waiting.clear())

    def call(indices: Tensor) -> Tensor:
        rows = parameter.index_select(0, indices)
        if waiting:
            return rows.detach()
        if rows.requires_grad:
            waiting.append(1)
        return rows

    return Lookup(call, parameter)


def test_the_runner_times_no_wrong_step_and_restores_the_table() -> None:
    baseline = providers.get_provider(BASELINE)
    wrong = Provider("wrong", "wrong where a step has two lookups", loses_second_use)
    names = ["forward-backward", "step-sgd", "step-sgd-x2"]
    settings = Settings("tiny", names, [1], rounds=2, min_time=1e-6, bandwidth_mib=0)
    case = Case(30, 3, 16)
    before = data_of(case).weight.clone()
    results = runner.Runner("run", settings, [baseline, wrong]).run([case], progress=False)
    timed = {(m.provider, m.mode) for m in results.measurements}
    assert timed == {(BASELINE, name) for name in names} | {("wrong", name) for name in names[:2]}
    (found,) = results.rejections
    assert (found.kind, found.reason.split(":")[0]) == ("wrong", "step-sgd-x2")
    after = make_weight(30, 3, torch.float32, "cpu", 0)  # the one that was trained, kept for later
    assert after is data_of(case).weight and torch.equal(after, before)


def test_a_step_that_needs_too_much_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1000, 3, 4)
    monkeypatch.setattr(rejections, "available_memory_bytes", lambda device: case.working_bytes + 1)
    settings = Settings("tiny", ["step-adamw"], [1], rounds=1, min_time=1e-6, bandwidth_mib=0)
    chosen = [providers.get_provider(BASELINE)]
    results = runner.Runner("run", settings, chosen).run([case], progress=False)
    assert results.measurements == []
    assert [(r.kind, r.reason.split(":")[0]) for r in results.rejections] == [
        ("skipped", "step-adamw")
    ]


def test_sparse_gradients_are_left_out_where_they_are_refused() -> None:
    sparse = providers.get_provider("nn.Embedding-sparse")
    taken = {step.name for step in CHECKED if modes.get_mode(step.name).applies_to(sparse)}
    assert taken == {"step-sgd", "step-adagrad", "step-sgd-x2", "step-sgd-tied"}
