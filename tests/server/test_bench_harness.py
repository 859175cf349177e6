"""Benchmarks pair their sides fairly, report medians with quartiles, and can be lost."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cinecat.server import bench
from cinecat.server.bench.harness import (
    Check,
    Report,
    as_text,
    interleave,
    mean_check,
    ratio_check,
    share_check,
)
from cinecat.server.commands import bench as bench_command


def report(check: Check) -> Report:
    return Report(
        bench="toy",
        config={"pairs": 3},
        samples={"ours_s": [1.0, 2.0, 3.0], "theirs_s": [2.0, 2.0, 2.0]},
        results=[],
        checks={"ratio": check},
    )


def test_the_ratio_is_the_median_over_the_pairs_not_of_the_sides() -> None:
    check = ratio_check([1.0, 10.0, 3.0], [1.0, 5.0, 1.0])
    assert check.value == 2.0


def test_the_spread_is_the_quartiles_of_the_ratios() -> None:
    check = ratio_check([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.0] * 7)
    assert check.spread == (2.0, 6.0)


def test_a_single_pair_has_no_spread() -> None:
    assert ratio_check([3.0], [2.0]).spread == (1.5, 1.5)


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.05, True), (1.06, False), (math.nan, False)])
def test_a_goal_can_be_missed(ours: float, met: bool) -> None:
    check = ratio_check([ours] * 3, [1.0] * 3, at_most=1.05)
    assert (check.met, check.goal) == (met, "<= 1.05")


def test_a_value_without_a_goal_is_only_reported() -> None:
    check = ratio_check([9.0], [1.0])
    assert (check.met, check.goal) == (True, "")


@pytest.mark.parametrize(
    ("goal", "met"), [(">= 2", True), (">= 2.1", False), ("< 2", False), ("<= 2", True), ("", True)]
)
def test_a_mean_meets_its_goal_or_not(goal: str, met: bool) -> None:
    check = mean_check([1.0, 2.0, 3.0], goal)
    assert (check.value, check.met) == (2.0, met)


def test_a_share_has_wilson_s_interval() -> None:
    check = share_check([True] * 95 + [False] * 5, ">= 0.95")
    assert check.met
    assert check.spread == pytest.approx((0.8882, 0.9785), abs=1e-3)


def test_a_share_that_misses_its_goal_says_so() -> None:
    assert not share_check([True] * 9 + [False], ">= 0.95").met


def test_people_read_the_results_row_by_row() -> None:
    text = as_text(replace(report(ratio_check([1.0], [2.0])), results=[{"kind": "pan", "psnr": 31.256, "right": None}]))
    assert "kind pan   psnr 31.26" in text
    assert "right" not in text


def test_sides_of_different_length_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio_check([1.0, 2.0], [1.0])


def test_sides_alternate_and_the_warm_up_does_not_count() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str, offset: float) -> Callable[[int], float]:
        def measure(number: int) -> float:
            calls.append((name, number))
            return number + offset

        return measure

    samples = interleave({"a": side("a", 0.5), "b": side("b", 0.25)}, pairs=3, warm_up=2)
    assert samples == {"a": [0.5, 1.5, 2.5], "b": [0.25, 1.25, 2.25]}
    order = [name for name, _ in calls]
    assert [number for _, number in calls] == [-2, -2, -1, -1, 0, 0, 1, 1, 2, 2]
    assert "".join(order[::2]) in ("ababa", "babab")


def test_the_report_has_the_form_that_the_design_fixes() -> None:
    printed = json.loads(json.dumps(report(ratio_check([1.0], [2.0], at_most=1.0)).as_json()))
    assert printed.keys() == {"bench", "machine", "versions", "config", "samples", "results", "checks"}
    assert printed["checks"] == {"ratio": {"value": 0.5, "goal": "<= 1", "met": True, "spread": [0.5, 0.5]}}
    assert printed["machine"]["cores"] >= 1
    assert {"python", "torch", "cinecat"} <= printed["versions"].keys()


def test_every_sample_is_a_row_of_the_csv(tmp_path: Path) -> None:
    path = report(ratio_check([1.0], [2.0])).write_csv(tmp_path / "new")
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["sample", "index", "value"]
    assert rows[1:4] == [["ours_s", "0", "1.0"], ["ours_s", "1", "2.0"], ["ours_s", "2", "3.0"]]
    assert len(rows) == 7


@pytest.mark.parametrize(("ours", "verdict"), [(2.0, "NOT MET"), (0.5, " met ")])
def test_people_read_the_verdict(ours: float, verdict: str) -> None:
    assert verdict in as_text(report(ratio_check([ours], [1.0], at_most=1.0)))


@pytest.mark.parametrize(("ours", "code"), [(2.0, 1), (0.5, 0)])
def test_the_command_fails_when_the_benchmark_is_lost(monkeypatch: pytest.MonkeyPatch, ours: float, code: int) -> None:
    made = report(ratio_check([ours], [1.0], at_most=1.0))
    monkeypatch.setattr(bench, "BENCHES", {"toy": lambda quick, out: made})
    app = typer.Typer()
    app.command()(bench_command)
    result = CliRunner().invoke(app, ["toy", "--json"])
    assert result.exit_code == code
    assert json.loads(result.stdout)["checks"]["ratio"]["met"] is (code == 0)


def test_an_unknown_benchmark_names_those_there_are() -> None:
    app = typer.Typer()
    app.command()(bench_command)
    result = CliRunner().invoke(app, ["nothing"])
    assert result.exit_code == 2
    assert "serve" in result.stderr
