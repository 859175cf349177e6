"""A film for tests.engines.samples.small_transformer, its courses, and a recipe for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import save_file

from cinecat.engines.slots import Factors
from cinecat.engines.training.cat.recipe import CatRecipe
from cinecat.engines.training.cat.traces import Film, Kind, Trace, TraceSpec, run_course
from cinecat.engines.training.cat.two_paths import Given, TwoPaths
from tests.engines.samples import IMAGE, TEXT, small_transformer

RECIPE = CatRecipe(rank=2, alpha=2.0, steps=4, accumulation=2, evaluate_every=2, learning_rate=1e-2, average=0.5)


def film(kind: Kind = "sampled", seed: int = 0) -> Film:
    """Three latent frames of 8x8: 48 patches."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    given = Given(drawn(20, 3, 8, 8), drawn(5, TEXT), drawn(3, IMAGE))
    return Film(given, drawn(16, 3, 8, 8) if kind == "noised" else None)


def scheduler(steps: int) -> Any:
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    solver.set_timesteps(steps)
    return solver


def spec(
    kind: Kind = "sampled", seed: int = 0, rung: float = 1.0, style: str = "", bare: bool = False, whole: int = 1
) -> TraceSpec:
    return TraceSpec(seed, 64, 64, 9, 4, whole, kind, rung, style, bare)


def two_paths(styles: Mapping[str, Factors] | None = None) -> tuple[TwoPaths, Any]:
    transformer = small_transformer()
    return TwoPaths(transformer, RECIPE, styles or {}), transformer


def on_disk(folder: Path, paths: TwoPaths, one: TraceSpec) -> Trace:
    path = folder / f"{one.kind}-{one.seed}-{one.style}.safetensors"
    save_file(run_course(one, film(one.kind, one.seed), paths, scheduler(one.steps)), path)
    return Trace(one, path)
