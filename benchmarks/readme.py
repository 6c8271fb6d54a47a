"""Writes README's figures from the results: ``python -m benchmarks.readme``."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.environment import ROOT
from benchmarks.formats import markdown_table
from benchmarks.providers import BASELINE, KEPT, SUBJECT
from benchmarks.record import RESULTS_DIR, Measurement, Results
from benchmarks.stats import geometric_mean

BEGIN = "<!-- figures: python -m benchmarks.readme -->\n"
END = "<!-- end of figures -->\n"
SMALLEST_SHOWN = 40 * 2**20
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
    return "\n".join(
        [
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


def _speed_table(results: Results, threads: int) -> str:
    tables = dict.fromkeys((m.num_embeddings, m.embedding_dim) for m in results.measurements)
    rows = []
    for table in sorted(tables, key=lambda shape: shape[0] * shape[1]):
        cells = [
            _range(
                [
                    m
                    for m in _select(results, threads, mode, provider)
                    if (m.num_embeddings, m.embedding_dim) == table
                ]
            )
            for _, mode, provider in COLUMNS
        ]
        rows.append([f"{table[0]:,} × {table[1]:,}", *cells])
    cells = [_range(_select(results, threads, mode, provider)) for _, mode, provider in COLUMNS]
    header = ["table", *(title for title, _, _ in COLUMNS)]
    return markdown_table(header, [*rows, ["**all**", *cells]])


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
