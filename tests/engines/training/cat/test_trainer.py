"""The distillation: merged tokens come nearer to all tokens, and a stopped run goes on as if it had not been."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cinecat.engines.training.cat.traces import Trace
from cinecat.engines.training.cat.trainer import TrainedCat, draw_sample, train_cat
from cinecat.engines.training.progress import Journal
from tests.engines.training.cat.samples import RECIPE, on_disk, spec, two_paths
from tests.engines.training.test_training import _Stop, _StopsAfter


@pytest.fixture(scope="module")
def courses(tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    folder, (paths, _) = tmp_path_factory.mktemp("courses"), two_paths()
    return [on_disk(folder, paths, one) for one in (spec("noised"), spec("sampled"), spec("merged", rung=0.5))]


def train(courses: list[Trace], journal: Journal, max_seconds: float = math.inf, **changes: object) -> TrainedCat:
    paths, transformer = two_paths()
    recipe = replace(RECIPE, **changes)  # type: ignore[arg-type]
    return train_cat(paths, transformer, courses, courses[1:2], recipe, journal, max_seconds)


def test_a_few_steps_bring_merged_tokens_nearer_to_all_tokens(courses: list[Trace], tmp_path: Path) -> None:
    cat = train(courses, Journal(tmp_path, "cat"), steps=12, evaluate_every=6)
    assert cat.before.loss == 1.0
    assert cat.after.loss < 0.97
    assert set(cat.after.errors) == {
        "64 pixels",
        *(f"rung {rung:g}{kind}" for rung in RECIPE.rungs for kind in ("", ", plain")),
    }
    header, *rows = (tmp_path / "cat.csv").read_text().splitlines()
    assert header.startswith("step,seconds,schedule,loss,held_out_loss,gain_db_0.5,gain_db_0.375")
    assert [row.split(",")[0] for row in rows] == ["6", "12"]


def test_a_stopped_run_resumes_as_if_never_stopped(courses: list[Trace], tmp_path: Path) -> None:
    whole = train(courses, Journal(tmp_path, "whole"))
    with pytest.raises(_Stop):
        train(courses, _StopsAfter(Journal(tmp_path, "stopped"), saves=1))
    resumed = train(courses, Journal(tmp_path, "stopped"))
    assert resumed.after == whole.after
    assert all(torch.equal(resumed.factors[key], factor) for key, factor in whole.factors.items())


def test_time_that_is_up_ends_it_with_a_measurement(courses: list[Trace], tmp_path: Path) -> None:
    train(courses, Journal(tmp_path, "cat"), max_seconds=1e-6)
    assert [row.split(",")[0] for row in (tmp_path / "cat.csv").read_text().splitlines()] == ["step", "1"]


def test_every_round_sees_every_course_once_and_a_number_always_means_the_same(courses: list[Trace]) -> None:
    drawn = [draw_sample(courses, RECIPE, number) for number in range(48)]
    assert {trace.spec.kind for trace, _, _ in drawn[:3]} == {"noised", "sampled", "merged"}
    assert {index for _, index, _ in drawn} == {0, 1, 2}
    assert {rung for _, _, rung in drawn} == set(RECIPE.rungs)
    assert drawn[5] == draw_sample(courses, RECIPE, 5)
