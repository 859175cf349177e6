"""What all benchmarks share: interleaved pairs, medians with their spread, checks, and one way to report them."""

from __future__ import annotations

import csv
import operator
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cinecat.engines.quality.intervals import wilson_interval


@dataclass(frozen=True)
class Check:
    """A measured value against its goal.

    Attributes:
        goal: "<= 1.05", "< 35", "> 0" or ">= 0.5", or "" for a value that is only reported.
        spread: lower and upper quartile over the samples; of a share, its 95% interval.
    """

    value: float
    goal: str
    met: bool
    spread: tuple[float, float]


@dataclass(frozen=True)
class Report:
    """The result of one benchmark; `as_json` is the form that the design fixes."""

    bench: str
    config: Mapping[str, Any]
    samples: Mapping[str, Sequence[float]]
    results: Sequence[Mapping[str, Any]]
    checks: Mapping[str, Check]
    machine: Mapping[str, Any] = field(default_factory=lambda: _machine())
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def write_csv(self, folder: Path) -> Path:
        """One row a sample: name, index, value. Returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.bench}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sample", "index", "value"])
            for name, values in self.samples.items():
                writer.writerows([name, index, value] for index, value in enumerate(values))
        return path


def interleave(sides: Mapping[str, Callable[[int], float]], pairs: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Measures every side once per round, in alternating order, so that drift of the machine meets them alike.

    Args:
        sides: each measures once and returns its value; the argument numbers the round, counting from -warm_up.
        pairs: rounds that count.
        warm_up: rounds before them that do not.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warm_up, pairs):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in names:
            value = sides[name](number)
            if number >= 0:
                samples[name].append(value)
    return samples


def ratio_check(ours: Sequence[float], theirs: Sequence[float], at_most: float | None = None) -> Check:
    """The median over the pairs of ours / theirs."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    value = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (value, value, value)
    goal = "" if at_most is None else f"<= {at_most:g}"
    return Check(value, goal, _meets(value, goal), (low, high))


def mean_check(values: Sequence[float], goal: str = "") -> Check:
    """The mean of some samples against a goal such as ">= 33"."""
    value = statistics.fmean(values)
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (value, value, value)
    return Check(value, goal, _meets(value, goal), (low, high))


def share_check(outcomes: Sequence[bool], goal: str = "") -> Check:
    """The share of what went right, with Wilson's 95% interval."""
    share = statistics.fmean(outcomes)
    return Check(share, goal, _meets(share, goal), wilson_interval(sum(outcomes), len(outcomes)))


def _meets(value: float, goal: str) -> bool:
    if not goal:
        return True
    relation, _, bound = goal.partition(" ")
    compare: Callable[[float, float], bool] = {
        "<=": operator.le,
        ">=": operator.ge,
        "<": operator.lt,
        ">": operator.gt,
    }[relation]
    return compare(value, float(bound))


def as_text(report: Report) -> str:
    """A table of the results and a verdict, for people."""
    lines = [f"cinecat bench {report.bench} on {report.machine['processor']}, {report.machine['cores']} cores", ""]
    for name, values in report.samples.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        lines.append(f"  {name:<28} median {median:8.3f}   quartiles {low:.3f} to {high:.3f}   n = {len(values)}")
    if report.results:
        lines += ["", *(f"  {_row(row)}" for row in report.results)]
    lines.append("")
    for name, check in report.checks.items():
        verdict = ("met" if check.met else "NOT MET") if check.goal else "reported"
        spread = f"{check.spread[0]:.3f} to {check.spread[1]:.3f}"
        lines.append(f"  {name:<28} {check.value:8.3f} {check.goal:<8} {verdict}   spread {spread}")
    return "\n".join(lines)


def _row(row: Mapping[str, Any]) -> str:
    known = {name: value for name, value in row.items() if value is not None}
    return "   ".join(
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in known.items()
    )


def _machine() -> dict[str, Any]:
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    packages = ("cinecat", "torch", "diffusers", "transformers", "peft", "grpcio", "protobuf", "av")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
