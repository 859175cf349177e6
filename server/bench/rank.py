"""`cinecat bench rank`: which LoRA rank a style needs.

One look is trained at several ranks, with the same films, steps and seeds, and worn on held-out shots: in-domain ones,
and cross-domain ones of shapes, colours and walls that no training film shows.
"""

from __future__ import annotations

import csv
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cinecat.server.bench.harness import Check, Report, mean_check

if TYPE_CHECKING:
    from cinecat.engines.training.styles.rank_study import RankResult, StyledShot

_MODEL = "wan-tiny"
_JUDGED, _GOAL = 8, ">= 0.5"


def bench_rank(quick: bool, out: Path | None) -> Report:
    """Runs the benchmark; with `out`, writes its samples and table there as CSV, and a plot."""
    from cinecat.engines.checkpoint import find_checkpoint
    from cinecat.engines.quality.comparison import Meter
    from cinecat.engines.training.styles.rank_study import RankWork, study_ranks

    work = RankWork(ranks=(1, 8), films=4, held_out=1, shots=1, steps=12, sampling_steps=4) if quick else RankWork()
    with tempfile.TemporaryDirectory(prefix="cinecat-bench-") as scratch:
        results = study_ranks(find_checkpoint(_MODEL), work, Path(scratch))
    report = report_of(results, {"model": _MODEL, **asdict(work), "unavailable": dict(Meter().unavailable)})
    if out is not None:
        report.write_csv(out)
        write_table(report, out / "rank-table.csv")
        draw(report, out / "rank.png")
    return report


def report_of(results: Sequence[RankResult], config: dict[str, Any]) -> Report:
    """What was measured, with the style effect at rank 8 judged over the shots of both domains."""
    effects = {f"style_effect_rank_{result.rank}": [shot.effect for shot in result.shots] for result in results}
    checks: dict[str, Check] = {}
    if f"style_effect_rank_{_JUDGED}" in effects:
        checks[f"style_effect_rank_{_JUDGED}"] = mean_check(effects[f"style_effect_rank_{_JUDGED}"], _GOAL)
    return Report(
        bench="rank",
        config=config,
        samples={
            **effects,
            **{f"psnr_db_rank_{result.rank}": [shot.scores["psnr_db"] for shot in result.shots] for result in results},
        },
        results=[row for result in results for row in _rows(result)],
        checks=checks,
    )


def write_table(report: Report, path: Path) -> None:
    """One row a rank and domain. Raises OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(report.results[0]))
        writer.writeheader()
        writer.writerows(report.results)


def draw(report: Report, path: Path) -> None:
    """What each rank gives and costs, as PNG."""
    from matplotlib.figure import Figure

    panels = ("style_effect", "psnr_db", "motion_accuracy", "validation_loss")
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    figure.suptitle(f"{report.config.get('grade', '')}: rank of the LoRA (0: no style)")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for domain in ("in-domain", "cross-domain"):
            rows = [row for row in report.results if row["domain"] == domain and row[name] is not None]
            axes.plot(range(len(rows)), [row[name] for row in rows], marker="o", label=domain)
            axes.set_xticks(range(len(rows)), [str(row["rank"]) for row in rows])
        axes.set_xlabel("rank")
        axes.set_title(name.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _rows(result: RankResult) -> list[dict[str, Any]]:
    shared = {
        "parameters": result.parameters,
        "validation_loss": round(result.validation_loss, 5),
        "seconds_per_step": None if math.isnan(result.seconds_per_step) else round(result.seconds_per_step, 3),
    }
    domains = (("in-domain", result.in_domain), ("cross-domain", result.cross_domain))
    return [{"rank": result.rank, "domain": name, **_means(shots), **shared} for name, shots in domains]


def _means(shots: Sequence[StyledShot]) -> dict[str, Any]:
    figures: dict[str, Callable[[StyledShot], float | None]] = {
        "style_effect": lambda shot: shot.effect,
        "motion_accuracy": lambda shot: float(shot.follows),
        **{name: _score(name) for name in ("psnr_db", "ssim", "temporal_flicker", "warped_error", "motion_score")},
        "true_motion_score": lambda shot: shot.true_motion_score,
    }
    means: dict[str, Any] = {"shots": len(shots)}
    for name, figure in figures.items():
        values = [value for shot in shots if (value := figure(shot)) is not None and not math.isnan(value)]
        means[name] = round(statistics.fmean(values), 4) if values else None
    return means


def _score(name: str) -> Callable[[StyledShot], float | None]:
    return lambda shot: shot.scores.get(name)
