"""The rank study's report: what is judged, and what is written."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from cinecat.engines.training.styles.rank_study import RankResult, StyledShot
from cinecat.server.bench.harness import as_text
from cinecat.server.bench.rank import bench_rank, draw, report_of, write_table

CONFIG = {"grade": "noir"}


def shot(effect: float) -> StyledShot:
    scores = {"psnr_db": 20.0, "ssim": 0.8, "temporal_flicker": 0.99, "warped_error": 1.0}
    return StyledShot(effect, follows=True, scores=scores, true_motion_score=12.0)


def result(rank: int, near: float, far: float) -> RankResult:
    seconds = 1.0 if rank else math.nan
    return RankResult(rank, 1000 * rank, 0.5, seconds, (shot(near), shot(near)), (shot(far), shot(far)))


def test_rank_8_is_judged_over_both_domains() -> None:
    good = report_of([result(0, 0.0, 0.0), result(8, 0.9, 0.3)], CONFIG)
    assert good.checks["style_effect_rank_8"].value == pytest.approx(0.6)
    assert good.checks["style_effect_rank_8"].met
    assert not report_of([result(8, 0.7, 0.2)], CONFIG).checks["style_effect_rank_8"].met


def test_the_table_has_a_row_a_rank_and_domain_and_the_plot_is_drawn(tmp_path: Path) -> None:
    report = report_of([result(0, 0.0, 0.0), result(8, 0.9, 0.3)], CONFIG)
    write_table(report, tmp_path / "out" / "rank-table.csv")
    rows = list(csv.DictReader((tmp_path / "out" / "rank-table.csv").open()))
    assert [(row["rank"], row["domain"], row["style_effect"]) for row in rows] == [
        ("0", "in-domain", "0.0"),
        ("0", "cross-domain", "0.0"),
        ("8", "in-domain", "0.9"),
        ("8", "cross-domain", "0.3"),
    ]
    assert (rows[0]["seconds_per_step"], rows[0]["motion_score"], rows[0]["motion_accuracy"]) == ("", "", "1.0")
    draw(report, tmp_path / "out" / "rank.png")
    assert (tmp_path / "out" / "rank.png").read_bytes().startswith(b"\x89PNG")
    assert "style_effect_rank_8" in as_text(report)


@pytest.mark.slow
def test_the_benchmark_runs_on_the_bundled_model(tmp_path: Path) -> None:
    report = bench_rank(quick=True, out=tmp_path)
    assert [row["rank"] for row in report.results] == [0, 0, 1, 1, 8, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-table.csv", "rank.csv", "rank.png"]
    assert "lpips" in report.config["unavailable"]
