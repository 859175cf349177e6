"""The report on layouts of ranks: the worst difference and the worst count are judged."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cinecat.engines.backends.parity import Case
from cinecat.engines.sharding.layout import Layout
from cinecat.engines.sharding.study import CaseResult, Exchanged, LayoutResult
from cinecat.engines.tokens.grid import Grid
from cinecat.server.bench.harness import Report, as_text
from cinecat.server.bench.sharding import bench_sharding, report_of

CASE = Case(Grid(1, 2, 2), 1.0, (9,), (0,))


def report(*results: tuple[float, dict[str, int]]) -> Report:
    """Of one case a layout, with a difference and the bytes that one rank sent; 100 of each kind are right."""
    found = []
    for difference, measured in results:
        sent = Exchanged(0, measured, {"all_to_all": 100, "scatter": 100})
        cases = (CaseResult(CASE, difference, (sent,)),)
        found.append(LayoutResult(Layout(ulysses=2), cases, CASE, (1.0, 2.0), (0.6, 1.0), (0.3, 0.5)))
    return report_of(found, {})


RIGHT = {"all_to_all": 100, "scatter": 100}


def test_equal_results_and_bytes_meet_both_goals() -> None:
    found = report((1e-6, RIGHT), (3e-6, RIGHT))
    assert {name: check.met for name, check in found.checks.items()} == {
        "max_abs_difference": True,
        "bytes_measured_over_formula": True,
    }
    assert found.checks["max_abs_difference"].value == 3e-6
    assert found.results[0]["forward_over_one_process"] == pytest.approx(0.55)
    assert found.results[0]["exchanging_share"] == pytest.approx(0.5)
    assert "max_abs_difference" in as_text(found)


@pytest.mark.parametrize("measured", [{**RIGHT, "scatter": 101}, {**RIGHT, "scatter": 99}, {"all_to_all": 100}])
def test_one_count_that_is_off_fails_whichever_way(measured: dict[str, int]) -> None:
    check = report((0.0, RIGHT), (0.0, measured)).checks["bytes_measured_over_formula"]
    assert not check.met
    assert check.value > 1.0


def test_a_kind_that_the_formula_does_not_know_fails() -> None:
    assert report((0.0, {**RIGHT, "swap": 1})).checks["bytes_measured_over_formula"].value == math.inf


@pytest.mark.parametrize("difference", [0.1, math.nan])
def test_one_result_that_is_off_fails(difference: float) -> None:
    assert not report((0.0, RIGHT), (difference, RIGHT), (0.0, RIGHT)).checks["max_abs_difference"].met


@pytest.mark.slow
def test_the_benchmark_runs_on_the_bundled_model(tmp_path: Path) -> None:
    found = bench_sharding(quick=True, out=tmp_path)
    assert [row["shard"] for row in found.results] == ["ulysses=2", "ring=2,cfg=2"]
    assert all(check.met for check in found.checks.values())
    assert [path.name for path in tmp_path.iterdir()] == ["sharding.csv"]
