"""The results of a run, as data: written as JSON and CSV, read back for reports."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from benchmarks.environment import Environment

SCHEMA = 1
RESULTS_DIR = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Settings:
    """How a run was asked for."""

    suite: str
    modes: list[str]
    threads: list[int]
    device: str = "cpu"
    rounds: int = 20
    min_time: float = 0.005
    budget: float = 10.0
    batches: int = 4
    seed: int = 0
    cold: bool = False
    memory: bool = False
    bandwidth_mib: int = 256
    time_limit: float | None = None
    extra_modes: list[str] = field(default_factory=list)  # of the cases with so many tokens:
    extra_tokens: int = 0

    def modes_of(self, tokens: int) -> list[str]:
        """The modes in which a case of so many tokens is measured."""
        return [*self.modes, *(self.extra_modes if tokens == self.extra_tokens else [])]


@dataclass(frozen=True)
class ProviderRecord:
    name: str
    description: str
    gradient: str
    package: str
    version: str | None
    unavailable: str | None


@dataclass(frozen=True)
class Measurement:
    """One provider in one mode of one case; times are seconds a call."""

    case: str
    num_embeddings: int
    embedding_dim: int
    tokens: int
    distribution: str
    dtype: str
    index_dtype: str
    threads: int
    mode: str
    provider: str
    median: float
    p10: float
    p90: float
    rounds: int
    inner: int
    ratio: float | None  # the baseline's median over this one: above 1 is faster
    ratio_p10: float | None  # quantiles of the ratio within each round
    ratio_p90: float | None
    minimum_bytes: int
    gb_per_second: float
    copy_share: float | None  # of the measured copy bandwidth; above 1 means caches helped
    page_faults: float | None
    error_roundings: float  # the gradient's largest error against float64
    launches: float | None = None  # kernels, copies and fills that the GPU runs a call


@dataclass(frozen=True)
class Memory:
    """Growth of peak memory in a fresh process."""

    case: str
    mode: str
    provider: str
    peak_bytes: int


@dataclass(frozen=True)
class Rejection:
    """A provider that was not timed on a case, and why.

    ``wrong``: its results differ from the reference; ``failed``: it raised an error;
    ``skipped``: the case is not for it, or not for this machine.
    """

    case: str
    provider: str
    kind: Literal["wrong", "failed", "skipped"]
    reason: str


@dataclass
class Results:
    name: str
    settings: Settings
    environment: Environment
    providers: list[ProviderRecord]
    bandwidth: dict[str, dict[str, float]] = field(default_factory=dict)  # by threads, by name
    measurements: list[Measurement] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    complete: bool = False
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        raw: dict[str, Any] = json.loads(text)
        if raw.get("schema") != SCHEMA:
            raise ValueError(f"results have schema {raw.get('schema')}, this reads {SCHEMA}")
        raw["settings"] = Settings(**raw["settings"])
        raw["providers"] = [ProviderRecord(**entry) for entry in raw["providers"]]
        raw["measurements"] = [Measurement(**entry) for entry in raw["measurements"]]
        raw["memory"] = [Memory(**entry) for entry in raw["memory"]]
        raw["rejections"] = [Rejection(**entry) for entry in raw["rejections"]]
        return cls(**raw)

    def write(self, directory: Path) -> list[Path]:
        """Write NAME.json and NAME.csv; returns their paths."""
        directory.mkdir(parents=True, exist_ok=True)
        json_path, csv_path = directory / f"{self.name}.json", directory / f"{self.name}.csv"
        json_path.write_text(self.to_json())
        with csv_path.open("w", newline="") as stream:
            columns = [column.name for column in fields(Measurement)]
            writer = csv.DictWriter(stream, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(measurement) for measurement in self.measurements)
        return [json_path, csv_path]


def significant(value: float, digits: int = 4) -> float:
    """Rounded to what a timing can mean, which keeps committed results small."""
    return float(f"{value:.{digits}g}")
