"""Runs cases: build, verify, time interleaved, and count."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from benchmarks.bandwidth import measure_bandwidth
from benchmarks.cases import Case, CaseData, make_data
from benchmarks.environment import (
    available_memory_bytes,
    describe_environment,
    load_average,
    without_folders,
)
from benchmarks.memory import measure_memory
from benchmarks.modes import MODES, Mode, count_traffic, make_call, minimum_bytes
from benchmarks.providers import BASELINE, Lookup, Provider
from benchmarks.record import (
    Measurement,
    Memory,
    ProviderRecord,
    Rejection,
    Results,
    Settings,
    significant,
)
from benchmarks.stats import summarise
from benchmarks.timing import Sampler, Samples, interleave
from benchmarks.verify import References, WrongResult, make_references, verify


@dataclasses.dataclass(frozen=True)
class _Verified:
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
            providers=[_record_provider(p, reasons[p.name]) for p in providers],
        )
        # A sparse .grad that is added to grows by every call: not the work of one step.
        self._sparse = {p.name for p in self.providers if p.gradient == "sparse"}
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
            with tqdm(total=self._steps(cases), disable=not progress, unit="step") as bar:
                for case in cases:
                    self._run_case(case, bar)
                    after_case()
        finally:
            torch.set_num_threads(threads_before)
        self.results.environment["load_average_after"] = load_average()
        self.results.complete = True
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

    def _run_case(self, case: Case, bar: tqdm[None]) -> None:
        available = available_memory_bytes()
        if available is not None and case.working_bytes > available:
            reason = f"needs {case.working_bytes / 2**30:.1f} GiB of memory"
            for provider in self.providers:
                self._reject(Rejection(case.name, provider.name, "skipped", reason))
            bar.update(self._steps([case]))
            return
        data = make_data(
            case,
            batches=self.settings.batches,
            device=self.settings.device,
            seed=self.settings.seed,
        )
        references = make_references(data, self.settings.seed)
        for threads in self.settings.threads:
            torch.set_num_threads(threads)
            verified = self._verify(data, references)
            for mode_name in self.settings.modes:
                bar.set_description(f"{case.name} {mode_name} x{threads}")
                if verified:
                    self._time(data, MODES[mode_name], threads, verified)
                bar.update()
        if self.settings.memory:
            self._measure_memory(case, list(verified), bar)

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
                lookup = provider.build(data.weight, data.case.padding_idx)
                verified[provider.name] = _Verified(lookup, verify(lookup, references))
            except WrongResult as error:
                self._reject(Rejection(case, provider.name, "wrong", str(error)))
            except Exception as error:  # a provider may fail in any way; the others go on
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                self._reject(Rejection(case, provider.name, "failed", without_folders(reason)))
        return verified

    def _time(
        self, data: CaseData, mode: Mode, threads: int, verified: dict[str, _Verified]
    ) -> None:
        settings = self.settings
        samplers = {
            name: Sampler(
                make_call(entry.lookup, mode, data.grad_output),
                mode,
                data.batches,
                settings.device,
                settings.cold,
            )
            for name, entry in verified.items()
            if not (mode.accumulate and name in self._sparse)
        }
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
            )
            self.results.measurements.append(measurement)
        for entry in verified.values():
            entry.lookup.weight.grad = None

    def _measure_memory(self, case: Case, names: Sequence[str], bar: tqdm[None]) -> None:
        for mode in self.settings.modes:
            for name in names:
                if MODES[mode].accumulate and name in self._sparse:
                    continue
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


def _record_provider(provider: Provider, unavailable: str | None) -> ProviderRecord:
    version = provider.version() if unavailable is None else None
    return ProviderRecord(
        name=provider.name,
        description=provider.description,
        gradient=provider.gradient,
        package=provider.package,
        version=version,
        unavailable=unavailable,
    )


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
