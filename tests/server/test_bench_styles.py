"""The styles benchmark, on a model and at sizes that say nothing of speed: it runs, and reports what it promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from cinecat.engines.tiny import build_tiny
from cinecat.server.bench.styles import StylesWork, measure
from tests.engines.conftest import MICRO


@pytest.mark.slow
def test_every_check_is_measured_and_both_sides_predict_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "micro"
    build_tiny(folder, MICRO)
    work = StylesWork(
        model=str(folder),
        width=32,
        height=32,
        frames=5,
        slots=4,
        max_rank=8,
        ranks=(2, 4, 6, 8),
        forwards=1,
        swaps=2,
        requests=4,
        steps=2,
    )
    report = measure(work, pairs=2, warm_up=1)
    assert {
        "load_swap_ratio_vs_diffusers",
        "resident_swap_step_fraction",
        "mixed_over_single_style_ratio",
        "interleaved_throughput_ratio",
        "idle_slot_step_ratio",
    } <= report.checks.keys()
    assert {len(values) for values in report.samples.values()} == {2}
    assert report.results[0]["relative_difference_to_diffusers"] < 1e-5
    assert all(value > 0 for values in report.samples.values() for value in values)
