"""Runs cases: build, verify, time interleaved, and count."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.bandwidth import measure_bandwidth
from benchmarks.cases import Case, CaseData, make_data, make_weight
from benchmarks.environment import (
    available_memory_bytes,
    describe_environment,
    load_average,
    without_folders,
)
from benchmarks.graphs import replay
from benchmarks.memory import measure_memory
from benchmarks.modes import (
    MODES,
    SMALL_TOKENS,
    Mode,
    count_traffic,
    deterministic,
    make_call,
    minimum_bytes,
)
from benchmarks.progress import Bar, progress_bar
from benchmarks.providers import BASELINE, Lookup, Provider
from benchmarks.record import (
    Measurement,
    Memory,
    Rejection,
    Results,
    Settings,
    significant,
)
from benchmarks.stats import summarise
from benchmarks.timing import Sampler, Samples, interleave
from benchmarks.verify import References, WrongResult, make_references, verify


class _TooLarge(Exception):
    """A case needs more memory than there is; the message says how much."""


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
        timed = len(self.settings.threads) * len(self.settings.modes)
        memory = len(self.settings.modes) * len(self.providers) if self.settings.memory else 0
        return len(cases) * (timed + memory)

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
        except (_TooLarge, torch.OutOfMemoryError) as error:
            for provider in self.providers:
                self._reject_for(error, case.name, provider)
            bar.update(self._steps([case]))
            return
        for threads in self.settings.threads:
            torch.set_num_threads(threads)
            verified = self._verify(data, references)
            for mode_name in self.settings.modes:
                bar.set_description(f"{case.name} {mode_name} x{threads}")
                if verified:
                    self._time(data, MODES[mode_name], threads, verified)
                bar.update()
        if self.settings.memory:
            self._measure_memory(case, list(verified.values()), bar)

    def _make_data(self, case: Case) -> CaseData:
        table = (case.num_embeddings, case.embedding_dim, case.dtype)
        if table != self._table:
            make_weight.cache_clear()  # or the last table were there while the next one is made
            self._table = table
        available = available_memory_bytes(self.settings.device)
        if available is not None and case.working_bytes > available:
            raise _TooLarge(f"needs {case.working_bytes / 2**30:.1f} GiB of memory")
        return make_data(
            case,
            batches=self.settings.batches,
            device=self.settings.device,
            seed=self.settings.seed,
        )

    def _reject(self, rejection: Rejection) -> None:
        if rejection not in self.results.rejections:
            self.results.rejections.append(rejection)

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
            except WrongResult as error:
                self._reject(Rejection(case, provider.name, "wrong", str(error)))
            except Exception as error:  # a provider may fail in any way; the others go on
                self._reject_for(error, case, provider)
        return verified

    def _reject_for(self, error: Exception, case: str, provider: Provider) -> None:
        reason = (str(error).splitlines() or [""])[0]
        if not isinstance(error, _TooLarge):
            reason = without_folders(f"{type(error).__name__}: {reason}")
        fits = not isinstance(error, (_TooLarge, torch.OutOfMemoryError))
        self._reject(Rejection(case, provider.name, "failed" if fits else "skipped", reason))

    def _samplers(
        self, data: CaseData, mode: Mode, verified: dict[str, _Verified]
    ) -> dict[str, Sampler]:
        samplers = {}
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
            samplers[name] = Sampler(
                call,
                mode,
                data.batches,
                self.settings.device,
                self.settings.cold,
                is_deterministic,
            )
        return samplers

    def _time(
        self, data: CaseData, mode: Mode, threads: int, verified: dict[str, _Verified]
    ) -> None:
        settings, is_small = self.settings, data.case.tokens <= SMALL_TOKENS
        if mode.graph and not (is_small and settings.device == "cuda"):
            return
        samplers = self._samplers(data, mode, verified)
        samples = interleave(
            samplers,
            rounds=settings.rounds,
            min_time=settings.min_time,
            budget=settings.budget,
            shuffler=self._shuffler,
        )
        traffic = count_traffic(data.batches, data.case.padding_idx)
        copy = self.results.bandwidth.get(str(threads), {}).get("copy")
        for name, sampler in samplers.items():
            measurement = summarise_samples(
                data.case, mode, threads, name, samples, minimum_bytes(mode, data.case, traffic)
            )
            measurement = dataclasses.replace(
                measurement,
                copy_share=copy and significant(measurement.gb_per_second / copy),
                page_faults=sampler.page_faults(),
                error_roundings=significant(verified[name].error_roundings),
                launches=sampler.launches() if is_small and not mode.graph else None,
            )
            self.results.measurements.append(measurement)
        for entry in verified.values():
            entry.lookup.weight.grad = None

    def _measure_memory(self, case: Case, verified: Sequence[_Verified], bar: Bar) -> None:
        for mode in self.settings.modes:
            for provider in (entry.provider for entry in verified):
                if MODES[mode].graph or not MODES[mode].applies_to(provider):
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


def summarise_samples(
    case: Case,
    mode: Mode,
    threads: int,
    provider: str,
    samples: dict[str, Samples],
    bytes_moved: int,
) -> Measurement:
    """A provider's median and quantiles, and its ratio to the baseline timed in the same rounds."""
    own = samples[provider]
    summary = summarise(own.seconds)
    ratio = ratio_p10 = ratio_p90 = None
    if baseline := samples.get(BASELINE):
        ratio = significant(summarise(baseline.seconds).median / summary.median)
        paired = [b / s for b, s in zip(baseline.seconds, own.seconds, strict=True)]
        spread = summarise(paired)
        ratio_p10, ratio_p90 = significant(spread.p10), significant(spread.p90)
    return Measurement(
        case=case.name,
        **dataclasses.asdict(case),
        threads=threads,
        mode=mode.name,
        provider=provider,
        median=significant(summary.median),
        p10=significant(summary.p10),
        p90=significant(summary.p90),
        rounds=len(own.seconds),
        inner=own.inner,
        ratio=ratio,
        ratio_p10=ratio_p10,
        ratio_p90=ratio_p90,
        minimum_bytes=bytes_moved,
        gb_per_second=significant(bytes_moved / summary.median / 1e9),
        copy_share=None,
        page_faults=None,
        error_roundings=0.0,
    )
