"""Courses of the uniform model: where they lead, what is kept of them, and how they are drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cinecat.engines import stages
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.model import load_model
from cinecat.engines.stages import starting_noise
from cinecat.engines.step_cache import Remembered
from cinecat.engines.tokens.schedule import spread_steps
from cinecat.engines.training.cat.recipe import CatRecipe
from cinecat.engines.training.cat.traces import Trace, TraceSpec, draw_specs, encode_film, run_course, trace_of
from cinecat.engines.training.film import HELD_OUT, make_clip
from tests.engines.training.cat.samples import film, on_disk, scheduler, spec, two_paths

NEAR = {"abs": 5e-3}  # courses are kept in float16


def test_a_noised_course_is_the_film_with_one_noise(tmp_path: Path) -> None:
    paths, _ = two_paths()
    trace = on_disk(tmp_path, paths, spec("noised"))
    clean, noise = film("noised").clean, starting_noise(0, (16, 3, 8, 8), torch.device("cpu"))
    state = trace.state(1)
    sigma = state.timestep / 1000
    assert state.timestep == float(scheduler(4).timesteps[2])
    assert state.noisy == pytest.approx((1 - sigma) * clean + sigma * noise, **NEAR)


@torch.no_grad()
def test_a_sampled_course_is_what_the_solver_makes_of_the_model(tmp_path: Path) -> None:
    paths, _ = two_paths()
    trace = on_disk(tmp_path, paths, spec("sampled"))
    solver, given = scheduler(4), trace.given()
    first = starting_noise(0, (16, 3, 8, 8), torch.device("cpu"))
    level = solver.timesteps[0]
    prediction = paths.clean(first, float(level), given)
    velocity = (first - prediction) / (float(level) / 1000)
    second = solver.step(velocity, level, first, return_dict=False)[0]
    state = trace.state(0)
    assert len(trace) == 3
    assert state.noisy == pytest.approx(second, **NEAR)
    assert state.prediction == pytest.approx(prediction, **NEAR)
    assert state.target == pytest.approx(paths.clean(second, state.timestep, given), **NEAR)


@torch.no_grad()
def test_a_merged_course_hands_on_what_merged_tokens_predict_and_keeps_what_all_would(tmp_path: Path) -> None:
    paths, _ = two_paths()
    trace = on_disk(tmp_path, paths, spec("merged", rung=0.5))
    given, state, following = trace.given(), trace.state(0), trace.state(1)
    merged = paths.clean(state.noisy, state.timestep, given, "", state.prediction, 0.5)
    assert not torch.allclose(merged, state.target, atol=0.01)
    solver, noise = scheduler(4), starting_noise(0, (16, 3, 8, 8), torch.device("cpu"))
    latents = noise
    for level, clean in zip(solver.timesteps, (state.prediction, merged), strict=False):
        latents = solver.step((latents - clean) / (float(level) / 1000), level, latents, return_dict=False)[0]
    assert following.noisy == pytest.approx(latents, abs=0.02)
    assert state.target == pytest.approx(paths.clean(state.noisy, state.timestep, given), **NEAR)


@torch.no_grad()
def test_what_is_expected_of_a_step_is_carried_on_from_the_whole_ones_before(tmp_path: Path) -> None:
    paths, _ = two_paths()
    one = replace(spec("noised"), steps=5, whole=4)
    save_file(run_course(one, film("noised"), paths, scheduler(5)), tmp_path / "one.safetensors")
    trace, levels = Trace(one, tmp_path / "one.safetensors"), scheduler(5).timesteps / 1000
    whole = sorted(spread_steps(5, 4))
    (missing,) = set(range(5)) - set(whole)
    given, clean = trace.given(), film("noised").clean
    noise = starting_noise(0, (16, 3, 8, 8), torch.device("cpu"))
    assert len(trace) == 1
    assert trace.state(0).timestep == float(scheduler(5).timesteps[missing])
    remembered = Remembered()
    for step in (step for step in whole if step < missing):
        sigma = float(levels[step])
        noisy = (1 - sigma) * clean + sigma * noise
        remembered = remembered.with_step(sigma, paths.clean(noisy, 1000 * sigma, given))
    assert trace.state(0).prediction == pytest.approx(remembered.carried_on(float(levels[missing])), **NEAR)


@torch.no_grad()
def test_films_are_encoded_as_the_engine_does(micro: Path) -> None:
    model = load_model(find_checkpoint(str(micro)), "cpu", "float32")
    clip = make_clip(7, 5, 32, 32)
    one = TraceSpec(7, 32, 32, 5, 4, 2, "noised", 1.0, "", bare=False)
    encoded = encode_film(model, one)
    text = stages.encode_text(model, clip.caption)[0]
    assert encoded.clean is not None
    assert encoded.clean.shape == (16, 2, 4, 4)
    assert torch.equal(encoded.given.condition, stages.encode_condition(model.vae, clip.first_frame, 5)[0])
    assert torch.equal(encoded.given.text, text[: len(encoded.given.text)])
    assert not text[len(encoded.given.text) :].any()
    bare = encode_film(model, replace(one, kind="sampled", bare=True))
    assert bare.clean is None
    assert torch.equal(bare.given.text, stages.encode_text(model, "")[0, : len(bare.given.text)])


def test_sizes_kinds_and_styles_take_turns() -> None:
    train, held_out = draw_specs(CatRecipe(films=24, held_out=12), ("a", "b"))
    assert Counter(each.width for each in train) == {128: 12, 256: 12}
    assert Counter((each.width, each.kind, bool(each.style)) for each in held_out) == Counter(
        (width, kind, styled)
        for width in (128, 256)
        for kind in ("noised", "sampled", "merged")
        for styled in (False, True)
    )
    assert Counter(each.style for each in train) == {"": 12, "a": 6, "b": 6}
    assert all(8 <= each.steps <= 30 for each in train)
    assert all(0.1 <= each.whole / each.steps <= 0.75 for each in train)
    assert all((each.rung < 1.0) == (each.kind == "merged") for each in train)
    assert all(each.seed < HELD_OUT for each in train)
    assert all(each.seed >= HELD_OUT for each in held_out)


def test_a_course_is_kept_under_its_model_and_all_of_its_settings(tmp_path: Path) -> None:
    paths = {
        trace_of(one, model, tmp_path).path for one in (spec(), spec(seed=1), spec(style="a")) for model in ("m", "n")
    }
    assert len(paths) == 6
