"""Results as Markdown tables: NAME.json -> NAME.md, with the figures of ``figures.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.environment import Environment
from benchmarks.formats import (
    format_bytes,
    format_ratio,
    format_seconds,
    markdown_table,
    mean_ratio,
    unique,
)
from benchmarks.modes import get_mode
from benchmarks.providers import BASELINE, SUBJECT
from benchmarks.record import Measurement, Memory, Results

BUSY_LOAD_PER_CORE = 0.5


def was_busy(environment: Environment) -> bool:
    """Whether other work shared the machine when the run began."""
    load, cores = environment.get("load_average"), environment.get("cores")
    if not isinstance(load, float) or not isinstance(cores, int):
        return False
    return load > BUSY_LOAD_PER_CORE * cores


def render_markdown(results: Results, figures: Sequence[str] = ()) -> str:
    """The whole report; ``figures`` are file names beside it."""
    sections = [
        f"# Benchmark results: {results.name}",
        _introduction(results),
        _summary(results),
        _steps(results),
        _slower(results),
        *(f"![{name}]({name})" for name in figures),
        *_details(results),
        _bandwidth(results),
        _by_case("Peak memory growth", results, [(m, m.peak_bytes) for m in results.memory]),
        _page_faults(results),
        _launches(results),
        _rejections(results),
        _machine(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _introduction(results: Results) -> str:
    environment, settings = results.environment, results.settings
    lines = [
        f"Times are medians of interleaved rounds; a ratio is {BASELINE}'s median over the "
        "provider's, so above 1 is faster. `benchmarks/README.md` says how each figure is made.",
        "",
        f"- {environment['cpu']}, {environment['cores']} cores"
        + (f", {environment['gpu']}" if "gpu" in environment else "")
        + f"; torch {environment['torch']}; {environment['date']}",
        f"- suite `{settings.suite}`, device `{settings.device}`, up to {settings.rounds} rounds, "
        f"{'cold' if settings.cold else 'warm'} caches, seed {settings.seed}",
    ]
    if not results.complete:
        lines.append("- **The run was interrupted: cases are missing.**")
    if was_busy(environment):
        lines.append(f"- **The machine was busy (load {environment['load_average']}).**")
    if environment.get("dirty"):
        lines.append("- Measured with changes that are not committed.")
    return "\n".join(lines)


def _summary(results: Results) -> str:
    groups: dict[tuple[str, int], dict[str, list[Measurement]]] = {}
    for measurement in results.measurements:
        if measurement.provider != BASELINE:
            by_mode = groups.setdefault((measurement.provider, measurement.threads), {})
            by_mode.setdefault(measurement.mode, []).append(measurement)
    measured = unique(m.mode for m in results.measurements)
    modes = [mode for mode in measured if get_mode(mode).step is None]
    rows = []
    for (provider, threads), by_mode in sorted(groups.items(), key=lambda group: group[0][1]):
        means = [_mean_and_least(by_mode.get(mode, [])) for mode in modes]
        rows.append([f"{_label(results, provider)}, {_threads(threads)}", *means])
    table = markdown_table(["geometric mean of ratios (least)", *modes], rows) if modes else ""
    if any(p.gradient == "sparse" and p.unavailable is None for p in results.providers):
        table += "\n\n† The gradient is sparse, which is less than a dense gradient offers."
    return table


def _steps(results: Results) -> str:
    """The means of whole training steps: a row a variant, since there may be many."""
    steps = [m for m in results.measurements if get_mode(m.mode).step and m.provider != BASELINE]
    if not steps:
        return ""
    columns = sorted({(m.threads, m.provider) for m in steps})
    rows = []
    for mode in unique(m.mode for m in steps):
        own = [m for m in steps if m.mode == mode]
        groups = [[m for m in own if (m.threads, m.provider) == column] for column in columns]
        cases = str(len({m.case for m in own}))
        rows.append([f"`{mode}`", cases, *(_mean_and_least(group) for group in groups)])
    header = [f"{_label(results, provider)}, {_threads(n)}" for n, provider in columns]
    table = markdown_table(["geometric mean of ratios (least)", "cases", *header], rows)
    return "## Whole training steps\n\n" + table


def _slower(results: Results) -> str:
    """Every measurement of ours whose median is above the baseline's, the worst first."""
    medians = {
        (m.case, m.mode, m.threads): m.median
        for m in results.measurements
        if m.provider == BASELINE
    }
    slower = [
        (m.ratio, m)
        for m in results.measurements
        if m.ratio is not None and m.ratio < 1 and m.provider.startswith(SUBJECT)
    ]
    if not medians:
        return ""
    title = f"## Slower than {BASELINE}\n\n"
    if not slower:
        return title + f"No case, in no mode: {SUBJECT} is below 1 nowhere."
    rows = [
        [
            f"{m.case} {m.mode}",
            f"{_label(results, m.provider)}, {_threads(m.threads)}",
            f"{format_ratio(ratio)} ({format_ratio(m.ratio_p10)} to {format_ratio(m.ratio_p90)})",
            format_seconds(medians[m.case, m.mode, m.threads]),
            format_seconds(m.median),
        ]
        for ratio, m in sorted(slower, key=lambda entry: entry[0])
    ]
    header = ["case, mode", "provider", "ratio (p10 to p90)", BASELINE, "its own"]
    return title + markdown_table(header, rows)


def _mean_and_least(measurements: Sequence[Measurement]) -> str:
    least = min((m.ratio for m in measurements if m.ratio is not None), default=None)
    return f"{format_ratio(mean_ratio(measurements))} ({format_ratio(least)})"


def _label(results: Results, provider: str) -> str:
    sparse = any(p.name == provider and p.gradient == "sparse" for p in results.providers)
    return f"{provider} †" if sparse else provider


def _threads(count: int) -> str:
    return f"{count} thread" + ("" if count == 1 else "s")


def _details(results: Results) -> list[str]:
    sections = []
    for mode in unique(m.mode for m in results.measurements):
        for threads in sorted({m.threads for m in results.measurements if m.mode == mode}):
            chosen = [m for m in results.measurements if (m.mode, m.threads) == (mode, threads)]
            title = f"## {mode}, {_threads(threads)}"
            call = f"What a call does: {get_mode(mode).description}."
            sections.append("\n\n".join([title, call, _detail_table(results, chosen)]))
    return sections


def _detail_table(results: Results, measurements: Sequence[Measurement]) -> str:
    providers = unique(m.provider for m in measurements)
    cells = {(m.case, m.provider): m for m in measurements}
    header = ["case", *(_label(results, p) for p in providers), f"{SUBJECT} GB/s (of copy)"]
    rows = []
    for case in unique(m.case for m in measurements):
        row = [case]
        for provider in providers:
            cell = cells.get((case, provider))
            row.append("-" if cell is None else _cell(cell))
        subject = cells.get((case, SUBJECT))
        row.append("-" if subject is None else _rate(subject))
        rows.append(row)
    return markdown_table(header, rows)


def _cell(measurement: Measurement) -> str:
    time = format_seconds(measurement.median)
    if measurement.provider == BASELINE:
        return time
    return f"{time} ({format_ratio(measurement.ratio)})"


def _rate(measurement: Measurement) -> str:
    rate = f"{measurement.gb_per_second:.3g}"
    share = measurement.copy_share
    return rate if share is None else f"{rate} ({100 * share:.0f} %)"


def _bandwidth(results: Results) -> str:
    if not results.bandwidth:
        return ""
    names = unique(name for by_name in results.bandwidth.values() for name in by_name)
    rows = [
        [name, *(f"{by_name[name]:.3g}" for by_name in results.bandwidth.values())]
        for name in names
    ]
    header = ["GB/s", *(_threads(int(threads)) for threads in results.bandwidth)]
    return "## What the machine can do\n\n" + markdown_table(header, rows)


def _page_faults(results: Results) -> str:
    threads = max((m.threads for m in results.measurements), default=0)
    faults = [
        (m, m.page_faults)
        for m in results.measurements
        if m.threads == threads and m.mode == "forward-backward" and m.page_faults is not None
    ]
    return _by_case("Page faults a call", results, faults, lambda value: f"{value:.0f}")


def _launches(results: Results) -> str:
    counted = [(m, m.launches) for m in results.measurements if m.launches is not None]
    title = "Kernels, copies and fills a call"
    return _by_case(title, results, counted, lambda value: f"{value:.3g}")


def _by_case(
    title: str,
    results: Results,
    values: Sequence[tuple[Measurement | Memory, float]],
    formatter: Callable[[float], str] = format_bytes,
) -> str:
    """A table of one value for each (case, mode) and provider."""
    if not values:
        return ""
    keyed = {(f"{entry.case} {entry.mode}", entry.provider): value for entry, value in values}
    providers = unique(provider for _, provider in keyed)
    rows = []
    for key in unique(key for key, _ in keyed):
        found = (keyed.get((key, provider)) for provider in providers)
        rows.append([key, *("-" if value is None else formatter(value) for value in found)])
    header = ["case, mode", *(_label(results, provider) for provider in providers)]
    return f"## {title}\n\n" + markdown_table(header, rows)


def _rejections(results: Results) -> str:
    lines = [f"- {p.name}: {p.unavailable}" for p in results.providers if p.unavailable]
    lines += [f"- {r.provider} on {r.case}, **{r.kind}**: {r.reason}" for r in results.rejections]
    return "## Not timed\n\n" + "\n".join(lines) if lines else ""


def _machine(results: Results) -> str:
    described = {**results.environment}
    described.update({p.package: p.version for p in results.providers if p.version})
    rows = [[key.replace("_", " "), str(value)] for key, value in described.items() if value]
    return "## Machine and software\n\n" + markdown_table(["", ""], rows)


def write_report(results: Results, directory: Path) -> list[Path]:
    """Write NAME.md and, if matplotlib is there, its figures; returns their paths."""
    figures: list[Path] = []
    try:
        from benchmarks.figures import draw_figures
    except ImportError:
        print("no figures: matplotlib is not installed (pip install 'embed_ext[bench]')")
    else:
        figures = draw_figures(results, directory)
    path = directory / f"{results.name}.md"
    path.write_text(render_markdown(results, [figure.name for figure in figures]))
    return [path, *figures]
