"""The benchmark of engines judges what was measured, can be lost, and says on which backend and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from cinecat.engines.backends import study
from cinecat.engines.backends.choice import BACKENDS
from cinecat.engines.backends.study import BackendFacts, FullContext
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.context import Branch
from cinecat.engines.model import load_transformer
from cinecat.engines.slots import NO_STYLE
from cinecat.engines.tiny import build_tiny
from cinecat.server.bench import engines
from cinecat.server.bench.engines import EnginesWork, Size, draw, measure, report_of
from cinecat.server.bench.harness import Report
from tests.engines.conftest import MICRO

CHECKS = {
    f"{name}{suffix}"
    for name in ("best_step_ratio_vs_diffusers", "worst_step_ratio_vs_diffusers", "clip_ratio_vs_diffusers")
    for suffix in ("", "_without_context_gain")
} | {"clip_max_abs_difference"}

SMALL, MAIN = Size(64, 64, 5, 1), Size(128, 128, 17, 1)
WORK = EnginesWork(sizes=(SMALL, MAIN), main=MAIN)
STAGES = {f"ours_{stage}_s": [0.1] for stage in ("text_encode", "image_encode", "vae_encode", "steps", "decode")}
CLIP = {"diffusers_s": [2.0, 2.0], "ours_s": [1.0, 1.2], "full_context_s": [1.4, 1.4], **STAGES}
# What uniform steps take over diffusers' at the small and at the main size; "even" is nowhere much the better one.
SWIFT, EVEN = (1.2, 0.5), (0.9, 0.6)


def side(backend: str, ratio: float) -> dict[str, Sequence[float]]:
    kinds = {"uniform": ratio, "uniform_full_context": ratio + 0.2, "cat_050": ratio / 2}
    return {f"{backend}_{kind}": [value, 2.0 * value] for kind, value in kinds.items()}


def judged(
    swift: tuple[float, float] = SWIFT,
    even: tuple[float, float] = EVEN,
    clip: Mapping[str, Sequence[float]] = CLIP,
    frames_difference: float = 1e-5,
) -> Report:
    steps = {
        size.name: {"diffusers": [1.0, 2.0], **side("swift", swift[number]), **side("even", even[number])}
        for number, size in enumerate((SMALL, MAIN))
    }
    facts = [BackendFacts("swift", "", 30.0, 2**21), BackendFacts("absent", "absent: no library")]
    differences = {size: {"swift_uniform": 1e-6} for size in steps}
    return report_of(WORK, steps, clip, facts, differences, frames_difference, {})


def told(report: Report, **wanted: str) -> Mapping[str, object]:
    return next(row for row in report.results if wanted.items() <= row.items())


def test_all_checks_of_the_design_are_there_and_can_be_met() -> None:
    report = judged()
    assert report.checks.keys() == CHECKS
    assert all(check.met for check in report.checks.values())
    assert report.checks["clip_ratio_vs_diffusers"].value == pytest.approx(0.55)


def test_the_best_backend_is_that_of_the_main_size_and_the_worst_size_is_judged_on_one_backend() -> None:
    report = judged()
    assert report.checks["best_step_ratio_vs_diffusers"].value == pytest.approx(0.5)
    assert told(report, check="best_step_ratio_vs_diffusers")["backend"] == "swift"
    assert report.checks["worst_step_ratio_vs_diffusers"].value == pytest.approx(0.9)
    worst = told(report, check="worst_step_ratio_vs_diffusers")
    assert (worst["backend"], worst["size"]) == ("even", "64x64x5")


def test_what_the_context_gains_is_reported_and_has_no_goal() -> None:
    report = judged()
    assert report.checks["best_step_ratio_vs_diffusers_without_context_gain"].value == pytest.approx(0.7)
    assert report.checks["clip_ratio_vs_diffusers_without_context_gain"].value == pytest.approx(0.7)
    assert not any(check.goal for name, check in report.checks.items() if name.endswith("_without_context_gain"))


def test_every_goal_can_be_missed() -> None:
    assert not judged(swift=(1.2, 0.71), even=(0.9, 0.8)).checks["best_step_ratio_vs_diffusers"].met
    assert not judged(even=(1.05, 0.6)).checks["worst_step_ratio_vs_diffusers"].met
    assert not judged(clip={**CLIP, "ours_s": [1.6, 1.6]}).checks["clip_ratio_vs_diffusers"].met
    assert not judged(frames_difference=0.01).checks["clip_max_abs_difference"].met


def test_backends_tell_what_building_cost_or_why_they_are_left_out() -> None:
    report = judged()
    assert told(report, backend="absent")["left_out"] == "absent: no library"
    assert any(row.get("build_seconds") == 30.0 and row.get("engine_mib") == 2.0 for row in report.results)


def test_the_ratios_are_drawn(tmp_path: Path) -> None:
    draw(judged().results, tmp_path / "out" / "engines.png")
    assert (tmp_path / "out" / "engines.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_those_of_the_engines() -> None:
    assert (engines.UNIFORM, engines.FULL_CONTEXT, engines.CAT) == (
        study.UNIFORM,
        study.UNIFORM_FULL_CONTEXT,
        study.CAT,
    )
    assert {backend.name for backend in BACKENDS} < set(EnginesWork().backends)


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "micro"
    build_tiny(folder, MICRO)
    return folder


def test_without_the_gain_every_position_is_projected_whenever_keys_are_asked_for(micro: Path) -> None:
    transformer = load_transformer(find_checkpoint(str(micro)), "cpu", "float32")
    text = torch.randn(1, 512, MICRO.text_dim)
    text[:, 3:] = 0.0
    image = torch.randn(1, 5, MICRO.image_dim)
    plain = Branch.project(transformer.condition_embedder, text, image).keys(transformer.blocks, None, NO_STYLE)
    branch = FullContext.project(transformer.condition_embedder, text, image)
    full = branch.keys(transformer.blocks, None, NO_STYLE)
    assert (plain.length, full.length) == (16, 512)
    assert branch.keys(transformer.blocks, None, NO_STYLE) is not full
    torch.testing.assert_close(full.text_keys[:, :, :4], plain.text_keys)


def test_it_runs_and_both_sides_agree(micro: Path) -> None:
    size = Size(32, 32, 5, 1)
    work = EnginesWork(
        model=str(micro), backends=("torch",), sizes=(size,), main=size, steps=2, style_slots=1, max_rank=4
    )
    report = measure(work, pairs=2, clips=2, warm_up=1)
    assert report.checks.keys() == CHECKS
    assert report.checks["clip_max_abs_difference"].met
    assert {len(values) for values in report.samples.values()} == {2}
    assert all(value > 0 for values in report.samples.values() for value in values)
    differences = [row["velocity_difference"] for row in report.results if row.get("velocity_difference") is not None]
    assert len(differences) == 2
    assert max(differences) < 1e-4
