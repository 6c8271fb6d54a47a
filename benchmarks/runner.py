"""Runs cases: build, verify, time interleaved, and count."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.bandwidth import measure_bandwidth
from benchmarks.cases import Case, CaseData, make_data, make_weight
from benchmarks.environment import describe_environment, load_average
from benchmarks.graphs import replay
from benchmarks.memory import measure_memory
from benchmarks.modes import (
    SMALL_TOKENS,
    Mode,
    count_traffic,
    deterministic,
    get_mode,
    make_call,
    minimum_bytes,
)
from benchmarks.progress import Bar, progress_bar
from benchmarks.providers import Lookup, Provider
from benchmarks.record import Memory, Rejection, Results, Settings, significant
from benchmarks.rejections import TooLarge, check_memory, rejection
from benchmarks.steps import (
    LEARNING_RATE,
    Step,
    make_step_data,
    step_bytes,
    step_working_bytes,
    training_step,
)
from benchmarks.summary import summarise_samples
from benchmarks.timing import Sampler, interleave
from benchmarks.verify import References, make_references, verify
from benchmarks.verify_steps import make_step_reference, restore, verify_step


@dataclasses.dataclass(frozen=True)
class _Verified:
    provider: Provider
    lookup: Lookup
    error_roundings: float


class Runner:
    """One run; ``results`` is valid, if not complete, at any moment of it."""

    def __init__(self, name: str, settings: Settings, providers: Sequence[Provider]) -> None:
        self.settings = settings
        reasons = {provider.name: provider.unavailable() for provider in providers}
        self.providers = [provider for provider in providers if reasons[provider.name] is None]
        self.results = Results(
            name=name,
            settings=settings,
            environment=describe_environment(settings.device),
            providers=[provider.record(reasons[provider.name]) for provider in providers],
        )
        self._table: tuple[int, int, str] | None = None  # of the last case
        self._shuffler = random.Random(settings.seed)

    def run(
        self,
        cases: Sequence[Case],
        *,
        progress: bool = True,
        after_case: Callable[[], object] = lambda: None,
    ) -> Results:
        threads_before = torch.get_num_threads()
        try:
            if self.settings.bandwidth_mib:
                self._measure_bandwidth()
            begun = time.monotonic()
            with progress_bar(self._steps(cases), shown=progress) as bar:
                for case in cases:
                    if time.monotonic() - begun > (self.settings.time_limit or float("inf")):
                        return self.results
                    self._run_case(case, bar)
                    after_case()
            self.results.complete = True
        finally:
            torch.set_num_threads(threads_before)
            self.results.environment["load_average_after"] = load_average()
        return self.results

    def _steps(self, cases: Sequence[Case]) -> int:
        modes = sum(len(self.settings.modes_of(case.tokens)) for case in cases)
        memory = len(self.providers) if self.settings.memory else 0
        return modes * (len(self.settings.threads) + memory)

    def _measure_bandwidth(self) -> None:
        for threads in self.settings.threads:
            torch.set_num_threads(threads)
            measured = measure_bandwidth(self.settings.device, self.settings.bandwidth_mib * 2**20)
            self.results.bandwidth[str(threads)] = {
                name: significant(value) for name, value in measured.items()
            }

    def _run_case(self, case: Case, bar: Bar) -> None:
        try:
            data = self._make_data(case)
            references = make_references(data, self.settings.seed)
        except (TooLarge, torch.OutOfMemoryError) as error:
            for provider in self.providers:
                self._reject_for(error, case.name, provider)
            bar.update(self._steps([case]))
            return
        for threads in self.settings.threads:
            torch.set_num_threads(threads)
            verified = self._verify(data, references)
            for mode in map(get_mode, self.settings.modes_of(case.tokens)):
                bar.set_description(f"{case.name} {mode.name} x{threads}")
                if verified and mode.step:
                    self._time_step(data, mode, mode.step, threads, verified)
                elif verified:
                    self._time(data, mode, threads, verified)
                bar.update()
        if self.settings.memory:
            self._measure_memory(case, list(verified.values()), bar)

    def _make_data(self, case: Case) -> CaseData:
        table = (case.num_embeddings, case.embedding_dim, case.dtype)
        if table != self._table:
            make_weight.cache_clear()  # or the last table were there while the next one is made
            self._table = table
        check_memory(case.working_bytes, self.settings.device)
        return make_data(
            case,
            batches=self.settings.batches,
            device=self.settings.device,
            seed=self.settings.seed,
        )

    def _reject(self, rejected: Rejection) -> None:
        if rejected not in self.results.rejections:
            self.results.rejections.append(rejected)

    def _reject_for(self, error: Exception, case: str, provider: Provider, mode: str = "") -> None:
        self._reject(rejection(error, case, provider.name, mode))

    def _verify(self, data: CaseData, references: References) -> dict[str, _Verified]:
        case, verified = data.case.name, {}
        for provider in self.providers:
            if data.case.padding_idx is not None and not provider.padding:
                self._reject(Rejection(case, provider.name, "skipped", "knows no padding_idx"))
                continue
            if provider.compiles:
                # Code compiled for other shapes counts against torch.compile's recompile limit.
                torch.compiler.reset()
            try:
                with deterministic(provider.deterministic):
                    lookup = provider.build(data.weight, data.case.padding_idx)
                    error_roundings = verify(lookup, references)
                verified[provider.name] = _Verified(provider, lookup, error_roundings)
            except Exception as error:  # a provider may fail in any way; the others go on
                self._reject_for(error, case, provider)
        return verified

    def _samplers(
        self, data: CaseData, mode: Mode, verified: dict[str, _Verified]
    ) -> dict[str, Sampler[Any]]:
        samplers: dict[str, Sampler[Any]] = {}
        for name, entry in verified.items():
            if not mode.applies_to(entry.provider):
                continue
            is_deterministic = entry.provider.deterministic
            call = make_call(entry.lookup, mode, data.grad_output)
            if mode.graph:
                try:
                    call = replay(call, mode, data.batches, is_deterministic)
                except Exception as error:  # not every lookup can be recorded
                    self._reject_for(error, data.case.name, entry.provider)
                    continue
            samplers[name] = self._sampler(call, mode, data.batches, entry.provider)
        return samplers

    def _sampler(
        self, call: Callable[[Any], object], mode: Mode, batches: Sequence[Any], provider: Provider
    ) -> Sampler[Any]:
        settings = self.settings
        return Sampler(call, mode, batches, settings.device, settings.cold, provider.deterministic)

    def _time(
        self, data: CaseData, mode: Mode, threads: int, verified: dict[str, _Verified]
    ) -> None:
        is_small = data.case.tokens <= SMALL_TOKENS
        if mode.graph and not (is_small and self.settings.device == "cuda"):
            return
        samplers = self._samplers(data, mode, verified)
        traffic = count_traffic(data.batches, data.case.padding_idx)
        bytes_moved = minimum_bytes(mode, data.case, traffic)
        self._interleave(data.case, mode, threads, verified, samplers, bytes_moved)
        for entry in verified.values():
            entry.lookup.weight.grad = None

    def _time_step(
        self,
        data: CaseData,
        mode: Mode,
        step: Step,
        threads: int,
        verified: dict[str, _Verified],
    ) -> None:
        case, settings = data.case, self.settings
        chosen = {n: entry for n, entry in verified.items() if mode.applies_to(entry.provider)}
        try:
            check_memory(step_working_bytes(step, case, len(chosen)), settings.device)
            original = data.weight.clone()
            tensors = make_step_data(
                data, step, batches=settings.batches, seed=settings.seed, device=settings.device
            )
            reference = make_step_reference(original, tensors, case)
        except (TooLarge, torch.OutOfMemoryError) as error:
            for entry in chosen.values():
                self._reject_for(error, case.name, entry.provider, mode.name)
            return
        samplers: dict[str, Sampler[Any]] = {}
        for name, entry in chosen.items():
            try:
                with deterministic(entry.provider.deterministic):
                    verify_step(entry.lookup, tensors, reference)
                call = training_step(entry.lookup, tensors, LEARNING_RATE)
                samplers[name] = self._sampler(call, mode, tensors.batches, entry.provider)
            except Exception as error:  # not every gradient is taken by every optimizer
                self._reject_for(error, case.name, entry.provider, mode.name)
        del reference
        self._interleave(case, mode, threads, chosen, samplers, step_bytes(tensors, case))
        for entry in chosen.values():
            restore(entry.lookup, original)

    def _interleave(
        self,
        case: Case,
        mode: Mode,
        threads: int,
        verified: dict[str, _Verified],
        samplers: dict[str, Sampler[Any]],
        bytes_moved: int,
    ) -> None:
        settings, is_small = self.settings, case.tokens <= SMALL_TOKENS
        samples = interleave(
            samplers,
            rounds=settings.rounds,
            min_time=settings.min_time,
            budget=settings.budget,
            shuffler=self._shuffler,
        )
        copy = self.results.bandwidth.get(str(threads), {}).get("copy")
        for name, sampler in samplers.items():
            measurement = summarise_samples(case, mode, threads, name, samples, bytes_moved)
            measurement = dataclasses.replace(
                measurement,
                copy_share=copy and significant(measurement.gb_per_second / copy),
                page_faults=sampler.page_faults(),
                error_roundings=significant(verified[name].error_roundings),
                launches=sampler.launches() if is_small and not mode.graph else None,
            )
            self.results.measurements.append(measurement)

    def _measure_memory(self, case: Case, verified: Sequence[_Verified], bar: Bar) -> None:
        for mode in self.settings.modes_of(case.tokens):
            for provider in (entry.provider for entry in verified):
                if get_mode(mode).graph or not get_mode(mode).applies_to(provider):
                    continue
                name = provider.name
                bar.set_description(f"{case.name} {mode} memory of {name}")
                try:
                    peak = measure_memory(
                        case,
                        name,
                        mode,
                        threads=self.settings.threads[-1],
                        device=self.settings.device,
                        seed=self.settings.seed,
                    )
                except RuntimeError as error:
                    self._reject(Rejection(case.name, name, "failed", str(error)))
                else:
                    self.results.memory.append(Memory(case.name, mode, name, peak))
            bar.update(len(self.providers))
