"""The clips of `cinecat bench engines`: a core of ours, one without the gain from its context, and diffusers' pipeline.

All three get a fresh image and a fresh prompt in every round, so that no cache has seen them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cinecat.server.bench.harness import interleave
from cinecat.server.bench.serve import run_reference

if TYPE_CHECKING:
    from cinecat.engines.core import EngineCore
    from cinecat.engines.messages import CoreConfig, Shot
    from cinecat.server.bench.engines import EnginesWork

STAGES = ("text_encode", "image_encode", "vae_encode", "steps", "decode")
"""Where ours spends its time."""


def measure_clips(
    work: EnginesWork, config: CoreConfig, pipeline: Any, backend: str, clips: int, warm_up: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of clips by side and of our stages, and the largest difference between both sides' frames.

    Args:
        config: of a server; the engine is `backend`'s, which must be in the cache.
        pipeline: diffusers', of the same model.
        clips: rounds that count.
        warm_up: rounds before them.
    """
    from cinecat.engines.backends.study import FullContextCore, run_clip
    from cinecat.engines.checkpoint import find_checkpoint
    from cinecat.engines.core import EngineCore

    config = replace(config, engine=backend, missing_engine="refuse")
    checkpoint = find_checkpoint(work.model)
    core = EngineCore(checkpoint, config)
    stages: dict[str, list[float]] = {f"ours_{stage}_s": [] for stage in STAGES}

    def observe(number: int, seconds: dict[str, float]) -> None:
        if number >= 0:
            for stage in STAGES:
                stages[f"ours_{stage}_s"].append(seconds[stage])

    def through(core: EngineCore, observe: Callable[[int, dict[str, float]], None]) -> Callable[[int], float]:
        def measure(number: int) -> float:
            started = time.perf_counter()
            _, seconds = run_clip(core, _shot(work, number))
            total = time.perf_counter() - started
            observe(number, seconds)
            return total

        return measure

    def through_diffusers(number: int) -> float:
        started = time.perf_counter()
        _reference(pipeline, _shot(work, number))
        return time.perf_counter() - started

    apart = _shot(work, -warm_up - 1)
    difference = float(np.abs(run_clip(core, apart)[0].cpu().numpy() - _reference(pipeline, apart)).max())
    sides = {
        "diffusers_s": through_diffusers,
        "ours_s": through(core, observe),
        "full_context_s": through(FullContextCore(checkpoint, config), lambda number, seconds: None),
    }
    return {**interleave(sides, clips, warm_up), **stages}, difference


def _reference(pipeline: Any, shot: Shot) -> NDArray[np.float32]:
    image = Image.fromarray(shot.image)
    return run_reference(pipeline, image, shot.prompt, shot.frames, shot.steps, shot.guidance_scale, shot.seed)


def _shot(work: EnginesWork, number: int) -> Shot:
    """A request for a fresh image with a fresh prompt."""
    from cinecat.engines.messages import Shot

    size = work.main
    image = np.random.default_rng(number + 1000).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
    return Shot(
        job_id="bench",
        image=image,
        prompt=f"shot number {number} of a cat that looks up",
        negative_prompt="",
        frames=size.frames,
        steps=work.steps,
        guidance_scale=work.guidance_scale,
        seed=number + 1000,
        styles=(),
    )
