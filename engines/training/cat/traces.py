"""What the uniform model predicts along courses of denoising, computed once and kept on disk.

A course costs as many forwards as it has steps. Some of its steps are whole, spread as inference spreads them; each of
the others gives a sample for any number of rungs: what is expected of it, carried on from the whole ones before, and
what the uniform model predicts. Three kinds take turns. On "noised" courses the noisy latents are films with noise, one
noise for all levels. On "sampled" courses the solver leads through what the uniform model itself makes. On "merged"
courses it leads on merged tokens wherever steps are not whole: that is where inference is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cinecat.engines import stages
from cinecat.engines.model import WanEncoders, WanModel
from cinecat.engines.stages import starting_noise
from cinecat.engines.step_cache import Remembered
from cinecat.engines.tokens.schedule import spread_steps
from cinecat.engines.training.cat.recipe import CatRecipe
from cinecat.engines.training.cat.two_paths import Given, TwoPaths
from cinecat.engines.training.film import HELD_OUT, make_clip
from cinecat.engines.training.vae import encode, to_video

Kind = Literal["noised", "sampled", "merged"]
KINDS: tuple[Kind, ...] = ("noised", "sampled", "merged")

_FIRST_SEED = 600_000
_FIRST_HELD_OUT = HELD_OUT + 600_000


@dataclass(frozen=True)
class TraceSpec:
    """One course.

    Attributes:
        seed: of the film and of the noise.
        whole: how many of its steps are.
        rung: of the steps on merged tokens; 1.0 where there are none.
        style: fingerprint of what is worn; empty for none.
        bare: whether the prompt is empty.
    """

    seed: int
    width: int
    height: int
    frames: int
    steps: int
    whole: int
    kind: Kind
    rung: float
    style: str
    bare: bool


@dataclass(frozen=True)
class Film:
    """An encoded film.

    Attributes:
        clean: its own normalised latents [16, T, H, W], float32, where a course is to begin with them.
    """

    given: Given
    clean: Tensor | None = None


@dataclass(frozen=True)
class State:
    """A step of a course that is not whole, on the CPU, float32.

    Attributes:
        timestep: in the scheduler's units.
        noisy: latents before the step, [16, T, H, W].
        prediction: of the clean latents, carried on from whole steps before.
        target: the uniform model's prediction of them.
    """

    timestep: float
    noisy: Tensor
    prediction: Tensor
    target: Tensor


@dataclass(frozen=True)
class Trace:
    """A course on disk: safetensors, float16, of those of its steps that are not whole."""

    spec: TraceSpec
    path: Path

    def __len__(self) -> int:
        return self.spec.steps - self.spec.whole

    def state(self, index: int) -> State:
        with safe_open(self.path, "pt") as file:
            noisy, prediction, target = (
                file.get_slice(name)[index].float() for name in ("noisy", "prediction", "target")
            )
            return State(float(file.get_tensor("timesteps")[index]), noisy, prediction, target)

    def given(self) -> Given:
        with safe_open(self.path, "pt") as file:
            condition, text, image = (file.get_tensor(name) for name in ("condition", "text", "image"))
            return Given(condition.float(), text, image)


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
        uniform, dropped, share = torch.rand(3, generator=draw).tolist()
        rung = int(torch.randint(len(recipe.rungs), (), generator=draw))
        turn, size = divmod(index, len(sizes))
        turn, styled = divmod(turn, 2)
        kind = KINDS[turn % len(KINDS)]
        steps = min(most, fewest + int((most - fewest + 1) * uniform**2))
        least, top = recipe.whole_steps
        specs.append(
            TraceSpec(
                seed=first_seed + index,
                width=sizes[size][0],
                height=sizes[size][1],
                frames=recipe.frames,
                steps=steps,
                whole=min(steps - 1, max(1, round(steps * (least + (top - least) * share)))),
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
            scheduler = model.new_scheduler(spec.steps)
            trace.path.parent.mkdir(parents=True, exist_ok=True)
            staging = trace.path.with_suffix(".tmp")
            save_file(run_course(spec, encode_film(model, spec), paths, scheduler), staging)
            staging.replace(trace.path)
        moved(done)


@torch.no_grad()
def encode_film(model: WanEncoders, spec: TraceSpec) -> Film:
    """The film of a spec as the engine conditions on it; its own latents only where its course begins with them."""
    clip = make_clip(spec.seed, spec.frames, spec.height, spec.width)
    condition = stages.encode_condition(model.vae, clip.first_frame, spec.frames)[0]
    padded = stages.encode_text(model, "" if spec.bare else clip.caption)[0]
    words = int(padded.abs().sum(dim=1).nonzero().max()) + 1
    given = Given(condition, padded[:words].clone(), stages.encode_image(model, clip.first_frame)[0])
    if spec.kind != "noised":
        return Film(given)
    video = to_video(clip.frames)[None]
    mean, inverse_std = stages.latent_statistics(model.vae, video)
    return Film(given, ((encode(model.vae, video) - mean) * inverse_std)[0].float())


@torch.no_grad()
def run_course(spec: TraceSpec, film: Film, paths: TwoPaths, scheduler: Any) -> dict[str, Tensor]:
    """A course as it is kept.

    Args:
        film: of the spec's seed.
        scheduler: a fresh one, set to the spec's steps, on the CPU.

    Returns:
        noisy, prediction and target, float16 [steps - whole, 16, T, H, W]; timesteps, float32 [steps - whole];
        condition, text and image, of which `Trace.given` makes what the shot is made from.
    """
    # The teacher sees what the student will: what float16 has left.
    condition = film.given.condition.half()
    given = replace(film.given, condition=condition.float())
    noisy = noise = starting_noise(spec.seed, (16, *condition.shape[1:]), condition.device)
    whole, remembered = spread_steps(spec.steps, spec.whole), Remembered()
    rows, levels = [], []
    for step, timestep in enumerate(scheduler.timesteps):
        level = float(timestep)
        sigma = level / 1000.0
        if film.clean is not None:
            noisy = (1.0 - sigma) * film.clean + sigma * noise
        target = paths.clean(noisy, level, given, spec.style).cpu()
        went = target
        if step in whole:
            remembered = remembered.with_step(sigma, target)
        else:
            expected = remembered.carried_on(sigma)
            rows.append({"noisy": noisy, "prediction": expected, "target": target})
            levels.append(level)
            if spec.kind == "merged":
                went = paths.clean(noisy, level, given, spec.style, expected, spec.rung).cpu()
        if film.clean is None and step + 1 < len(scheduler.timesteps):
            velocity = (noisy - went) / sigma
            noisy = scheduler.step(velocity[None], timestep, noisy[None], return_dict=False)[0][0]
    return {
        "condition": condition,
        "text": given.text,
        "image": given.image,
        "timesteps": torch.tensor(levels),
        **{name: torch.stack([row[name] for row in rows]).half() for name in rows[0]},
    }
