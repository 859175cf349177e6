"""Step caching: which steps run, what the others carry on, and requests whose steps are cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.denoise import Denoiser
from cinecat.engines.errors import EngineError
from cinecat.engines.messages import Cat, CoreConfig, RequestStepped, Shot
from cinecat.engines.step_cache import Remembered, velocity_towards
from cinecat.engines.tokens.budget import step_tokens
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.samplers import Parts, StepCache, begin, sample
from cinecat.engines.tokens.schedule import spread_steps
from tests.engines.test_core import style_file
from tests.engines.test_core_cat import SHOT

CACHED = replace(SHOT, run_steps=3)
"""Of its 5 steps the second and the fourth are cached: one after a single step that ran, one after two."""

STEPS_AND_RUNS = st.integers(2, 200).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(2, steps)))


@pytest.fixture(scope="module")
def core(config: CoreConfig) -> EngineCore:
    return EngineCore(find_checkpoint(config.model), config)


def latents_of(core: EngineCore, job_id: str) -> Tensor:
    return core._requests[job_id].latents


def render(core: EngineCore, shot: Shot) -> tuple[Tensor, list[RequestStepped]]:
    core.condition(shot)
    told = [core.step_alone(shot.job_id) for _ in range(shot.steps)]
    latents = latents_of(core, shot.job_id)
    core.release(shot.job_id)
    return latents, told


@given(STEPS_AND_RUNS)
def test_the_steps_that_run_are_as_many_as_asked_and_evenly_spread(counts: tuple[int, int]) -> None:
    steps, runs = counts
    chosen = sorted(spread_steps(steps, runs))
    assert len(chosen) == runs
    assert (chosen[0], chosen[-1]) == (0, steps - 1)
    if runs > 2:
        assert chosen[-2] == steps - 2
        gaps = {later - earlier for earlier, later in pairwise(chosen[:-1])}
        assert max(gaps) - min(gaps) <= 1
    spent = step_tokens(Grid(3, 4, 4), steps, 1.0, runs)
    assert [step for step, tokens in enumerate(spent) if tokens] == chosen
    assert set(spent) <= {0, 48}


@settings(deadline=None)
@given(st.floats(0.02, 0.3), st.floats(0.35, 0.65), st.floats(0.7, 1.0), st.integers(0, 99))
def test_what_is_linear_in_sigma_is_carried_on_exactly(now: float, last: float, before: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    start, slope, latents = torch.randn(3, 1, 16, 2, 4, 4, generator=draw, dtype=torch.float64)
    remembered = Remembered()
    for sigma in (1.5, before, last):  # the first of three is forgotten
        remembered = remembered.with_step(sigma, start + slope * sigma**2 if sigma > 1 else start + slope * sigma)
    clean = remembered.carried_on(now)
    torch.testing.assert_close(clean, start + slope * now)
    torch.testing.assert_close(latents - now * velocity_towards(clean, latents, now), clean)


@pytest.mark.parametrize("sigmas", [(0.9,), (0.9, 0.9)], ids=["one", "twice the same"])
def test_where_there_is_no_line_the_last_prediction_stays(sigmas: Sequence[float]) -> None:
    remembered = Remembered()
    for number, sigma in enumerate(sigmas):
        remembered = remembered.with_step(sigma, torch.full((2,), float(number)))
    assert torch.equal(remembered.carried_on(0.5), torch.full((2,), len(sigmas) - 1.0))


def test_where_no_noise_is_left_nothing_moves() -> None:
    latents = torch.ones(1, 16, 2, 4, 4)
    assert torch.equal(velocity_towards(torch.zeros_like(latents), latents, 0.0), torch.zeros_like(latents))


def test_where_all_steps_run_it_is_the_ordinary_path_to_the_bit(core: EngineCore) -> None:
    plain, _ = render(core, SHOT)
    every, told = render(core, replace(SHOT, run_steps=SHOT.steps))
    assert torch.equal(every, plain)
    assert [step.tokens for step in told] == [48] * 5
    assert not torch.equal(render(core, CACHED)[0], plain)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_request_gets_what_the_benchs_sampler_makes(core: EngineCore, micro: Path, guidance: float) -> None:
    shot = replace(SHOT, negative_prompt="", guidance_scale=guidance, steps=7, run_steps=4)
    parts = Parts.load(str(micro))
    start = begin(parts, shot.image, shot.prompt, shot.frames, guidance, shot.seed)
    expected = sample(parts, start, shot.steps, StepCache(spread_steps(7, 4)))
    found, told = render(core, shot)
    assert torch.equal(found, expected.latents)
    assert tuple(step.tokens for step in told) == expected.tokens == (48, 0, 48, 0, 0, 48, 48)


def test_a_cached_step_runs_no_forward_and_has_a_preview(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks get their orders from forwards, so they hear nothing of it either."""
    conditioned = core.condition(CACHED)
    assert conditioned.next is not None
    assert conditioned.next.tokens == 48
    first = core.step_alone("a")
    assert first.next is not None
    assert (first.next.tokens, first.next.merged) == (0, False)
    with monkeypatch.context() as patched:
        patched.setattr(Denoiser, "velocities_of", lambda *_: pytest.fail("a cached step ran the model"))
        (answer,) = core.step(("a",), frozenset("a")).requests
    assert isinstance(answer, RequestStepped)
    assert (answer.step, answer.tokens) == (2, 0)
    assert answer.preview is not None
    assert answer.next == first.next
    core.release("a")


def test_what_is_remembered_counts_as_state(core: EngineCore) -> None:
    plain, cached = core.condition(SHOT), core.condition(replace(CACHED, job_id="b"))
    assert cached.state_bytes - plain.state_bytes == 2 * latents_of(core, "a").nbytes
    for name in "ab":
        core.release(name)


def test_in_company_each_gets_what_it_would_get_alone(core: EngineCore, tmp_path: Path) -> None:
    style = style_file(tmp_path / "dusk.safetensors", seed=1)
    shots = [
        CACHED,
        replace(SHOT, job_id="b", seed=8, styles=(style,)),
        replace(CACHED, job_id="c", seed=9, styles=(style,), guidance_scale=1.0),
    ]
    expected = [render(core, shot)[0] for shot in shots]
    for shot in shots:
        core.condition(shot)
    core.step("abc")
    with pytest.raises(EngineError, match=r"a and b cannot share a forward: .*tokens=0.*tokens=48"):
        core.step("ab")
    core.step("ac")  # two cached ones
    for batch in ("ac", "abc", "c", "a", "b", "b", "b"):
        core.step(batch)
    for shot, wanted in zip(shots, expected, strict=True):
        torch.testing.assert_close(latents_of(core, shot.job_id), wanted, rtol=1e-4, atol=1e-4)
        core.release(shot.job_id)


def test_a_clip_that_goes_on_from_any_step_equals_the_uninterrupted_one(core: EngineCore, tmp_path: Path) -> None:
    core.condition(CACHED)
    told, latents = [], []
    for step in range(CACHED.steps):
        told.append(core.step_alone("a"))
        core.save("a", tmp_path / f"{step}.checkpoint")
        latents.append(latents_of(core, "a"))
    core.release("a")
    for step in range(CACHED.steps):
        conditioned = core.condition(CACHED, tmp_path / f"{step}.checkpoint")
        assert conditioned.step_tokens == (48, 0, 0, 48, 48)[: step + 1]
        assert conditioned.next == told[step].next
        for later in range(step + 1, CACHED.steps):
            assert core.step_alone("a") == told[later]
        assert torch.equal(latents_of(core, "a"), latents[-1])
        core.release("a")
    assert core.condition(SHOT, tmp_path / "1.checkpoint").step_tokens == ()
    core.release("a")


@pytest.mark.parametrize("run_steps", [1, 6])
def test_a_shot_runs_two_to_all_of_its_steps(run_steps: int) -> None:
    with pytest.raises(ValueError, match=f"run_steps: {run_steps} is not between 2 and 5"):
        replace(SHOT, run_steps=run_steps)


def test_cached_steps_do_not_go_with_merged_tokens() -> None:
    with pytest.raises(ValueError, match="cannot go with cat"):
        replace(CACHED, cat=Cat(keep_ratio=0.5))
