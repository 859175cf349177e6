"""Engines beside diffusers on the same inputs: what `cinecat bench engines` runs side by side.

Two of ours take part. One is what serves: keys and values of prompt and image are computed once per request, and the
empty positions of the prompt share a few of them. The other (`FullContext`) has neither gain, and projects every
position of the padded prompt anew in every step, as diffusers does. The context is most of a small model's work and
little of a large one's: what the second gains, large models may gain too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cinecat.engines.backends.building import build_engine, open_store
from cinecat.engines.backends.choice import BACKENDS, TORCH, engine_key, engine_spec
from cinecat.engines.backends.contract import Backend, Engine
from cinecat.engines.backends.loading import size_buckets
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.backends.torch_eager import TorchEngine
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.context import Branch, ContextKeys
from cinecat.engines.core import EngineCore
from cinecat.engines.denoise import Denoiser, EngineBlocks, Merged
from cinecat.engines.errors import EngineError
from cinecat.engines.messages import VAE_TEMPORAL_STRIDE, CoreConfig, Shot
from cinecat.engines.model import load_transformer, pixel_stride, synchronize
from cinecat.engines.slots import NO_STYLE, StyleSlots, Worn
from cinecat.engines.stages import TEXT_TOKENS
from cinecat.engines.tokens.adaptive import price
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.schedule import rung_tokens
from cinecat.engines.wardrobe import CatAdapter, Wardrobe

DIFFUSERS = "diffusers"
UNIFORM = "uniform"
UNIFORM_FULL_CONTEXT = "uniform_full_context"
CAT = "cat_050"

_KEEP = 0.5
_WORDS = 10
"""Positions that the prompt of a step fills."""

_TIMESTEP = 500.0

Step = Callable[[], Tensor]
"""One forward of one row: velocities [1, 16, T, H, W]."""


@dataclass(frozen=True)
class FullContext(Branch):
    """A branch that is projected anew, every position for itself, whenever its keys are asked for.

    Attributes:
        embedder: diffusers' condition embedder.
        text_states: [1, 512, text_dim].
        image_states: [1, n, image_dim].
    """

    embedder: Any = field(kw_only=True)
    text_states: Tensor = field(kw_only=True)
    image_states: Tensor = field(kw_only=True)

    @classmethod
    def project(cls, embedder: Any, text: Tensor, image: Tensor) -> FullContext:
        plain = Branch.project(embedder, text, image)
        return cls(plain.image, plain.text, plain.padding, embedder=embedder, text_states=text, image_states=image)

    def keys(self, blocks: Any, slots: StyleSlots | None, worn: Worn) -> ContextKeys:
        image, text = self.embedder.image_embedder(self.image_states), self.embedder.text_embedder(self.text_states)
        return Branch(image, text, padding=0).keys(blocks, slots, worn)


class _FullContextDenoiser(Denoiser):
    @classmethod
    def of(cls, denoiser: Denoiser) -> _FullContextDenoiser:
        return cls(denoiser._transformer, denoiser._blocks)

    def project_context(self, text: Tensor, image: Tensor) -> Branch:
        return FullContext.project(self._transformer.condition_embedder, text, image)


class FullContextCore(EngineCore):
    """A core whose requests get no gain from their context."""

    def _denoiser_for(self, shot: Shot, grid: Grid) -> tuple[Denoiser, Engine]:
        denoiser, engine = super()._denoiser_for(shot, grid)
        return _FullContextDenoiser.of(denoiser), engine


@dataclass(frozen=True)
class BackendFacts:
    """A backend on this machine.

    Attributes:
        left_out: why it takes no part; empty where it does.
        build_seconds: that building its engine took, when it was built.
        size_bytes: of its engine.
    """

    name: str
    left_out: str = ""
    build_seconds: float | None = None
    size_bytes: int | None = None


class StepSides:
    """Single steps of a model on all its engines, and on diffusers' transformer.

    Attributes:
        facts: of all backends.
        engines: those that run here, by their backends.
    """

    def __init__(
        self, config: CoreConfig, reference: Any, backends: Sequence[str], announce: Callable[[str], object]
    ) -> None:
        """Loads the model, and every engine from the cache, where one that is missing is built first.

        Args:
            config: of a server; its engine does not matter.
            reference: diffusers' transformer of the same checkpoint, of the same dtype, on the same device.
            backends: names of those that take part where they can.
            announce: hears what is being built.

        Raises:
            ModelError: the model cannot be loaded here.
        """
        checkpoint = find_checkpoint(config.model)
        self._reference = reference
        self._transformer = load_transformer(checkpoint, config.device, config.dtype)
        transformer, self.device = self._transformer, self._transformer.device
        self._slots = StyleSlots(transformer.blocks, config.style_slots, config.max_rank, transformer.dtype)
        outfit = Wardrobe(self._slots, 0, CatAdapter.beside(checkpoint.folder)).dress((), merging=True)
        self._merged_worn = outfit.merged
        self._stride = pixel_stride(checkpoint)
        buckets = size_buckets(checkpoint, config.engine_sizes, transformer.config.patch_size[1])
        self._spec = engine_spec(
            checkpoint, checkpoint.fingerprint, transformer, config.style_slots, config.max_rank, buckets
        )
        self._stack = WanStack(transformer)
        self._store = open_store(config)
        self.facts: list[BackendFacts] = []
        self.engines: dict[str, Engine] = {}
        if TORCH in backends:
            self.engines[TORCH] = TorchEngine(self._stack)
            self.facts.append(BackendFacts(TORCH))
        for backend in BACKENDS:
            if backend.name in backends:
                self.facts.append(self._load(backend, config, announce))

    def _load(self, backend: Backend, config: CoreConfig, announce: Callable[[str], object]) -> BackendFacts:
        if problem := backend.missing(self.device):
            return BackendFacts(backend.name, left_out=problem)
        key = engine_key(backend, self._spec)
        try:
            if self._store.get(key) is None:
                announce(f"{backend.name}: building its engine, which takes minutes")
                own = replace(config, engine=backend.name)
                build_engine(own, lambda step: announce(f"{backend.name}: {step}"))
            files = self._store.get(key)
            if files is None:
                raise EngineError(f"{backend.name}: the engine that was built is not in the cache")
            self.engines[backend.name] = backend.load(self._stack, self._spec, files)
        except EngineError as error:
            return BackendFacts(backend.name, left_out=str(error))
        manifest, size = next(
            (entry.manifest, entry.size_bytes) for entry in self._store.entries() if entry.digest == key.digest
        )
        return BackendFacts(backend.name, "", manifest.build_seconds if manifest else None, size)

    @property
    def context_positions(self) -> int:
        """What diffusers' blocks attend to beside the clip: the padded prompt and the image's tokens."""
        return TEXT_TOKENS + self._spec.image_tokens

    def grid(self, width: int, height: int, frames: int) -> Grid:
        """The patches of a clip of a size in pixels; frames = 4k + 1."""
        patch = self._stride * self._transformer.config.patch_size[1]
        return Grid((frames - 1) // VAE_TEMPORAL_STRIDE + 1, height // patch, width // patch)

    @torch.inference_mode()
    def steps(self, width: int, height: int, frames: int) -> dict[str, Step]:
        """One step of one row of a clip of a size in pixels, by name: DIFFUSERS, and for every engine its name with
        UNIFORM, UNIFORM_FULL_CONTEXT and CAT after an underscore.

        A step is all between latents and velocities. One on merged tokens plans them too, and wears the model's adapter
        for them where there is one.
        """
        transformer, config = self._transformer, self._transformer.config
        grid = self.grid(width, height, frames)
        shape = (grid.frames, height // self._stride, width // self._stride)
        draw = torch.Generator().manual_seed(1)

        def noise(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=draw).to(self.device)

        channels = config.out_channels
        latents, condition = noise(1, channels, *shape), noise(1, config.in_channels - channels, *shape)
        text, image = noise(1, TEXT_TOKENS, config.text_dim), noise(1, self._spec.image_tokens, config.image_dim)
        text[:, _WORDS:] = 0.0
        text, image = text.to(transformer.dtype), image.to(transformer.dtype)
        timestep = torch.tensor(_TIMESTEP, device=self.device)
        clean, merged_tokens = noise(1, channels, *shape), rung_tokens(grid, _KEEP)

        def theirs() -> Tensor:
            velocity: Tensor = self._reference(
                hidden_states=torch.cat([latents, condition], dim=1).to(self._reference.dtype),
                timestep=timestep.expand(1),
                encoder_hidden_states=text,
                encoder_hidden_states_image=image,
                return_dict=False,
            )[0]
            return velocity

        def uniform(denoiser: Denoiser, branch: Branch) -> Step:
            return lambda: denoiser.velocities(latents, condition, timestep, (branch,), NO_STYLE)[0]

        def merged(denoiser: Denoiser, branch: Branch) -> Step:
            def step() -> Tensor:
                together = Merged(price(grid, clean).allocate(merged_tokens), clean)
                return denoiser.velocities(latents, condition, timestep, (branch,), self._merged_worn, together)[0]

            return step

        steps = {DIFFUSERS: theirs}
        for name, engine in self.engines.items():
            denoiser = Denoiser(transformer, EngineBlocks(transformer, engine, self._slots))
            branch = denoiser.project_context(text, image)
            steps[f"{name}_{UNIFORM}"] = uniform(denoiser, branch)
            full = FullContext.project(transformer.condition_embedder, text, image)
            steps[f"{name}_{UNIFORM_FULL_CONTEXT}"] = uniform(denoiser, full)
            steps[f"{name}_{CAT}"] = merged(denoiser, branch)
        return steps

    @torch.inference_mode()
    def seconds(self, step: Step, forwards: int) -> float:
        """Seconds of a step, the mean of some."""
        started = time.perf_counter()
        for _ in range(forwards):
            step()
        synchronize(self.device)
        return (time.perf_counter() - started) / forwards

    @torch.inference_mode()
    def differences(self, steps: Mapping[str, Step]) -> Iterator[tuple[str, float]]:
        """Of every step on uniform tokens: the largest difference to diffusers' velocities over their largest."""
        theirs = steps[DIFFUSERS]().float()
        for name, step in steps.items():
            if UNIFORM in name:
                yield name, float((step().float() - theirs).abs().max() / theirs.abs().max())


def run_clip(core: EngineCore, shot: Shot) -> tuple[Tensor, dict[str, float]]:
    """Makes a clip: frames float32 [frames, height, width, 3] in [0, 1], and the seconds of each stage.

    Raises:
        EngineError: a request fails.
    """
    frames: list[Tensor] = []
    conditioned = core.condition(shot)
    seconds = {timing.stage: timing.seconds for timing in conditioned.timings}
    seconds |= {"steps": 0.0, "decode": 0.0}
    for _ in range(shot.steps):
        seconds["steps"] += core.step((shot.job_id,)).seconds
    count = 0
    while count < shot.frames:
        decoded = core.decode(shot.job_id, frames.append)
        count += decoded.count
        seconds["decode"] += decoded.seconds
    core.release(shot.job_id)
    return torch.cat(frames), seconds
