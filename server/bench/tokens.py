"""`cinecat bench tokens`: content-adaptive tokens against uniform ones, and against what else saves as much.

Quality is that of the decoded clips: against the uniform result of the same seed, and against the film.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cinecat.engines.quality.intervals import bootstrap_mean
from cinecat.server.bench.harness import Check, Report, mean_check, ratio_check
from cinecat.server.bench.token_plans import UHD, plan_check, plan_seconds

if TYPE_CHECKING:
    from cinecat.engines.tokens.study import Cell, Outcome, Study

EQUAL_TOKENS = ("fixed", "random", "similarity", "static_clusters")
"""Rivals that spend as many tokens, as the engines name them."""

PLAIN_CAT, AUTO_CAT = "cat_plain", "cat_auto"
"""CAT without its adapter, and with a PSNR to hold, as the engines name them."""

_ADAPTER_GOAL = ">= 2"
ADAPTER_RATIOS = (0.375, 0.5)
_STEP_GOALS = {"step_ratio_keep_050": 0.6, "step_ratio_keep_025": 0.4}
_LOSS_GOAL, _GAIN_GOAL, _AUTO_GOAL = "< 1", "> 0", "<= 0.4"
_LOSS_RATIO = 0.5


def bench_tokens(quick: bool, out: Path | None, lpips_weights: Path | None = None) -> Report:
    """Runs the benchmark; with `out`, writes its samples and tables there as CSV, and a plot.

    Args:
        lpips_weights: adds LPIPS, from one file with AlexNet and the linear heads.

    Raises:
        WeightsError: the weights cannot be used.
    """
    import torch

    from cinecat.engines.tokens.study import StudyWork, study
    from cinecat.engines.training.progress import training_bar

    work = StudyWork()
    if quick:
        work = StudyWork(
            side=128,
            steps=8,
            keep_ratios=(0.5,),
            textures=(0.0, 1.0),
            motions=(0.0, 1.0),
            open_kinds=("roam",),
            noise=False,
            styles=(),
            pairs=7,
            minutes=1.3,
        )
    planning = plan_seconds(UHD, 3 if quick else 15)
    with training_bar("clips", 0, work.clips) as move:
        found = study(work, lpips_weights, lambda done: move(done, ""))
    config = {
        **asdict(work),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "cells_left_out": list(found.left_out),
        "lpips": str(lpips_weights) if lpips_weights else "needs --lpips-weights",
    }
    report = report_of(found, planning, config)
    if out is not None:
        report.write_csv(out)
        write_outcomes(found, out / "tokens-clips.csv")
        draw(found, out / "tokens.png")
    return report


def report_of(found: Study, planning: Mapping[str, Sequence[float]], config: dict[str, Any]) -> Report:
    """What was measured, judged.

    Args:
        planning: seconds of planning a step at UHD, by part, as `plan_seconds` gives them.
    """
    samples: dict[str, Sequence[float]] = {f"{name}_s": values for name, values in found.step_seconds.items()}
    samples |= {f"plan_4k_{name}_s": values for name, values in planning.items()}
    for rival in rivals_of(found):
        values = list(gains(found, rival, "psnr_uniform").values())
        if values:
            samples[f"psnr_gain_vs_{rival}_db"] = values
    return Report(
        bench="tokens",
        config=config,
        samples=samples,
        results=[*summary(found), *gain_rows(found), *adapter_rows(found), *fit_rows(found)],
        checks=checks_of(found, planning),
    )


def checks_of(found: Study, planning: Mapping[str, Sequence[float]]) -> dict[str, Check]:
    """The checks that the design names, and the gains over the rivals that it does not."""
    steps = found.step_seconds
    checks = {
        name: ratio_check(steps[name.removeprefix("step_ratio_")], steps["uniform"], goal)
        for name, goal in _STEP_GOALS.items()
    }
    losses = _losses(found)
    if losses:
        checks["redundant_psnr_loss_db"] = mean_check(losses, _LOSS_GOAL)
    for rival in rivals_of(found):
        checks |= _gain_check(f"psnr_gain_vs_{rival}_db", gains(found, rival, "psnr_uniform").values())
    inside = gains(found, "fixed", "object_psnr_uniform").values()
    checks |= _gain_check("object_psnr_gain_vs_fixed_db", inside)
    adapter = adapter_gains(found)
    if adapter:
        checks["adapter_psnr_gain_db"] = mean_check(min(adapter.values(), key=statistics.fmean), _ADAPTER_GOAL)
    auto = _auto_ratio(found)
    if auto is not None:
        checks["auto_keep_ratio_still_over_fast"] = auto
    return checks | {"plan_seconds_4k": plan_check(planning["step"])}


def adapter_gains(found: Study) -> dict[tuple[str, float], list[float]]:
    """What the adapter adds to CAT's PSNR to the uniform result, film by film, plain and styled, by keep ratio."""
    table = _scores(found, "psnr_uniform")
    groups = {
        "plain": [cell.name for cell in found.cells if cell.counts],
        "styled": [cell.name for cell in found.cells if cell.style],
    }
    gained = {
        (group, ratio): [
            table[cell, ratio, "cat"] - table[cell, ratio, PLAIN_CAT]
            for cell in cells
            if (cell, ratio, PLAIN_CAT) in table
        ]
        for group, cells in groups.items()
        for ratio in ADAPTER_RATIOS
    }
    return {group: values for group, values in gained.items() if values}


def rivals_of(found: Study) -> list[str]:
    """The rivals that were run."""
    ran = dict.fromkeys(outcome.method for outcome in found.outcomes)
    return [name for name in ran if name not in ("uniform", "cat", PLAIN_CAT, AUTO_CAT)]


def gains(found: Study, rival: str, metric: str) -> dict[str, float]:
    """CAT's score less the rival's, by cell, the mean over keep ratios; cells that do not count are left out."""
    counted = {cell.name for cell in found.cells if cell.counts}
    table = _scores(found, metric)
    by_cell: dict[str, list[float]] = {}
    for ratio in sorted({outcome.keep_ratio for outcome in found.outcomes}):
        for cell in counted:
            ours, theirs = table.get((cell, ratio, "cat")), table.get((cell, ratio, rival))
            if ours is not None and theirs is not None:
                by_cell.setdefault(cell, []).append(ours - theirs)
    return {cell: statistics.fmean(by_cell[cell]) for cell in sorted(by_cell)}


def _scores(found: Study, metric: str) -> dict[tuple[str, float, str], float]:
    return {
        (outcome.cell, outcome.keep_ratio, outcome.method): outcome.scores[metric]
        for outcome in found.outcomes
        if metric in outcome.scores
    }


def _gain_check(name: str, values: Iterable[float]) -> dict[str, Check]:
    """The lower end of the 95% interval of the mean gain over cells, with the interval as its spread."""
    listed = list(values)
    if not listed:
        return {}
    mean = bootstrap_mean(listed)
    low, high = (mean.value if end is None else end for end in (mean.low, mean.high))
    known = mean.low is not None  # a single cell tells nothing of the others
    return {name: Check(low, _GAIN_GOAL, known and low > 0.0, (low, high))}


def _losses(found: Study) -> list[float]:
    """Decibels that CAT is farther from the film than the uniform result is, in cells of high redundancy."""
    table = _scores(found, "psnr_film")
    return [
        table[cell.name, 1.0, "uniform"] - table[cell.name, _LOSS_RATIO, "cat"]
        for cell in found.cells
        if cell.redundant and cell.counts and (cell.name, _LOSS_RATIO, "cat") in table
    ]


def _auto_ratio(found: Study) -> Check | None:
    """Tokens that hold one PSNR, of the flat still film over those of the fast textured one."""
    known = [cell for cell in found.cells if cell.texture is not None and cell.motion is not None and not cell.style]
    tokens = {outcome.cell: outcome.tokens for outcome in found.outcomes if outcome.method == AUTO_CAT}

    def extent(cell: Cell) -> float:
        return (cell.texture or 0.0) + (cell.motion or 0.0)

    if len(known) < 2:
        return None
    still, fast = min(known, key=extent), max(known, key=extent)
    return mean_check([tokens[still.name] / tokens[fast.name]], _AUTO_GOAL)


def summary(found: Study) -> list[dict[str, Any]]:
    """A row a keep ratio and method: means over cells that count."""
    counted = {cell.name for cell in found.cells if cell.counts}
    groups: dict[tuple[float, str], list[Outcome]] = {}
    for outcome in found.outcomes:
        if outcome.cell in counted:
            groups.setdefault((outcome.keep_ratio, outcome.method), []).append(outcome)
    uniform = {outcome.cell: outcome.seconds for outcome in found.outcomes if outcome.method == "uniform"}
    rows = []
    for (ratio, method), some in sorted(groups.items(), key=lambda item: -item[0][0]):
        names = sorted({name for outcome in some for name in outcome.scores} - {"film_flicker"})
        rows.append(
            {
                "keep_ratio": ratio,
                "method": method,
                "setting": some[0].setting,
                "clips": len(some),
                "tokens": statistics.fmean(outcome.tokens for outcome in some),
                "time_over_uniform": statistics.median(outcome.seconds / uniform[outcome.cell] for outcome in some),
                "clips_per_minute": 60.0 / statistics.fmean(outcome.clip_seconds for outcome in some),
                **{name: _mean(outcome.scores.get(name) for outcome in some) for name in names},
            }
        )
    return rows


def gain_rows(found: Study) -> list[dict[str, Any]]:
    """CAT's mean gain over each rival in PSNR to the uniform result, with its interval; below 0 where CAT loses."""
    rows = []
    for rival in rivals_of(found):
        listed = list(gains(found, rival, "psnr_uniform").values())
        if listed:
            mean = bootstrap_mean(listed)
            verdict = "wins" if (mean.low or 0.0) > 0.0 else "loses" if (mean.high or 0.0) < 0.0 else "undecided"
            rows.append(
                {
                    "cat_against": rival,
                    "gain_db": mean.value,
                    "low": mean.low,
                    "high": mean.high,
                    "cells": len(listed),
                    "cells_won": sum(value > 0.0 for value in listed),
                    "cat": verdict,
                }
            )
    return rows


def adapter_rows(found: Study) -> list[dict[str, Any]]:
    """What the adapter gains, with its interval."""
    rows = []
    for (group, ratio), values in adapter_gains(found).items():
        mean = bootstrap_mean(values)
        found_at = {"adapter_on": group, "keep_ratio": ratio, "gain_db": mean.value, "low": mean.low, "high": mean.high}
        rows.append({**found_at, "cells": len(values)})
    return rows


def fit_rows(found: Study) -> list[dict[str, Any]]:
    """From motion and the gap between whole steps to PSNR: the plane whose constants `engines.tokens.budget` has."""
    import numpy as np

    from cinecat.engines.tokens.schedule import step_rungs

    counted = {cell.name for cell in found.cells if cell.counts and found.motion.get(cell.name, 0.0) > 0.0}
    clips = [outcome for outcome in found.outcomes if outcome.method == "cat" and outcome.cell in counted]
    if len({outcome.keep_ratio for outcome in clips}) < 2 or len(counted) < 2:
        return []
    ones = np.ones(len(clips))
    motion = np.log10([found.motion[outcome.cell] for outcome in clips])
    rungs = [step_rungs(found.grid, found.steps, outcome.keep_ratio) for outcome in clips]
    gap = np.log10([len(each) / each.count(1.0) for each in rungs])
    decibels = np.array([outcome.scores["psnr_uniform"] for outcome in clips])
    axes = np.stack([ones, motion, gap], axis=1)
    (at_unit, of_motion, of_gap), *_ = np.linalg.lstsq(axes, decibels, rcond=None)
    off = decibels - axes @ np.array([at_unit, of_motion, of_gap])
    row = {"psnr_db_at_unit_motion": at_unit, "per_decade_of_motion": -of_motion, "per_decade_of_gap": -of_gap}
    return [{**{name: float(value) for name, value in row.items()}, "off_db": float(off.std()), "clips": len(clips)}]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def write_outcomes(found: Study, path: Path) -> None:
    """One row a clip. Raises OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for outcome in found.outcomes for name in outcome.scores))
    fields = ["cell", "keep_ratio", "method", "setting", "tokens", "seconds", "clip_seconds"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, *names])
        for outcome in found.outcomes:
            scores = [outcome.scores.get(name, "") for name in names]
            writer.writerow([*(getattr(outcome, name) for name in fields), *scores])


def draw(found: Study, path: Path) -> None:
    """Quality over time of every method, and CAT's quality in every cell, as PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in summary(found) if row["method"] != "uniform"]
    figure = Figure(figsize=(16, 4.6), layout="constrained")
    panels = (("psnr_uniform", "PSNR to the uniform result, dB"), ("psnr_film", "PSNR to the film, dB"))
    over_time, to_film, cells = figure.subplots(1, 3)
    for axes, (metric, title) in zip((over_time, to_film), panels, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            some = sorted((row for row in rows if row["method"] == method), key=lambda row: row["time_over_uniform"])
            style = "-" if method not in EQUAL_TOKENS else ":"
            width = 2.6 if method == "cat" else 1.2
            points = [(row["time_over_uniform"], row[metric]) for row in some]
            axes.plot(*zip(*points, strict=True), style, marker="o", linewidth=width, label=method)
        axes.set_xlabel("time of denoising over the uniform path's")
        axes.set_title(title)
    over_time.legend(fontsize="small")
    table = _scores(found, "psnr_uniform")
    names = [cell.name for cell in found.cells]
    for ratio in sorted({outcome.keep_ratio for outcome in found.outcomes} - {1.0}):
        values = [table.get((name, ratio, "cat"), float("nan")) for name in names]
        cells.plot(range(len(names)), values, marker="o", label=f"keep ratio {ratio:g}")
    cells.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="small")
    cells.set_title("CAT by cell, PSNR to the uniform result, dB")
    cells.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
