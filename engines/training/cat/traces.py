"""What the uniform model predicts along courses of denoising, computed once and kept on disk.

A course costs as many forwards as it has steps and gives a sample for each but the first, whose two predictions, of the
step and of the step before, are then there for any number of rungs; a sample alone would cost two. Three kinds take
turns. On "noised" courses the noisy latents are films with noise, one noise for all levels. On "sampled" courses the
solver leads through what the uniform model itself makes: that is where inference is while it spends all tokens. On
"merged" courses it leads on merged tokens behind the first step, at a rung: that is where inference is once it spends
fewer, with the deviations inside of tokens handed on from step to step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.model import WanModel
from cinecat.engines.stages import starting_noise
from cinecat.engines.training.cat.recipe import CatRecipe
from cinecat.engines.training.cat.two_paths import Given, TwoPaths
from cinecat.engines.training.film import HELD_OUT, make_clip
from cinecat.engines.training.latents import LatentSet, encode_films

Kind = Literal["noised", "sampled", "merged"]
KINDS: tuple[Kind, ...] = ("noised", "sampled", "merged")

_FIRST_SEED = 600_000
_FIRST_HELD_OUT = HELD_OUT + 600_000


@dataclass(frozen=True)
class TraceSpec:
    """One course.

    Attributes:
        seed: of the film and of the noise.
        rung: of the steps on merged tokens; 1.0 where there are none.
        style: fingerprint of what is worn; empty for none.
        bare: whether the prompt is empty.
    """

    seed: int
    width: int
    height: int
    frames: int
    steps: int
    kind: Kind
    rung: float
    style: str
    bare: bool


@dataclass(frozen=True)
class State:
    """A step of a course but the first, on the CPU, float32.

    Attributes:
        timestep: in the scheduler's units.
        noisy: latents before the step, [16, T, H, W].
        prediction: of the clean latents by the step before.
        target: the uniform model's prediction of them.
    """

    timestep: float
    noisy: Tensor
    prediction: Tensor
    target: Tensor


@dataclass(frozen=True)
class Trace:
    """A course on disk: safetensors, float16, of its steps but the first."""

    spec: TraceSpec
    path: Path

    def __len__(self) -> int:
        return self.spec.steps - 1

    def state(self, index: int) -> State:
        with safe_open(self.path, "pt") as file:
            noisy, prediction, target = (
                file.get_slice(name)[index].float() for name in ("noisy", "prediction", "target")
            )
            return State(float(file.get_tensor("timesteps")[index]), noisy, prediction, target)

    def given(self) -> Given:
        with safe_open(self.path, "pt") as file:
            return Given(
                _with_mask(file.get_tensor("given").float()), file.get_tensor("text"), file.get_tensor("image")
            )


def draw_specs(recipe: CatRecipe, styles: Sequence[str]) -> tuple[list[TraceSpec], list[TraceSpec]]:
    """The courses that are trained on, and those that are measured on.

    Sizes take turns, and of each size every other course wears a style, and of those and of the others the kinds take
    turns.
    """
    return _drawn(recipe, styles, _FIRST_SEED, recipe.films), _drawn(recipe, styles, _FIRST_HELD_OUT, recipe.held_out)


def _drawn(recipe: CatRecipe, styles: Sequence[str], first_seed: int, count: int) -> list[TraceSpec]:
    specs = []
    sizes, (fewest, most) = recipe.sizes, recipe.solver_steps
    for index in range(count):
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + first_seed + index)
        uniform, dropped = torch.rand(2, generator=draw).tolist()
        rung = int(torch.randint(len(recipe.rungs), (), generator=draw))
        turn, size = divmod(index, len(sizes))
        turn, styled = divmod(turn, 2)
        kind = KINDS[turn % len(KINDS)]
        specs.append(
            TraceSpec(
                seed=first_seed + index,
                width=sizes[size][0],
                height=sizes[size][1],
                frames=recipe.frames,
                steps=min(most, fewest + int((most - fewest + 1) * uniform**2)),
                kind=kind,
                rung=recipe.rungs[rung] if kind == "merged" else 1.0,
                style=styles[turn % len(styles)] if styled and styles else "",
                bare=dropped < recipe.prompt_dropout,
            )
        )
    return specs


def trace_of(spec: TraceSpec, fingerprint: str, folder: Path) -> Trace:
    """Where a course is kept: under everything that changes it.

    Args:
        fingerprint: of the model and of the dtype that it computes in.
    """
    key = hashlib.sha256(repr((spec, fingerprint)).encode()).hexdigest()
    return Trace(spec, folder / f"{key[:24]}.safetensors")


def make_traces(
    traces: Sequence[Trace], model: WanModel, paths: TwoPaths, moved: Callable[[int], None] = lambda done: None
) -> None:
    """Computes those courses that are not on disk.

    Args:
        paths: of the model's transformer.
        moved: told how many are done.
    """
    for done, trace in enumerate(traces, start=1):
        if not trace.path.exists():
            spec = trace.spec
            film = encode_films(
                model,
                lambda seed, spec=spec: [make_clip(seed, spec.frames, spec.height, spec.width)],  # type: ignore[misc]
                range(spec.seed, spec.seed + 1),
            )
            scheduler = model.new_scheduler(spec.steps)
            trace.path.parent.mkdir(parents=True, exist_ok=True)
            staging = trace.path.with_suffix(".tmp")
            save_file(run_course(spec, film, paths, scheduler), staging)
            staging.replace(trace.path)
        moved(done)


@torch.no_grad()
def run_course(spec: TraceSpec, film: LatentSet, paths: TwoPaths, scheduler: Any) -> dict[str, Tensor]:
    """A course as it is kept.

    Args:
        film: the one film of the spec's seed, encoded.
        scheduler: a fresh one, set to the spec's steps, on the CPU.

    Returns:
        noisy, prediction and target, float16 [steps - 1, 16, T, H, W]; timesteps, float32 [steps - 1]; given, text and
        image, of which `Trace.given` makes what the shot is made from.
    """
    text, count = (film.empty_text, film.empty_count) if spec.bare else (film.text[0], film.counts[0])
    kept = {"given": film.given[0].clone(), "text": text[: int(count)].float().clone(), "image": film.image[0].float()}
    given = Given(_with_mask(kept["given"].float()), kept["text"], kept["image"])
    clean = film.clean[0].float()
    noisy = noise = starting_noise(spec.seed, tuple(clean.shape), clean.device)
    prediction: Tensor | None = None
    rows = []
    for step, timestep in enumerate(scheduler.timesteps):
        level = float(timestep)
        sigma = level / 1000.0
        if spec.kind == "noised":
            noisy = (1.0 - sigma) * clean + sigma * noise
        target = paths.clean(noisy, level, given, spec.style).cpu()
        went = target
        if prediction is not None:
            rows.append({"noisy": noisy, "prediction": prediction, "target": target})
            if spec.kind == "merged":
                went = paths.clean(noisy, level, given, spec.style, prediction, spec.rung).cpu()
        prediction = went
        if spec.kind != "noised" and step + 1 < len(scheduler.timesteps):
            velocity = (noisy - went) / sigma
            noisy = scheduler.step(velocity[None], timestep, noisy[None], return_dict=False)[0][0]
    tensors = {name: torch.stack([row[name] for row in rows]).half() for name in rows[0]}
    return {**kept, **tensors, "timesteps": scheduler.timesteps[1:].float()}


def _with_mask(given: Tensor) -> Tensor:
    """The condition [20, T, H, W] of normalised latents of the first frame and grey [16, T, H, W]."""
    mask = given.new_zeros(VAE_TEMPORAL_STRIDE, *given.shape[1:])
    mask[:, 0] = 1.0
    return torch.cat([mask, given])
