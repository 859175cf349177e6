"""The study: everybody runs on every film, at the settings that the times of single steps ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cinecat.engines.quality.pixels import MOST_DECIBELS
from cinecat.engines.tokens.rivals import EQUAL_TOKENS
from cinecat.engines.tokens.study import (
    AUTO_CAT,
    EQUAL_TIME,
    Costs,
    Study,
    StudyWork,
    make_cells,
    methods_at,
    object_psnr,
    study,
)
from cinecat.engines.training.scenes import OPEN_KINDS

COSTS = Costs({"uniform": [2.0, 2.0], "coarse": [0.5], "tokens_100": [1.0], "side_128": [0.6], "side_192": [1.2]})


@pytest.fixture(scope="module")
def work(micro: Path) -> StudyWork:
    return StudyWork(
        model=str(micro),
        side=64,
        frames=5,
        steps=4,
        keep_ratios=(0.75, 0.5),
        textures=(0.5,),
        motions=(0.0,),
        open_kinds=("roam",),
        styles=(),
        pairs=2,
    )


@pytest.fixture(scope="module")
def found(work: StudyWork) -> Study:
    return study(work)


def test_everybody_runs_on_every_film(found: Study, work: StudyWork) -> None:
    everybody = {"cat", *EQUAL_TOKENS, *EQUAL_TIME}
    ran = {(outcome.cell, outcome.keep_ratio, outcome.method) for outcome in found.outcomes}
    cells = ["texture 0.5, motion 0", "roam"]
    assert sorted(cell for cell, _, method in ran if method == AUTO_CAT) == sorted(cells)
    assert {method for cell, ratio, method in ran if cell == "roam" and ratio == 0.5} == everybody
    assert ran >= {(cell, 0.75, method) for cell in cells for method in everybody - {"static_clusters", "smaller"}}
    assert {ratio for cell, ratio, _ in ran if cell == "noise"} == {1.0, 0.5}
    without_adapter = 5
    assert len(found.outcomes) == work.clips - without_adapter
    assert found.left_out == ()


def test_the_uniform_result_is_its_own_reference(found: Study) -> None:
    uniform = [outcome for outcome in found.outcomes if outcome.method == "uniform"]
    assert [outcome.scores["psnr_uniform"] for outcome in uniform] == [MOST_DECIBELS] * 3


def test_rivals_at_equal_tokens_spend_as_many(found: Study) -> None:
    spent = {
        outcome.tokens
        for outcome in found.outcomes
        if outcome.method in {"cat", *EQUAL_TOKENS} and outcome.keep_ratio == 0.5
    }
    assert len(spent) == 1


def test_single_steps_of_every_kind_are_timed(found: Study) -> None:
    assert {"uniform", "keep_050", "keep_025", "coarse", "side_32", "side_48"} <= found.step_seconds.keys()
    assert {len(samples) for samples in found.step_seconds.values()} == {2}


def test_the_cells_that_the_checks_compare_are_run_first() -> None:
    work = StudyWork(side=32, frames=5, styles=())
    names = [cell.name for cell in make_cells(work)]
    assert names[:2] == ["texture 0, motion 0", "texture 1, motion 1"]
    assert len(set(names)) == len(names) == 9 + len(OPEN_KINDS) + 1
    assert [cell.name for cell in make_cells(replace(work, textures=(0.5,), motions=(0.0,), open_kinds=()))] == [
        "texture 0.5, motion 0",
        "noise",
    ]


def test_every_other_film_comes_again_in_one_style_after_the_other() -> None:
    cells = make_cells(StudyWork(side=32, frames=5, noise=False))
    styled = [cell for cell in cells if cell.style]
    assert [cell.style for cell in styled[:4]] == ["noir", "amber", "blueprint", "noir"]
    assert len(styled) == (9 + len(OPEN_KINDS)) // 2
    for cell in styled:
        before = cells[cells.index(cell) - 1]
        assert cell.name == f"{before.name}, {cell.style}"
        assert cell.film is before.film
        assert not cell.counts


def test_the_motion_of_every_film_is_told(found: Study) -> None:
    assert found.motion.keys() == {cell.name for cell in found.cells}
    assert all(motion > 0.0 for motion in found.motion.values())


def test_what_there_is_no_time_for_is_named(work: StudyWork) -> None:
    hurried = StudyWork(**{**vars(work), "minutes": 0.0, "keep_ratios": (0.5,)})
    found = study(hurried)
    assert [cell.name for cell in found.cells] == ["texture 0.5, motion 0"]
    assert found.left_out == ("roam", "noise")


@pytest.mark.parametrize(
    ("cost", "settings"),
    [
        (0.5, {"fewer_steps": "6 steps", "smaller": "192x192", "progressive": "8 of 12 steps at half size"}),
        (0.3, {"fewer_steps": "4 steps", "smaller": "128x128", "progressive": "11 of 12 steps at half size"}),
        (1.1, {"fewer_steps": "12 steps", "smaller": "256x256", "progressive": "0 of 12 steps at half size"}),
    ],
)
def test_rivals_get_the_time_that_cat_takes_and_no_less(
    monkeypatch: pytest.MonkeyPatch, cost: float, settings: dict[str, str]
) -> None:
    monkeypatch.setattr("cinecat.engines.tokens.study.smaller_sides", lambda side: [128, 192])
    methods = {method.name: method.setting for method in methods_at(StudyWork(), 0.5, cost, COSTS)}
    assert {name: methods[name] for name in settings} == settings


def test_a_run_costs_what_its_steps_cost() -> None:
    assert COSTS.of_run((200, 100, 0, 200), 200) == pytest.approx(2.5)


def test_the_object_is_judged_by_its_own_pixels() -> None:
    a = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    b = a.copy()
    b[0, 0, 0] = 255
    mask = np.zeros((1, 4, 4), dtype=bool)
    mask[0, 0, 0] = True
    assert object_psnr(a, b, mask) == pytest.approx(0.0)
    assert object_psnr(a, b, ~mask) == MOST_DECIBELS
