"""Requests as small states: their order, their independence, and their equality with the reference modules."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cinecat.engines import stages
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.errors import EngineError, NoFreeSlot, OutOfMemory
from cinecat.engines.messages import CoreConfig, Shot, StyleUse
from cinecat.engines.model import WanModel

SHOT = Shot(
    job_id="a",
    image=np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8),
    prompt="a cat",
    negative_prompt="blurry",
    frames=9,
    steps=3,
    guidance_scale=4.0,
    seed=5,
    styles=(),
)


@pytest.fixture(scope="module")
def core(config: CoreConfig) -> EngineCore:
    return EngineCore(find_checkpoint(config.model), config)


@pytest.fixture
def model(core: EngineCore) -> WanModel:
    return core._model


def finish(core: EngineCore, job_id: str) -> Tensor:
    chunks: list[Tensor] = []
    decoded = core.decode(job_id, chunks.append)
    while decoded.first + decoded.count < decoded.total:
        decoded = core.decode(job_id, chunks.append)
    core.release(job_id)
    return torch.cat(chunks)


def render(core: EngineCore, shot: Shot) -> Tensor:
    core.condition(shot)
    for _ in range(shot.steps):
        core.step_alone(shot.job_id)
    return finish(core, shot.job_id)


def test_requests_that_take_turns_get_what_they_would_get_alone(core: EngineCore) -> None:
    shots = [SHOT, replace(SHOT, job_id="b", seed=6, guidance_scale=1.0), replace(SHOT, job_id="c", prompt="a dog")]
    alone = [render(core, shot) for shot in shots]
    for shot in shots:
        core.condition(shot)
    for _ in range(SHOT.steps):
        for shot in shots:
            core.step_alone(shot.job_id)
    together = [finish(core, shot.job_id) for shot in shots]
    for expected, got in zip(alone, together, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not torch.equal(alone[0], alone[1])


def test_frames_come_as_one_then_four_at_a_time(core: EngineCore) -> None:
    core.condition(SHOT)
    for _ in range(SHOT.steps):
        core.step_alone("a")
    chunks: list[Tensor] = []
    answers = [core.decode("a", chunks.append) for _ in range(3)]
    assert [(answer.first, answer.count, answer.total) for answer in answers] == [(0, 1, 9), (1, 4, 9), (5, 4, 9)]
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 32, 48, 3), (4, 32, 48, 3), (4, 32, 48, 3)]
    with pytest.raises(EngineError, match="decoded all its 9 frames"):
        core.decode("a", chunks.append)


def test_calls_out_of_order_are_refused_and_do_no_harm(core: EngineCore) -> None:
    with pytest.raises(EngineError, match="not in the engine core"):
        core.step_alone("nobody")
    core.condition(SHOT)
    with pytest.raises(EngineError, match="3 steps left"):
        core.decode("a", lambda frames: None)
    for _ in range(3):
        core.step_alone("a")
    with pytest.raises(EngineError, match="done all its 3 steps"):
        core.step_alone("a")
    core.release("a")
    core.release("a")
    with pytest.raises(EngineError, match="not in the engine core"):
        core.step_alone("a")


def test_known_prompts_images_and_conditions_are_not_encoded_again(core: EngineCore) -> None:
    shot = replace(SHOT, prompt="only here", image=SHOT.image[::-1].copy())

    def cached(shot: Shot) -> dict[str, bool]:
        return {timing.stage: timing.cached for timing in core.condition(shot).timings}

    assert cached(shot) == {"text_encode": False, "image_encode": False, "vae_encode": False}
    assert cached(shot) == {"text_encode": True, "image_encode": True, "vae_encode": True}
    assert cached(replace(shot, frames=5)) == {"text_encode": True, "image_encode": True, "vae_encode": False}
    assert cached(replace(shot, prompt="new"))["text_encode"] is False
    core.release("a")


def test_a_prompt_that_the_text_encoder_cannot_read_whole_is_noted(core: EngineCore) -> None:
    assert core.condition(SHOT).notes == ()
    assert "cut after 512 tokens" in core.condition(replace(SHOT, prompt="cat " * 600)).notes[0]
    core.release("a")


@torch.inference_mode()
def test_the_chunked_condition_equals_the_whole_video_through_the_vae(model: WanModel) -> None:
    ours = stages.encode_condition(model.vae, SHOT.image, 9)
    image = torch.from_numpy(SHOT.image).permute(2, 0, 1)[None, :, None] / 255.0 * 2 - 1
    video = torch.cat([image, image.new_zeros(1, 3, 8, 32, 48)], dim=2)
    theirs = model.vae.encode(video).latent_dist.mode()
    torch.testing.assert_close(ours[:, 4:], theirs, rtol=1e-5, atol=1e-5)
    assert ours[:, :4, 0].eq(1).all()
    assert ours[:, :4, 1:].eq(0).all()


@torch.inference_mode()
def test_streamed_decoding_equals_decoding_at_once_also_for_two_clips_in_turn(model: WanModel) -> None:
    latents = [stages.starting_noise(seed, (1, 16, 3, 4, 6), torch.device("cpu")) for seed in (1, 2)]
    decoders = [stages.ClipDecoder.start(model.vae, latent) for latent in latents]
    streamed = [[decoder.next_frames() for decoder in decoders] for _ in range(3)]
    for index, latent in enumerate(latents):
        whole = (model.vae.decode(latent, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 3, 0)
        torch.testing.assert_close(torch.cat([chunk[index] for chunk in streamed]), whole, rtol=1e-5, atol=1e-5)


def style_file(path: Path, seed: int, scale: float = 1.0) -> StyleUse:
    draw = torch.Generator().manual_seed(seed)
    factors = {"A": scale * torch.randn(2, 48, generator=draw), "B": scale * torch.randn(48, 2, generator=draw)}
    save_file({f"transformer.blocks.0.attn2.to_q.lora_{name}.weight": value for name, value in factors.items()}, path)
    return StyleUse(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), 1.0)


def test_a_warm_style_is_resident_and_read_no_more(core: EngineCore, tmp_path: Path) -> None:
    style = style_file(tmp_path / "dusk.safetensors", seed=1)
    core.warm(style)
    (resident,) = [slot for slot in core.residency() if style.fingerprint in slot.fingerprints]
    assert resident.size_bytes > 0
    Path(style.path).unlink()
    conditioned = core.condition(replace(SHOT, styles=(style,)))
    assert resident in conditioned.resident
    core.release("a")


def test_a_style_that_was_read_is_not_read_again(core: EngineCore, tmp_path: Path) -> None:
    styles = [style_file(tmp_path / f"{seed}.safetensors", seed) for seed in range(20, 30)]
    for style in styles:
        core.warm(style)
    first = styles[0]
    assert first.fingerprint not in {name for slot in core.residency() for name in slot.fingerprints}
    Path(first.path).unlink()
    core.warm(first)
    assert first.fingerprint in {name for slot in core.residency() for name in slot.fingerprints}


def test_a_clip_that_becomes_nan_fails_and_the_next_one_does_not(core: EngineCore, tmp_path: Path) -> None:
    plain = render(core, SHOT)
    wild = style_file(tmp_path / "wild.safetensors", seed=6, scale=1e30)
    core.condition(replace(SHOT, styles=(wild,)))
    with pytest.raises(EngineError, match="step 1 gave NaN or infinity; lower the strengths"):
        core.step_alone("a")
    core.release("a")
    assert torch.equal(render(core, SHOT), plain)


def test_weights_written_over_in_place_are_refused_and_not_worn(core: EngineCore, tmp_path: Path) -> None:
    accepted = style_file(tmp_path / "dusk.safetensors", seed=2)
    style_file(tmp_path / "dusk.safetensors", seed=3)
    before = core.residency()
    with pytest.raises(EngineError, match=r"styles: dusk\.safetensors: it was replaced meanwhile"):
        core.condition(replace(SHOT, styles=(accepted,)))
    assert core.residency() == before


def test_a_shift_moves_the_timesteps_and_the_models_own_changes_nothing(model: WanModel) -> None:
    own = model.new_scheduler(8).timesteps
    torch.testing.assert_close(model.new_scheduler(8, model.shift).timesteps, own, rtol=0, atol=0)
    assert (model.new_scheduler(8, 3 * model.shift).timesteps[1:] > own[1:]).all()


def test_a_style_whose_file_is_gone_fails_its_request_which_renders_in_no_style(
    core: EngineCore, tmp_path: Path
) -> None:
    previous, gone = (style_file(tmp_path / f"{seed}.safetensors", seed) for seed in (4, 5))
    plain = render(core, SHOT)
    styled = render(core, replace(SHOT, styles=(previous,)))
    Path(gone.path).unlink()
    with pytest.raises(EngineError, match=r"styles: 5\.safetensors: cannot be read"):
        core.condition(replace(SHOT, styles=(gone,)))
    with pytest.raises(EngineError, match="not in the engine core"):
        core.step_alone("a")
    assert torch.equal(render(core, SHOT), plain)
    assert torch.equal(render(core, replace(SHOT, styles=(previous,))), styled)
    assert not torch.equal(styled, plain)


def test_without_a_free_slot_a_request_leaves_the_running_ones_be_and_gets_the_first_that_ends(
    core: EngineCore, tmp_path: Path
) -> None:
    worn = [style_file(tmp_path / f"{seed}.safetensors", seed) for seed in (6, 7, 8)]
    first, second, third = (replace(SHOT, job_id=name, styles=(use,)) for name, use in zip("abc", worn, strict=True))
    alone = render(core, first)
    core.condition(first)
    core.condition(second)
    with pytest.raises(NoFreeSlot, match="no style slot is free: 2 of 2 are worn by running clips"):
        core.condition(third)
    with pytest.raises(NoFreeSlot):
        core.warm(worn[2])
    for _ in range(SHOT.steps):
        core.step_alone("a")
    assert torch.equal(finish(core, "a"), alone)
    core.condition(third)
    core.release("b")
    core.release("c")


def test_a_request_that_cannot_be_encoded_keeps_no_slot(
    core: EngineCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worn = [style_file(tmp_path / f"{seed}.safetensors", seed) for seed in (9, 10)]

    def fail(*_: object) -> Tensor:
        raise OutOfMemory("the text encoder found no memory")

    with monkeypatch.context() as patched:
        patched.setattr(stages, "encode_text", fail)
        for use in worn * 2:
            with pytest.raises(OutOfMemory):
                core.condition(replace(SHOT, prompt="never encoded", styles=(use,)))
    for use in worn:
        core.warm(use)
    assert {slot.fingerprints[0] for slot in core.residency()} == {use.fingerprint for use in worn}
