"""The results of whole models: written as JSON, shown as Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import Environment
from benchmarks.formats import format_ratio, format_seconds, markdown_table, unique
from benchmarks.providers import BASELINE
from benchmarks.record import SCHEMA, Rejection

KIND = "models"
PHASES = ("zero_grad", "forward", "backward", "clip", "optimizer")


@dataclass(frozen=True)
class ModelMeasurement:
    """One variant of a model under one kind of step; times are seconds a step."""

    model: str
    step: str
    threads: int
    variant: str
    median: float
    p10: float
    p90: float
    ratio: float  # the baseline's median over this one: above 1 is faster
    rounds: int
    phases: dict[str, float]  # medians
    loss_difference: float  # the largest from the baseline's loss, relative


@dataclass
class ModelResults:
    name: str
    rounds: int
    budget: float
    seed: int
    environment: Environment
    models: dict[str, str]  # descriptions
    measurements: list[ModelMeasurement] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)  # reasons
    complete: bool = False
    kind: str = KIND
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelResults:
        raw: dict[str, Any] = json.loads(text)
        if (raw.get("schema"), raw.get("kind")) != (SCHEMA, KIND):
            raise ValueError(f"not results of models of schema {SCHEMA}")
        raw["measurements"] = [ModelMeasurement(**entry) for entry in raw["measurements"]]
        raw["rejections"] = [Rejection(**entry) for entry in raw["rejections"]]
        return cls(**raw)

    def write(self, directory: Path) -> list[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.json"
        path.write_text(self.to_json())
        return [path]

    def write_report(self, directory: Path) -> list[Path]:
        path = directory / f"{self.name}.md"
        path.write_text(render(self))
        return [path]


def render(results: ModelResults) -> str:
    """The whole report."""
    environment = results.environment
    lines = [
        f"# Training steps of models: {results.name}",
        "",
        "Medians of interleaved rounds, one step each; in brackets "
        f"{BASELINE}'s median over the variant's, so above 1 is faster. The same model, converted "
        "by `embed_ext.convert`, and with `keep_grad_buffer` on its tables; the losses were "
        "compared before.",
        "",
        f"- {environment['cpu']}, {environment['cores']} cores; torch {environment['torch']}; "
        f"commit {environment['commit']}; {environment['date']}",
        f"- up to {results.rounds} rounds, {results.budget:g} seconds, seed {results.seed}; load "
        f"when it began {environment['load_average']}",
        *(f"- {name}: {description}" for name, description in results.models.items()),
        *(f"- **{name} is missing**: {why}" for name, why in results.unavailable.items()),
        *(f"- **{r.case}, {r.kind}**: {r.reason}" for r in results.rejections),
    ]
    if environment.get("dirty"):
        lines.append("- Measured with changes that are not committed.")
    if not results.complete:
        lines.append("- **The run was stopped: steps are missing.**")
    sections = ["\n".join(lines)]
    if results.measurements:
        sections += ["## A whole step", _whole(results), "## Where the time goes", _phases(results)]
    return "\n\n".join(sections) + "\n"


def _key(measurement: ModelMeasurement) -> str:
    threads = f"{measurement.threads} thread" + ("" if measurement.threads == 1 else "s")
    return f"{measurement.model}, {measurement.step}, {threads}"


def _whole(results: ModelResults) -> str:
    variants = unique(m.variant for m in results.measurements)
    cells = {(_key(m), m.variant): m for m in results.measurements}
    rows = []
    for key in unique(_key(m) for m in results.measurements):
        found = [cells[key, variant] for variant in variants]
        worst = max(m.loss_difference for m in found)
        rows.append([key, *(_cell(m) for m in found), f"{worst:.1g}"])
    return markdown_table(["model, step", *variants, "losses differ by"], rows)


def _cell(measurement: ModelMeasurement) -> str:
    time = format_seconds(measurement.median)
    if measurement.variant == BASELINE:
        return time
    return f"{time} ({format_ratio(measurement.ratio)})"


def _phases(results: ModelResults) -> str:
    rows = [
        [f"{_key(m)}, {m.variant}", *(_milliseconds(m.phases[phase]) for phase in PHASES)]
        for m in results.measurements
    ]
    return markdown_table(["ms, medians", *PHASES], rows)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
