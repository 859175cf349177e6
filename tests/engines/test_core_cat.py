"""Requests whose steps share tokens between patches."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.messages import Cat, CoreConfig, RequestStepped, Shot, StyleUse
from cinecat.engines.tokens.budget import step_tokens
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.samplers import Parts, adaptive, begin, sample

SHOT = Shot(
    job_id="a",
    image=np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
    prompt="a cat",
    negative_prompt="blurry",
    frames=9,
    steps=5,
    guidance_scale=4.0,
    seed=5,
    styles=(),
)
GRID = Grid(3, 4, 4)


@pytest.fixture(scope="module")
def core(config: CoreConfig) -> EngineCore:
    return EngineCore(find_checkpoint(config.model), config)


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> StyleUse:
    path = tmp_path_factory.mktemp("styles") / "dusk.safetensors"
    draw = torch.Generator().manual_seed(1)
    factors = {"A": torch.randn(2, 48, generator=draw), "B": torch.randn(48, 2, generator=draw)}
    save_file({f"transformer.blocks.0.attn2.to_q.lora_{name}.weight": value for name, value in factors.items()}, path)
    return StyleUse(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), 1.0)


def render(core: EngineCore, shot: Shot) -> tuple[Tensor, list[RequestStepped]]:
    """Final latents, and what each step said."""
    core.condition(shot)
    steps = [core.step_alone(shot.job_id) for _ in range(shot.steps)]
    latents = core._requests[shot.job_id].latents
    core.release(shot.job_id)
    return latents, steps


def test_at_a_keep_ratio_of_one_it_is_the_uniform_path_to_the_bit(core: EngineCore, style: StyleUse) -> None:
    shot = replace(SHOT, styles=(style,))
    uniform, told = render(core, shot)
    kept, _ = render(core, replace(shot, cat=Cat(keep_ratio=1.0)))
    assert torch.equal(kept, uniform)
    assert [step.tokens for step in told] == [48] * 5
    assert not any(step.plan_seconds for step in told)
    assert not torch.equal(render(core, SHOT)[0], uniform)


def test_steps_spend_what_the_schedule_says(core: EngineCore, style: StyleUse) -> None:
    shot = replace(SHOT, styles=(style,), cat=Cat(keep_ratio=0.6))
    latents, told = render(core, shot)
    assert tuple(step.tokens for step in told) == step_tokens(GRID, 5, 0.6)
    assert told[0].tokens == 48
    assert sum(step.tokens for step in told) <= 0.6 * 5 * 48
    assert {step.keep_ratio for step in told} == {0.6}
    assert [step.plan_seconds > 0 for step in told] == [step.tokens < 48 for step in told]
    assert torch.equal(render(core, shot)[0], latents)
    assert not torch.equal(render(core, replace(shot, cat=None))[0], latents)


@torch.inference_mode()
def test_plans_follow_the_clean_prediction_after_guidance(core: EngineCore) -> None:
    core.condition(replace(SHOT, cat=Cat(keep_ratio=0.5)))
    request = core._requests["a"]
    before, timestep = request.latents.clone(), request.scheduler.timesteps[0]
    wanted, unwanted = request.denoiser.velocities(
        before, request.condition, timestep, request.branches, request.outfit.whole
    )
    core.step_alone("a")
    expected = before - timestep / 1000 * (unwanted + 4.0 * (wanted - unwanted))
    torch.testing.assert_close(request.remembered.last, expected)
    core.release("a")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_request_gets_what_the_benchs_sampler_makes(core: EngineCore, micro: Path, guidance: float) -> None:
    shot = replace(SHOT, negative_prompt="", guidance_scale=guidance, steps=8, cat=Cat(keep_ratio=0.8))
    parts = Parts.load(str(micro))
    start = begin(parts, shot.image, shot.prompt, shot.frames, guidance, shot.seed)
    expected = sample(parts, start, shot.steps, adaptive(0.8)(start.grid, shot.steps))
    found, told = render(core, shot)
    spent = tuple(step.tokens for step in told)
    whole = [tokens == 48 for tokens in spent]
    assert any(sum(whole[:step]) > 1 for step, each in enumerate(whole) if not each)  # a line goes through two
    assert spent == expected.tokens
    assert torch.equal(found, expected.latents)


def test_a_clip_of_few_tokens_leaves_others_as_they_are(core: EngineCore) -> None:
    alone, _ = render(core, SHOT)
    core.condition(SHOT)
    core.condition(replace(SHOT, job_id="b", cat=Cat(keep_ratio=0.5)))
    for _ in range(SHOT.steps):
        core.step_alone("a")
        core.step_alone("b")
    assert torch.equal(core._requests["a"].latents, alone)
    core.release("a")
    core.release("b")


def test_a_target_is_held_by_the_ratio_that_the_content_asks_for(core: EngineCore) -> None:
    easy, modest = render(core, replace(SHOT, cat=Cat(target_psnr_db=-100.0)))
    hard, whole = render(core, replace(SHOT, cat=Cat(target_psnr_db=200.0)))
    assert {step.keep_ratio for step in modest} == {0.375}
    assert tuple(step.tokens for step in modest) == step_tokens(GRID, 5, 0.375)
    assert modest[0].plan_seconds > 0
    assert [step.tokens for step in whole] == [48] * 5
    assert torch.equal(hard, render(core, SHOT)[0])
    assert not torch.equal(easy, hard)


@pytest.mark.parametrize("limits", [{}, {"keep_ratio": 0.5, "target_psnr_db": 30.0}])
def test_a_request_has_one_limit(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a keep ratio or a target"):
        Cat(**limits)
