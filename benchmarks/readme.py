"""Writes README's figures from the results: ``python -m benchmarks.readme``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.environment import ROOT
from benchmarks.formats import markdown_table
from benchmarks.providers import BASELINE, KEPT, SUBJECT
from benchmarks.record import RESULTS_DIR, Measurement, Results
from benchmarks.stats import geometric_mean

BEGIN = "<!-- figures: python -m benchmarks.readme -->\n"
END = "<!-- end of figures -->\n"
SMALLEST_SHOWN = 40 * 2**20
# Whole steps: one machine table by table, and then the means of others.
STEPS, STEPS_ELSEWHERE = "step-cpu", ("step-cpu-epyc",)
STEP_COLUMNS = (
    ("SGD", "step-sgd"),
    ("clipping + SGD", "step-sgd-clip"),
    ("SGD, two lookups", "step-sgd-x2"),
    ("AdamW", "step-adamw"),
    ("forward + backward", "forward-backward"),
)
COLUMNS = (
    ("forward", "forward-no-grad", SUBJECT),
    ("forward + backward", "forward-backward", SUBJECT),
    ("… with `keep_grad_buffer`", "forward-backward", KEPT),
)


def _load(name: str) -> Results:
    return Results.from_json((RESULTS_DIR / f"{name}.json").read_text())


def readme_figures() -> str:
    """The Markdown between the markers."""
    speed = _load("cpu-cpu")
    memory = _load("quick-memory")
    threads = max(speed.settings.threads)
    steps = step_figures(*map(_load, (STEPS, *STEPS_ELSEWHERE)))
    return "\n".join(
        [
            *steps,
            f"Times `nn.Embedding`'s speed on the CPU ({speed.environment['cpu']}, "
            f"{threads} threads, torch {speed.environment['torch']}): geometric mean, and in "
            "brackets the least and the most, over 1 to 262,144 tokens, five distributions of "
            "indices, float32 and bfloat16.",
            "",
            _speed_table(speed, threads),
            "",
            "Growth of peak memory over three training steps, the least of three fresh processes:",
            "",
            _memory_table(memory),
            "",
        ]
    )


def step_figures(results: Results, *elsewhere: Results) -> list[str]:
    """The lines about whole training steps, of the most threads that were measured."""
    threads = max(results.settings.threads)
    tokens = sorted({m.tokens for m in results.measurements})
    distributions = sorted({m.distribution for m in results.measurements})
    few = results.settings.extra_tokens
    return [
        f"A whole training step (`zero_grad()`, forward, backward, `optimizer.step()`) on the CPU "
        f"({results.environment['cpu']}, {threads} threads, torch "
        f"{results.environment['torch']}), times `nn.Embedding`'s speed: as it is / with "
        f"`keep_grad_buffer`, geometric means over {tokens[0]:,} to {tokens[-1]:,} tokens and "
        f"the distributions {', '.join(distributions)}"
        + (f"; AdamW at {few:,} tokens." if few else "."),
        "",
        _step_table(results, elsewhere),
        "",
    ]


def _step_columns(results: Results) -> list[list[list[Measurement]]]:
    threads = max(results.settings.threads)
    return [
        [_select(results, threads, mode, provider) for provider in (SUBJECT, KEPT)]
        for _, mode in STEP_COLUMNS
    ]


def _step_table(results: Results, elsewhere: Sequence[Results]) -> str:
    columns = _step_columns(results)
    rows = []
    for table in _tables(results):
        cells = [[_of_table(group, table) for group in pair] for pair in columns]
        rows.append([_table_name(table), *(_pair(pair, geometric_mean) for pair in cells)])
    for machine in (results, *elsewhere):
        measured = _step_columns(machine)
        where = "" if machine is results else f", {machine.environment['cpu']}"
        rows.append([f"**all**{where}", *(_pair(pair, geometric_mean) for pair in measured)])
        rows.append([f"the slowest case{where}", *(_pair(pair, min) for pair in measured)])
    return markdown_table(["table", *(title for title, _ in STEP_COLUMNS)], rows)


def _pair(
    groups: Sequence[Sequence[Measurement]], one_of: Callable[[Sequence[float]], float | None]
) -> str:
    cells = []
    for group in groups:
        ratios = [m.ratio for m in group if m.ratio is not None]
        value = one_of(ratios) if ratios else None
        cells.append("-" if value is None else _two_digits(value))
    return " / ".join(cells)


def _tables(results: Results) -> list[tuple[int, int]]:
    """Their shapes, the smallest first."""
    tables = {(m.num_embeddings, m.embedding_dim) for m in results.measurements}
    return sorted(tables, key=lambda shape: (shape[0] * shape[1], shape))


def _table_name(table: tuple[int, int]) -> str:
    return f"{table[0]:,} × {table[1]:,}"


def _of_table(measurements: Sequence[Measurement], table: tuple[int, int]) -> list[Measurement]:
    return [m for m in measurements if (m.num_embeddings, m.embedding_dim) == table]


def _speed_table(results: Results, threads: int) -> str:
    columns = [_select(results, threads, mode, provider) for _, mode, provider in COLUMNS]
    rows = [
        [_table_name(table), *(_range(_of_table(column, table)) for column in columns)]
        for table in _tables(results)
    ]
    header = ["table", *(title for title, _, _ in COLUMNS)]
    return markdown_table(header, [*rows, ["**all**", *map(_range, columns)]])


def _select(results: Results, threads: int, mode: str, provider: str) -> list[Measurement]:
    return [
        m
        for m in results.measurements
        if (m.threads, m.mode, m.provider) == (threads, mode, provider)
    ]


def _range(measurements: Sequence[Measurement]) -> str:
    ratios = [m.ratio for m in measurements if m.ratio is not None]
    mean = geometric_mean(ratios)
    if mean is None:
        return "-"
    return f"{_two_digits(mean)} ({_two_digits(min(ratios))} to {_two_digits(max(ratios))})"


def _two_digits(value: float) -> str:
    if value < 1:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 10 else f"{float(f'{value:.2g}'):,.0f}"


def _memory_table(results: Results) -> str:
    names = (BASELINE, SUBJECT, KEPT)
    peaks = {(m.case, m.provider): m.peak_bytes for m in results.memory}
    rows = [
        [case, *(f"{peaks[case, name] / 2**20:,.0f} MiB" for name in names)]
        for case in dict.fromkeys(case for case, _ in peaks)
        if peaks[case, BASELINE] >= SMALLEST_SHOWN
    ]
    return markdown_table(["case", *names], rows)


def with_figures(text: str) -> str:
    """README's text with its figures made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + readme_figures() + END + after


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(with_figures(path.read_text()))


if __name__ == "__main__":
    main()
