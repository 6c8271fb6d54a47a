"""The benchmark harness: its data, its arithmetic, and that it never times a wrong result."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib", reason="the figures need the bench extra")

from benchmarks import modes, stats, suites
from benchmarks.cases import DISTRIBUTIONS, Case, make_indices
from benchmarks.figures import scaling_group
from benchmarks.processes import output_of
from benchmarks.providers import BASELINE, Lookup
from benchmarks.summary import summarise_samples
from benchmarks.timing import Sampler, Samples, interleave, turns

# Cases and their data.


def test_data_follow_from_the_seed_alone() -> None:
    case = Case(1000, 8, 64, "zipf")
    again = make_indices(case, batches=3, seed=5)
    for first, second in zip(make_indices(case, batches=3, seed=5), again, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(make_indices(case, batches=3, seed=6)[0], again[0])
    assert not torch.equal(again[0], again[1])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_embeddings", [1, 2, 1000])
def test_every_distribution_stays_inside_the_table(distribution: str, num_embeddings: int) -> None:
    case = Case(num_embeddings, 8, 333, distribution, index_dtype="int32")
    for indices in make_indices(case, batches=2, seed=0):
        assert indices.dtype == torch.int32
        assert indices.shape == (333,)
        assert 0 <= int(indices.min()) and int(indices.max()) < num_embeddings


def test_distributions_are_what_their_names_say() -> None:
    tokens = 20_000

    def counts(distribution: str) -> Tensor:
        (indices,) = make_indices(Case(100, 8, tokens, distribution), batches=1, seed=0)
        return indices.bincount(minlength=100).sort(descending=True).values

    # 200 hits a row are expected; 300 is seven standard deviations away.
    assert int(counts("uniform")[0]) < 300
    assert int(counts("uniform")[-1]) > 100
    assert int(counts("all-same")[0]) == tokens
    zipf = counts("zipf").double()
    assert float(zipf[0] / zipf[9]) == pytest.approx(10**1.05, rel=0.25)
    steeper = counts("zipf-1.2").double()
    assert float(steeper[0] / steeper[9]) == pytest.approx(10**1.2, rel=0.25)
    (ascending,) = make_indices(Case(100, 8, tokens, "sorted"), batches=1, seed=0)
    assert bool((ascending.diff() >= 0).all())
    (padded,) = make_indices(Case(100, 8, tokens, "half-padding"), batches=1, seed=0)
    assert int((padded == 0).sum()) == tokens // 2


def test_suites_have_distinct_cases_and_the_tiny_one_has_both_examples() -> None:
    for suite in suites.SUITES.values():
        names = [case.name for case in suite.cases]
        assert names and len(names) == len(set(names))
    tiny = suites.SUITES["tiny"].cases
    assert [(c.num_embeddings, c.embedding_dim, c.tokens) for c in tiny] == [
        (10, 100, 2),
        (10, 3, 4),
    ]


def test_the_cpu_grid_covers_the_distributions_and_both_sides_of_32_mib() -> None:
    cases = suites.SUITES["cpu"].cases
    assert {case.distribution for case in cases} == set(DISTRIBUTIONS) - {"zipf-1.2", "zipf-sorted"}
    assert {case.dtype for case in cases} == {"float32", "bfloat16"}
    assert any(case.output_bytes > 32 * 2**20 for case in cases)
    assert {1, 262_144} <= {case.tokens for case in cases}


def test_patterns_and_dtypes_select_cases() -> None:
    zipf = suites.select_cases("cpu", patterns=["zipf"])
    assert zipf and all(case.distribution == "zipf" for case in zipf)
    one = suites.select_cases("tiny", patterns=["10x3/*"], dtypes=["float16"], index_dtype="int32")
    assert [case.name for case in one] == ["10x3/4/uniform/float16/int32"]
    assert suites.select_cases("tiny", patterns=["nothing"]) == []


# Arithmetic.


def test_quantiles_interpolate() -> None:
    assert stats.quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert stats.quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    summary = stats.summarise([float(i) for i in range(11)])
    assert (summary.p10, summary.median, summary.p90) == (1.0, 5.0, 9.0)
    with pytest.raises(ValueError, match="no values"):
        stats.quantile([], 0.5)


def test_the_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert stats.geometric_mean([4.0, 0.25]) == pytest.approx(1.0)
    assert stats.geometric_mean([]) is None


def test_ratio_is_the_baseline_median_over_the_providers() -> None:
    case = Case(10, 3, 4)
    samples = {
        BASELINE: Samples([6e-6, 9e-6, 6e-6], inner=1),
        "other": Samples([2e-6, 1e-6, 4e-6], inner=7),
    }
    mode = modes.MODES["forward-no-grad"]
    other = summarise_samples(case, mode, 1, "other", samples, bytes_moved=4000)
    assert other.median == 2e-6
    assert other.ratio == 3.0
    assert (other.rounds, other.inner) == (3, 7)
    assert other.gb_per_second == pytest.approx(2.0)
    # Within rounds the ratios are 3, 9 and 1.5.
    assert other.ratio_p10 == pytest.approx(1.8)
    assert other.ratio_p90 == pytest.approx(7.8)
    baseline = summarise_samples(case, mode, 1, BASELINE, samples, bytes_moved=4000)
    assert baseline.ratio == 1.0


def test_minimum_bytes_count_distinct_rows_and_leave_padding_out() -> None:
    case = Case(10, 5, 4, "half-padding", dtype="bfloat16", index_dtype="int32")
    traffic = modes.count_traffic([torch.tensor([0, 0, 3, 7])], case.padding_idx)
    assert traffic == modes.Traffic(tokens=4, rows=3, trained_tokens=2, trained_rows=2)
    row, indices = 5 * 2, 4 * 4
    forward = indices + 3 * row + 4 * row
    assert modes.minimum_bytes(modes.MODES["forward-grad"], case, traffic) == forward
    backward = indices + 2 * row + 2 * row
    both = modes.minimum_bytes(modes.MODES["forward-backward"], case, traffic)
    assert both == forward + backward


def test_scaling_group_varies_one_axis_alone() -> None:
    mode = modes.MODES["forward-grad"]
    samples = {BASELINE: Samples([1e-6], 1)}
    measured = [
        summarise_samples(case, mode, 1, BASELINE, samples, bytes_moved=case.tokens)
        for case in (Case(10, 4, 8), Case(20, 4, 8), Case(40, 4, 8), Case(40, 4, 9))
    ]
    assert [m.num_embeddings for m in scaling_group(measured, "num_embeddings")] == [10, 20, 40]
    assert [m.tokens for m in scaling_group(measured, "tokens")] == [8, 9]
    assert scaling_group(measured, "threads") == []


# Timing.


def test_each_round_times_everyone_once_in_an_order_that_changes() -> None:
    log: list[str] = []
    samplers = {
        name: Sampler(
            lambda indices, name=name: log.append(name),  # type: ignore[misc]
            modes.MODES["forward-no-grad"],
            [torch.tensor([0])],
            cold=True,  # so that a sample is a single call
        )
        for name in "abc"
    }
    rounds = 12
    samples = interleave(
        samplers, rounds=rounds, min_time=1e-9, budget=60, shuffler=random.Random(0)
    )
    assert all(len(samples[name].seconds) == rounds for name in "abc")
    timed = log[-3 * rounds :]
    orders = {tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(orders) > 1


@pytest.mark.parametrize(("rounds", "run"), [(3, 3), (9, 5)])
def test_whose_turn_it_is_and_in_which_round(rounds: int, run: int) -> None:
    """Some rounds are run, though the budget is spent before the first is through."""
    order = list(turns("ab", rounds=rounds, budget=0.0, shuffler=random.Random(0)))
    assert [done for done, _ in order] == [done for done in range(run) for _ in "ab"]
    assert sorted(order) == [(done, name) for done in range(run) for name in "ab"]


def test_samples_rotate_through_the_batches() -> None:
    seen: list[int] = []
    batches = [torch.tensor([i]) for i in range(3)]
    mode = modes.MODES["forward-no-grad"]
    sampler = Sampler(lambda indices: seen.append(int(indices)), mode, batches)
    sampler.sample(2)
    sampler.sample(2)
    assert seen == [0, 1, 2, 0]


def test_a_spent_budget_ends_the_rounds() -> None:
    sampler = Sampler(lambda indices: None, modes.MODES["forward-grad"], [torch.tensor([0])])
    samples = interleave(
        {"a": sampler}, rounds=1000, min_time=1e-9, budget=0.0, shuffler=random.Random(0)
    )
    assert len(samples["a"].seconds) == 5


@pytest.mark.parametrize("name", modes.DEFAULT_MODES)
def test_a_call_leaves_no_gradient_behind(name: str) -> None:
    module = nn.Embedding(10, 3)
    call = modes.make_call(Lookup(module, module.weight), modes.MODES[name], torch.ones(4, 3))
    call(torch.tensor([1, 2, 3, 4]))
    assert module.weight.grad is None


def test_accumulation_adds_to_the_gradient_that_is_there() -> None:
    module = nn.Embedding(10, 3)
    lookup = Lookup(module, module.weight)
    call = modes.make_call(lookup, modes.MODES["accumulate"], torch.ones(4, 3))
    for _ in range(3):
        call(torch.tensor([1, 2, 3, 4]))
    assert module.weight.grad.tolist()[1:5] == [[3.0] * 3] * 4


def test_what_another_program_says() -> None:
    assert output_of(sys.executable, "-c", "print(2**5)") == "32\n"
    with pytest.raises(RuntimeError, match="^KeyError: 'nobody'$"):
        output_of(sys.executable, "-c", "{}['nobody']")
