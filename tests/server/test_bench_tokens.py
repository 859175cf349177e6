"""The benchmark of tokens judges what was measured, can be lost, and says where."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cinecat.engines.tokens import study
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.rivals import EQUAL_TOKENS as PARTITIONS
from cinecat.engines.tokens.study import Cell, Outcome, Study, StudyWork, make_cells, smaller_sides
from cinecat.engines.training.film import make_clip
from cinecat.server.bench.token_plans import bench_plans
from cinecat.server.bench.tokens import (
    ADAPTER_RATIOS,
    AUTO_CAT,
    EQUAL_TOKENS,
    PLAIN_CAT,
    bench_tokens,
    draw,
    fit_rows,
    report_of,
    write_outcomes,
)
from cinecat.server.commands import bench as bench_command

GRID = Grid(5, 16, 16)
FILM = make_clip(0, 2, 32, 32)
FLAT = Cell("flat", FILM, 0.0, 0.0)
FAST = Cell("fast", FILM, 1.0, 1.0)
NOISE = Cell("noise", FILM, counts=False)
PLANNING = {
    "regions": [0.1, 0.1],
    "patches": [0.1, 0.1],
    "prices": [0.2, 0.4],
    "allocate": [0.1, 0.1],
    "step": [0.4, 0.6],
}
STEPS = {"uniform": [2.0, 2.0], "keep_050": [1.0, 1.2], "keep_025": [0.6, 0.6]}
PSNR = {"cat": 36.0, "fixed": 33.0, "random": 32.0, "similarity": 30.0, "static_clusters": 31.0, "fewer_steps": 35.0}
PSNR |= {"step_cache": 34.0, "smaller": 28.0, "progressive": 29.0}
CHECKS = {
    "step_ratio_keep_050",
    "step_ratio_keep_025",
    "redundant_psnr_loss_db",
    "psnr_gain_vs_fixed_db",
    "psnr_gain_vs_random_db",
    "psnr_gain_vs_similarity_db",
    "psnr_gain_vs_static_clusters_db",
    "psnr_gain_vs_progressive_db",
    "psnr_gain_vs_fewer_steps_db",
    "psnr_gain_vs_step_cache_db",
    "psnr_gain_vs_smaller_db",
    "object_psnr_gain_vs_fixed_db",
    "auto_keep_ratio_still_over_fast",
    "plan_seconds_4k",
}


def outcome(cell: str, method: str, psnr: float, ratio: float = 0.5) -> Outcome:
    scores = {"psnr_uniform": psnr, "psnr_film": psnr - 10.0, "object_psnr_uniform": psnr - 2.0}
    return Outcome(cell, ratio, method, "setting", ratio, 1.0, 3.0, scores)


def outcomes(cell: str, psnr: Mapping[str, float]) -> tuple[Outcome, ...]:
    uniform = outcome(cell, "uniform", 36.5, ratio=1.0)
    auto = replace(outcome(cell, AUTO_CAT, 40.0, ratio=1.0), tokens={"flat": 0.2, "fast": 0.8}.get(cell, 1.0))
    return uniform, auto, *(outcome(cell, method, value) for method, value in psnr.items())


def made(psnr: Mapping[str, float] = PSNR, noise: float = 36.0) -> Study:
    shown = outcomes("flat", psnr) + outcomes("fast", psnr) + outcomes("noise", {**psnr, "cat": noise})
    return Study((FLAT, FAST, NOISE), shown, STEPS, {"flat": 0.1, "fast": 1.0}, GRID, 12)


def test_all_checks_of_the_design_are_there_and_can_be_met() -> None:
    report = report_of(made(), PLANNING, {})
    assert report.checks.keys() == CHECKS
    assert all(check.met for check in report.checks.values())
    assert report.checks["step_ratio_keep_050"].value == pytest.approx(0.55)
    assert report.checks["redundant_psnr_loss_db"].value == pytest.approx(0.5)
    assert report.checks["psnr_gain_vs_fixed_db"].value == pytest.approx(3.0)
    assert report.checks["auto_keep_ratio_still_over_fast"].value == pytest.approx(0.25)


def test_the_adapter_is_judged_where_it_gains_least() -> None:
    plain = {**PSNR, "cat_plain": 33.0}
    least = tuple(
        outcome("flat", method, psnr, ratio=0.375) for method, psnr in {"cat": 35.0, "cat_plain": 33.5}.items()
    )
    report = report_of(replace(made(plain), outcomes=made(plain).outcomes + least), PLANNING, {})
    assert report.checks["adapter_psnr_gain_db"].value == pytest.approx(1.5)
    assert not report.checks["adapter_psnr_gain_db"].met
    assert report_of(made(plain), PLANNING, {}).checks["adapter_psnr_gain_db"].met


def test_the_adapter_is_judged_plain_and_styled() -> None:
    plain = {**PSNR, "cat_plain": 33.0}
    worn = Cell("flat, noir", FILM, 0.0, 0.0, counts=False, style="noir")
    styled = tuple(outcome(worn.name, method, psnr) for method, psnr in {"cat": 35.0, "cat_plain": 34.0}.items())
    found = made(plain)
    report = report_of(replace(found, cells=(*found.cells, worn), outcomes=found.outcomes + styled), PLANNING, {})
    assert report.checks["adapter_psnr_gain_db"].value == pytest.approx(1.0)
    gained = {row["adapter_on"]: row["gain_db"] for row in report.results if "adapter_on" in row}
    assert gained == {"plain": pytest.approx(3.0), "styled": pytest.approx(1.0)}
    assert report.checks["psnr_gain_vs_fixed_db"] == report_of(found, PLANNING, {}).checks["psnr_gain_vs_fixed_db"]


def test_the_constants_of_the_automatic_ratio_are_fitted() -> None:
    cells = tuple(Cell(name, FILM, 0.0, 0.0) for name in "abc")
    motion = {"a": 1.0, "b": 0.1, "c": 0.01}
    clips = tuple(
        outcome(cell, "cat", 30.0 - 10.0 * math.log10(moves) - 20.0 * math.log10(12 / whole), ratio)
        for cell, moves in motion.items()
        for ratio, whole in ((0.75, 8), (0.875, 10))
    )
    (row,) = fit_rows(Study(cells, clips, STEPS, motion, GRID, 12))
    fitted = [row[name] for name in ("psnr_db_at_unit_motion", "per_decade_of_motion", "per_decade_of_gap", "off_db")]
    assert fitted == pytest.approx([30.0, 10.0, 20.0, 0.0], abs=1e-6)


def test_a_rival_that_is_better_is_named_a_loss() -> None:
    report = report_of(made({**PSNR, "fewer_steps": 40.0}), PLANNING, {})
    assert not report.checks["psnr_gain_vs_fewer_steps_db"].met
    row = next(row for row in report.results if row.get("cat_against") == "fewer_steps")
    assert (row["cat"], row["gain_db"], row["cells_won"]) == ("loses", pytest.approx(-4.0), 0)


def test_noise_counts_in_no_mean() -> None:
    assert report_of(made(noise=-50.0), PLANNING, {}).checks == report_of(made(), PLANNING, {}).checks


def test_the_gain_is_the_lower_end_of_its_interval() -> None:
    found = made()
    worse = tuple(
        replace(one, scores={**one.scores, "psnr_uniform": 34.0}) if (one.cell, one.method) == ("fast", "cat") else one
        for one in found.outcomes
    )
    check = report_of(replace(found, outcomes=worse), PLANNING, {}).checks["psnr_gain_vs_fixed_db"]
    assert check.value == pytest.approx(1.0)
    assert check.spread == (pytest.approx(1.0), pytest.approx(3.0))


def test_slow_planning_misses_its_goal() -> None:
    assert not report_of(made(), {**PLANNING, "step": [1.1, 1.3]}, {}).checks["plan_seconds_4k"].met


def test_every_clip_is_a_row_and_the_curves_are_drawn(tmp_path: Path) -> None:
    found = made()
    write_outcomes(found, tmp_path / "out" / "clips.csv")
    rows = list(csv.DictReader((tmp_path / "out" / "clips.csv").open()))
    assert len(rows) == 33
    assert (rows[2]["cell"], rows[2]["method"], rows[2]["psnr_uniform"]) == ("flat", "cat", "36.0")
    draw(found, tmp_path / "out" / "tokens.png")
    assert (tmp_path / "out" / "tokens.png").read_bytes().startswith(b"\x89PNG")


def test_the_rivals_are_those_of_the_engines() -> None:
    assert tuple(PARTITIONS) == EQUAL_TOKENS
    assert (study.PLAIN_CAT, study.AUTO_CAT, study.ADAPTER_RATIOS) == (PLAIN_CAT, AUTO_CAT, ADAPTER_RATIOS)


def test_every_redundancy_and_every_open_kind_has_a_cell() -> None:
    work = StudyWork(side=32, frames=5, textures=(0.0, 1.0), motions=(0.0, 1.0), styles=())
    cells = make_cells(work)
    assert [cell.name for cell in cells if not cell.counts] == ["noise"]
    assert {(cell.texture, cell.motion) for cell in cells} >= {(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)}
    assert {cell.film.scene.kind for cell in cells} >= set(work.open_kinds)
    assert [cell.redundant for cell in cells].count(True) == 1


def test_smaller_sides_are_whole_patches_from_half_up() -> None:
    assert smaller_sides(128) == [64, 80, 96, 112]


def test_planning_alone_projects_what_tokens_save(tmp_path: Path) -> None:
    report = bench_plans(256, 128, 9, quick=True, out=tmp_path)
    assert report.config["tokens"] == 3 * 8 * 16
    half = next(row for row in report.results if row["keep_ratio"] == 0.5)
    assert half["tokens"] == 192
    assert 0.25 < half["projected_time_over_uniform"] < 0.5
    assert report.checks.keys() == {"plan_seconds"}
    assert (tmp_path / "tokens-plan.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tokens", "--plan-only", "--size", "wide"], "--size: 'wide'"),
        (["tokens", "--plan-only", "--size", "100x100"], "--size: 100x100"),
        (["tokens", "--plan-only", "--frames", "16"], "--frames: 16"),
        (["tokens", "--size", "64x64"], "--plan-only"),
        (["rank", "--plan-only"], "belong to the benchmark tokens"),
    ],
)
def test_what_cannot_be_planned_is_told(arguments: list[str], told: str) -> None:
    app = typer.Typer()
    app.command()(bench_command)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert told in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_benchmark_runs_on_the_bundled_model(tmp_path: Path) -> None:
    report = bench_tokens(quick=True, out=tmp_path)
    printed = json.loads(json.dumps(report.as_json()))
    assert printed.keys() == {"bench", "machine", "versions", "config", "samples", "results", "checks"}
    assert printed["bench"] == "tokens"
    assert printed["checks"].keys() >= CHECKS - {"redundant_psnr_loss_db", "auto_keep_ratio_still_over_fast"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens-clips.csv", "tokens.csv", "tokens.png"]
