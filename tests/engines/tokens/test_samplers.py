"""Samplers: one loop, whose uniform policy is the engine core's, and rivals that do what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.messages import CoreConfig
from cinecat.engines.tokens import samplers, schedule
from cinecat.engines.tokens.adaptive import AdaptiveTokens
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.rivals import fixed_grid
from cinecat.engines.tokens.samplers import (
    ContentAdaptive,
    Forward,
    Parts,
    Progressive,
    Reuse,
    Start,
    StepCache,
    Uniform,
    adaptive,
    begin,
    begin_smaller,
    decode,
    sample,
)
from cinecat.engines.tokens.schedule import spread_steps
from cinecat.engines.training.evaluation import Sampling, generate

STEPS = 6
IMAGE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def parts(micro: Path) -> Parts:
    return Parts.load(str(micro))


@pytest.fixture(scope="module")
def start(parts: Parts) -> Start:
    return begin(parts, IMAGE, "a ring", 5, 1.0, seed=3)


def test_the_uniform_policy_makes_what_a_request_gets(parts: Parts, start: Start, config: CoreConfig) -> None:
    core = EngineCore(find_checkpoint(config.model), config)
    expected = generate(core, IMAGE, "a ring", 5, Sampling(STEPS, 1.0, seed=3))
    found = decode(parts, sample(parts, start, STEPS, Uniform()).latents)
    assert np.array_equal(found, expected)


def test_guidance_runs_both_branches(parts: Parts) -> None:
    guided = begin(parts, IMAGE, "a ring", 5, 3.0, seed=3)
    plain = sample(parts, begin(parts, IMAGE, "a ring", 5, 1.0, seed=3), 2, Uniform())
    assert not torch.equal(sample(parts, guided, 2, Uniform()).latents, plain.latents)


def test_rivals_spend_the_budgets_of_cat(parts: Parts, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MERGED_RUNG", 0.5)  # below it so few patches leave no choice
    ours = sample(parts, start, STEPS, adaptive(0.8)(start.grid, STEPS))
    theirs = sample(parts, start, STEPS, adaptive(0.8, fixed_grid)(start.grid, STEPS))
    assert ours.tokens == theirs.tokens
    assert min(ours.tokens) < start.grid.count
    assert not torch.equal(ours.latents, theirs.latents)


def test_reused_steps_run_nothing(parts: Parts, start: Start) -> None:
    found = sample(parts, start, STEPS, StepCache(frozenset([0, 3, 5])))
    assert found.tokens == (32, 0, 0, 32, 0, 32)


def test_a_cache_that_reuses_nothing_is_uniform(parts: Parts, start: Start) -> None:
    all_run = sample(parts, start, STEPS, StepCache(frozenset(range(STEPS))))
    assert torch.equal(all_run.latents, sample(parts, start, STEPS, Uniform()).latents)


def test_change_carries_the_last_two_predictions_on() -> None:
    cache = StepCache(frozenset([0, 1]), "change")
    latents = torch.zeros(1, 1, 1, 1, 1)
    cache.observe(latents, latents - 1.0 / 0.9, 0.9, 4)
    cache.observe(latents, latents - 2.0 / 0.8, 0.8, 4)
    decision = cache.decide(2, 0.7)
    assert isinstance(decision, Reuse)
    assert decision.clean.item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("runs", "expected"), [(1, {0}), (2, {0, 5}), (3, {0, 4, 5}), (4, {0, 2, 4, 5}), (6, {0, 1, 2, 3, 4, 5})]
)
def test_spread_steps_keep_the_first_and_the_last_two(runs: int, expected: set[int]) -> None:
    assert spread_steps(6, runs) == expected


def test_merged_steps_begin_with_what_whole_ones_lead_to(parts: Parts, start: Start) -> None:
    policy = ContentAdaptive(AdaptiveTokens(start.grid, 4, keep_ratio=0.8))
    cache = StepCache(frozenset([0]))
    latents = start.noise
    for step, (sigma, tokens) in enumerate([(0.9, 32), (0.8, 32), (0.6, 16)]):
        decision = policy.decide(step, sigma)
        assert isinstance(decision, Forward)
        assert (decision.merged is None) == (step == 0)
        if decision.merged is not None:
            expected = cache.decide(step, sigma)
            assert isinstance(expected, Reuse)
            assert torch.equal(decision.merged.prediction, expected.clean)
        velocity = torch.full_like(latents, float(step))
        policy.observe(latents, velocity, sigma, tokens)
        if tokens == start.grid.count:
            cache.observe(latents, velocity, sigma, tokens)


def test_progressive_steps_start_coarse_and_end_whole(parts: Parts, start: Start) -> None:
    found = sample(parts, start, STEPS, Progressive(2))
    assert found.tokens == (8, 8, 32, 32, 32, 32)
    assert found.latents.shape == start.noise.shape
    assert bool(found.latents.isfinite().all())


def test_no_coarse_step_is_uniform(parts: Parts, start: Start) -> None:
    assert Progressive(0).decide(0, 1.0) == Forward()


def test_sides_without_a_half_refuse_coarse_steps(parts: Parts) -> None:
    odd = begin(parts, IMAGE[:48], "a ring", 5, 1.0, seed=0)
    assert odd.grid == Grid(2, 3, 4)
    with pytest.raises(ValueError, match="half"):
        sample(parts, odd, 2, Progressive(1))


def test_a_smaller_clip_starts_from_the_low_band_of_the_same_noise(parts: Parts, start: Start) -> None:
    smaller = begin_smaller(parts, start, IMAGE, 5, 48, 48)
    assert smaller.noise.shape == (1, 16, 2, 6, 6)
    assert smaller.condition.shape == (1, 20, 2, 6, 6)


def test_a_band_goes_up_and_down_without_loss_and_keeps_white_noise_white() -> None:
    noise = torch.randn(1, 16, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    low: Tensor = samplers._low_band(noise, 32, 32)
    assert float(low.std()) == pytest.approx(1.0, abs=0.01)
    torch.testing.assert_close(samplers._low_band(samplers._from_low_band(low, 64, 64), 32, 32), low)
    flat = torch.full((1, 16, 2, 4, 4), 3.0)
    torch.testing.assert_close(
        samplers._grown_content(flat, torch.zeros(1, 16, 2, 8, 8)), flat.new_full((1, 16, 2, 8, 8), 3.0)
    )
