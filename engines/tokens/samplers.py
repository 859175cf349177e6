"""Ways through a clip's steps, side by side: one loop, in which a policy says what each step does.

CAT is one policy; the others are what it has to beat at equal time, and run the uniform path. They share the model, the
solver, the seed and the arithmetic of a step; time counts planning too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cinecat.engines import stages
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.backends.torch_eager import TorchEngine
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.context import Branch
from cinecat.engines.denoise import Denoiser, EngineBlocks, Merged, guided, sigma_of
from cinecat.engines.model import WanModel, load_model, synchronize
from cinecat.engines.slots import StyleSlots, Worn
from cinecat.engines.step_cache import Remembered, velocity_towards
from cinecat.engines.tokens import path
from cinecat.engines.tokens.adaptive import AdaptiveTokens
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.rivals import Partition
from cinecat.engines.wardrobe import CatAdapter, Outfit, Wardrobe

Frames = NDArray[np.uint8]

_RANK = 32
"""Of a slot, as servers have it by default."""

_SLOTS = 3
"""For the CAT adapter, a style, and both together."""


@dataclass(frozen=True)
class Parts:
    """A loaded model and its denoiser, without requests.

    Attributes:
        outfit: what clips wear that wear no style: the CAT adapter in merged steps, where the model has one.
    """

    model: WanModel
    denoiser: Denoiser
    wardrobe: Wardrobe
    outfit: Outfit

    @classmethod
    def load(cls, name: str, device: str = "cpu", dtype: str = "float32") -> Parts:
        """Loads a model and its CAT adapter; arguments and errors as `load_model`."""
        checkpoint = find_checkpoint(name)
        model = load_model(checkpoint, device, dtype)
        slots = StyleSlots(model.transformer.blocks, _SLOTS, _RANK, model.dtype)
        wardrobe = Wardrobe(slots, 0, CatAdapter.beside(checkpoint.folder))
        blocks = EngineBlocks(model.transformer, TorchEngine(WanStack(model.transformer)), slots)
        denoiser = Denoiser(model.transformer, blocks)
        return cls(model, denoiser, wardrobe, wardrobe.dress((), merging=True))

    @property
    def has_adapter(self) -> bool:
        return self.outfit.merged != self.outfit.whole


@dataclass(frozen=True)
class Start:
    """What the steps of a clip begin with.

    Attributes:
        noise: [1, 16, T, H, W], float32.
        condition: [1, 20, T, H, W], float32.
        branches: the prompt's, then with guidance the empty prompt's.
        outfit: what its steps wear.
        coarse: the condition of the image at half its size, [1, 20, T, H / 2, W / 2]; None where no step needs it.
        seconds: that encoding took, `coarse` aside.
    """

    noise: Tensor
    condition: Tensor
    branches: tuple[Branch, ...]
    guidance_scale: float
    outfit: Outfit
    coarse: Tensor | None = None
    seconds: float = 0.0

    @property
    def grid(self) -> Grid:
        frames, height, width = self.noise.shape[2:]
        return Grid(frames, height // path.PATCH, width // path.PATCH)


@torch.inference_mode()
def begin(
    parts: Parts,
    image: Frames,
    prompt: str,
    frames: int,
    guidance_scale: float,
    seed: int,
    outfit: Outfit | None = None,
) -> Start:
    """Encodes an image uint8 [height, width, 3] and a prompt, and draws the noise, as a request for them would be.

    Args:
        outfit: of the parts' wardrobe; None for no style.
    """
    model, started = parts.model, time.perf_counter()
    prompts = [prompt, ""] if guidance_scale > 1.0 else [prompt]
    states = stages.encode_image(model, image)
    branches = tuple(parts.denoiser.project_context(stages.encode_text(model, text), states) for text in prompts)
    condition = stages.encode_condition(model.vae, image, frames)
    noise = stages.starting_noise(seed, (1, model.vae.config.z_dim, *condition.shape[2:]), model.device)
    synchronize(model.device)
    seconds = time.perf_counter() - started
    coarse = None
    if all(side % (2 * path.PATCH) == 0 for side in condition.shape[3:]):
        coarse = stages.encode_condition(model.vae, resized(image, image.shape[0] // 2, image.shape[1] // 2), frames)
    return Start(noise, condition, branches, guidance_scale, outfit or parts.outfit, coarse, seconds)


@torch.inference_mode()
def begin_smaller(parts: Parts, start: Start, image: Frames, frames: int, height: int, width: int) -> Start:
    """The same clip at a smaller size, in pixels: its noise is the low band of the larger one's."""
    started = time.perf_counter()
    condition = stages.encode_condition(parts.model.vae, resized(image, height, width), frames)
    noise = _low_band(start.noise, condition.shape[3], condition.shape[4])
    seconds = time.perf_counter() - started
    return replace(start, noise=noise, condition=condition, coarse=None, seconds=seconds)


def resized(image: Frames, height: int, width: int) -> Frames:
    """An image uint8 [h, w, 3] at another size, by Lanczos."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Forward:
    """Run the model.

    Attributes:
        merged: shares tokens between patches; None gives each its own.
        coarse: at half the width and height. Steps that do come before all others.
        adapted: whether merged tokens wear the model's adapter.
    """

    merged: Merged | None = None
    coarse: bool = False
    adapted: bool = False


@dataclass(frozen=True)
class Reuse:
    """Take a clean prediction that there is, [1, 16, T, H, W], and run nothing."""

    clean: Tensor


class Policy(Protocol):
    """Decides about the steps of one clip, in order."""

    def decide(self, step: int, sigma: float) -> Forward | Reuse: ...

    def observe(self, latents: Tensor, velocity: Tensor, sigma: float, tokens: int) -> None:
        """Learns from a step that is done: latents before it [1, 16, T, H, W], its velocity and what it spent."""


@dataclass(frozen=True)
class Sampled:
    """Final latents [1, 16, T, H, W], the tokens of every step, and the seconds of all."""

    latents: Tensor
    tokens: tuple[int, ...]
    seconds: float


@torch.inference_mode()
def sample(parts: Parts, start: Start, steps: int, policy: Policy) -> Sampled:
    """Denoises a clip.

    Raises:
        ValueError: the policy wants coarse steps, and the clip's sides do not halve into whole patches.
    """
    scheduler = parts.model.new_scheduler(steps)
    latents, spent = start.noise, list[int]()
    clean: Tensor | None = None
    started = time.perf_counter()
    for step, timestep in enumerate(scheduler.timesteps):
        sigma = sigma_of(timestep)
        decision = policy.decide(step, sigma)
        if isinstance(decision, Reuse):
            velocity, tokens = velocity_towards(decision.clean, latents, sigma), 0
        else:
            if decision.coarse and step == 0:
                latents = _low_band(start.noise, start.noise.shape[3] // 2, start.noise.shape[4] // 2)
            elif not decision.coarse and clean is not None and clean.shape != start.noise.shape:
                latents = _grown(latents, clean, start.noise, sigma)
                _grow_history(scheduler, start.noise)
            merged = decision.merged
            condition = start.coarse if decision.coarse else start.condition
            if condition is None:
                raise ValueError("frames: their sides are no multiples of two patches, so they have no half size")
            worn = start.outfit.merged if merged and decision.adapted else start.outfit.whole
            velocity = _velocity(parts, start, latents, condition, timestep, worn, merged)
            tokens = merged.plan.tokens if merged else latents[0, 0].numel() // path.PATCH**2
        clean = latents - sigma * velocity
        policy.observe(latents, velocity, sigma, tokens)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        spent.append(tokens)
    synchronize(parts.model.device)
    return Sampled(latents, tuple(spent), time.perf_counter() - started)


def _velocity(
    parts: Parts,
    start: Start,
    latents: Tensor,
    condition: Tensor,
    timestep: Tensor,
    worn: Worn,
    merged: Merged | None,
) -> Tensor:
    found = parts.denoiser.velocities(latents, condition, timestep, start.branches, worn, merged)
    return guided(found, start.guidance_scale)


@torch.inference_mode()
def decode(parts: Parts, latents: Tensor) -> Frames:
    """Frames uint8 [frames, height, width, 3] of final latents."""
    decoder = stages.ClipDecoder.start(parts.model.vae, latents)
    chunks = []
    while decoder.frame < decoder.total_frames:
        chunks.append(decoder.next_frames())
    frames: Frames = (torch.cat(chunks) * 255.0).round().to(torch.uint8).cpu().numpy()
    return frames


@dataclass
class Uniform:
    """Every step at full tokens: the reference, and with fewer steps or at a smaller size a rival."""

    def decide(self, step: int, sigma: float) -> Forward | Reuse:
        return Forward()

    def observe(self, latents: Tensor, velocity: Tensor, sigma: float, tokens: int) -> None:
        pass


@dataclass
class ContentAdaptive:
    """CAT, as requests get it.

    Attributes:
        partition: puts another partition of as many tokens in the place of ours.
        adapted: whether merged tokens wear the model's adapter, where it has one.
    """

    tokens: AdaptiveTokens
    partition: Partition | None = None
    adapted: bool = True
    _seen: Remembered = field(default_factory=Remembered)

    def decide(self, step: int, sigma: float) -> Forward | Reuse:
        if not self.tokens.merges:
            return Forward()
        expected = self._seen.carried_on(sigma)
        plan = self.tokens.plan(expected)
        if plan is None:
            return Forward()
        if self.partition is not None:
            plan = self.partition(plan.grid, path.to_patches(expected)[0], plan.tokens)
        return Forward(Merged(plan, expected), adapted=self.adapted)

    def observe(self, latents: Tensor, velocity: Tensor, sigma: float, tokens: int) -> None:
        if tokens == self.tokens.grid.count:
            self._seen = self._seen.with_step(sigma, latents - sigma * velocity)
        self.tokens.observe(self._seen.last, tokens)


@dataclass
class StepCache:
    """Some steps run, the others reuse what the last one that ran predicted.

    On wan-tiny "change" is the better one by 2 to 6 dB, so that is how it competes.

    Attributes:
        runs: steps that run; the first does.
        reuse: "clean" takes the last clean prediction as it is; "change" carries on, in sigma, how the last two differ.
    """

    runs: frozenset[int]
    reuse: Literal["clean", "change"] = "change"
    _seen: Remembered = field(default_factory=Remembered)

    def decide(self, step: int, sigma: float) -> Forward | Reuse:
        if step in self.runs or not self._seen.predictions:
            return Forward()
        return Reuse(self._seen.last if self.reuse == "clean" else self._seen.carried_on(sigma))

    def observe(self, latents: Tensor, velocity: Tensor, sigma: float, tokens: int) -> None:
        if tokens:
            self._seen = self._seen.with_step(sigma, latents - sigma * velocity)


@dataclass
class Progressive:
    """Progressive resolution: early steps at half the width and height, then grown (after arXiv 2605.18736).

    The clean prediction is grown in its spectrum and noised again: its low band gets the noise that is there, its high
    band that of the starting noise.

    Attributes:
        coarse_steps: how many steps are coarse.
    """

    coarse_steps: int

    def decide(self, step: int, sigma: float) -> Forward | Reuse:
        return Forward(coarse=step < self.coarse_steps)

    def observe(self, latents: Tensor, velocity: Tensor, sigma: float, tokens: int) -> None:
        pass


def _grown(latents: Tensor, clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Coarse latents at the size of the starting noise, at the same noise level."""
    coarse_noise = (latents - (1.0 - sigma) * clean) / sigma
    height, width = latents.shape[3:]
    low = coarse_noise - _low_band(noise, height, width)
    return (1.0 - sigma) * _grown_content(clean, noise) + sigma * (noise + _from_low_band(low, *noise.shape[3:]))


def _grown_content(content: Tensor, like: Tensor) -> Tensor:
    """Content keeps its amplitude where noise keeps its variance: each halved axis is worth a factor of sqrt(2)."""
    factor = (like[0, 0, 0].numel() / content[0, 0, 0].numel()) ** 0.5
    grown: Tensor = factor * _from_low_band(content, *like.shape[3:])
    return grown


def _grow_history(scheduler: object, like: Tensor) -> None:
    """Brings a multistep solver's past clean predictions to the size of `like`; its last sample is let go."""
    outputs = getattr(scheduler, "model_outputs", None)
    if outputs is None:
        return
    grown = [output if output is None else _grown_content(output, like) for output in outputs]
    scheduler.model_outputs = grown  # type: ignore[attr-defined]
    if hasattr(scheduler, "last_sample"):
        scheduler.last_sample = None


def _low_band(values: Tensor, height: int, width: int) -> Tensor:
    """The lowest frequencies along the last two axes, [..., height, width]; white noise stays white, as strong."""
    down, across = _band(height, values.shape[-2]), _band(width, values.shape[-1])
    return down.to(values) @ values @ across.to(values).T


def _from_low_band(values: Tensor, height: int, width: int) -> Tensor:
    """Undoes `_low_band`, with nothing above the band."""
    down, across = _band(values.shape[-2], height), _band(values.shape[-1], width)
    return down.to(values).T @ values @ across.to(values)


@lru_cache(maxsize=32)
def _band(few: int, many: int) -> Tensor:
    """float64 [few, many], orthonormal rows: to `many` cosines, of which the lowest are `few` samples' cosines."""
    return _cosines(few).T @ _cosines(many)[:few]


def _cosines(count: int) -> Tensor:
    """The orthonormal DCT-II, float64 [count, count], a frequency a row."""
    frequency = torch.arange(count, dtype=torch.float64)[:, None]
    place = torch.arange(count, dtype=torch.float64)[None] + 0.5
    rows: Tensor = (torch.pi / count * frequency * place).cos() * (2.0 / count) ** 0.5
    rows[0] /= 2.0**0.5
    return rows


PolicyOf = Callable[[Grid, int], Policy]
"""Makes the policy of one clip from its grid and its steps."""


def adaptive(keep_ratio: float, partition: Partition | None = None, adapted: bool = True) -> PolicyOf:
    """CAT at a keep ratio, or a rival partition at its budgets."""
    return lambda grid, steps: ContentAdaptive(AdaptiveTokens(grid, steps, keep_ratio), partition, adapted)
