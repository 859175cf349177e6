"""The engine core: requests as small states, moved on by one call at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cinecat.engines import stages
from cinecat.engines.backends.contract import Engine
from cinecat.engines.backends.loading import served_spec
from cinecat.engines.backends.source import EngineSource
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.cache import ContentCache
from cinecat.engines.checkpoint import Checkpoint
from cinecat.engines.context import Branch
from cinecat.engines.denoise import Denoiser, EngineBlocks, Merged, guided
from cinecat.engines.errors import EngineError
from cinecat.engines.memory import check_slots_fit, slot_memory
from cinecat.engines.messages import (
    VAE_TEMPORAL_STRIDE,
    Conditioned,
    CoreConfig,
    Decoded,
    ModelInfo,
    Notice,
    RequestStepped,
    ResidentStyle,
    Saved,
    Shot,
    StageTime,
    Stepped,
    StepShape,
    StyleUse,
)
from cinecat.engines.model import WanModel, load_model, synchronize
from cinecat.engines.placement import checked, on_device, place, storage_note
from cinecat.engines.slots import StyleSlots, other_targets
from cinecat.engines.tokens.adaptive import AdaptiveTokens
from cinecat.engines.tokens.budget import step_tokens
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.schedule import RUNGS, rung_tokens
from cinecat.engines.vae_tiles import Tiling
from cinecat.engines.variants import Variant, fuse_variant
from cinecat.engines.wardrobe import CatAdapter, Outfit, Wardrobe


@dataclass
class _Request:
    """What one request is between two calls."""

    latents: Tensor  # [1, 16, latent frames, height / 8, width / 8], float32
    condition: Tensor  # [1, 20, latent frames, height / 8, width / 8], float32
    branches: tuple[Branch, ...]  # the prompt's, then with guidance the negative prompt's
    guidance_scale: float
    scheduler: Any
    timesteps: Tensor  # the scheduler's, on the CPU: reading one must not wait for the device
    denoiser: Denoiser
    outfit: Outfit
    grid: Grid
    tiling: Tiling  # of the VAE's frames
    tokens: AdaptiveTokens | None  # None on the uniform path
    step: int = 0
    decoder: stages.ClipDecoder | None = field(default=None)


class EngineCore:
    """A loaded model and the requests in it. Not thread-safe: one caller, one call at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: CoreConfig,
        variant: Variant | None = None,
        announce: Callable[[Notice], object] = lambda notice: None,
    ) -> None:
        """Loads the model.

        Args:
            variant: what is fused into it.
            announce: hears what happens meanwhile.

        Raises:
            ModelError: it cannot be served here.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        config = checked(config)
        self._model = load_model(
            checkpoint,
            config.device,
            config.dtype,
            encoders_on_host=config.offload != "none",
            transformer_on_host=config.offload == "blocks" or config.storage_dtype != "none",
        )
        parameters, weights_bytes = _size(self._model)
        transformer = self._model.transformer
        if variant is not None:
            announce(fuse_variant(transformer, variant))
        memory = slot_memory(self._model, config)
        announce(memory)
        check_slots_fit(memory)
        others = other_targets(transformer)
        slots = StyleSlots(
            transformer.blocks, config.style_slots, config.max_rank, self._model.dtype, others, self._model.device
        )
        fingerprint = variant.fingerprint(checkpoint.fingerprint) if variant else checkpoint.fingerprint
        spec = served_spec(checkpoint, fingerprint, transformer, config)
        self._slots = slots
        stack = WanStack(transformer)
        place(transformer, stack, self._model.device, config.offload, config.storage_dtype)
        self._storage_note = storage_note(config.storage_dtype)
        self._engines = EngineSource(stack, spec, config)
        for news in self._engines.news():
            announce(news)
        self._denoisers: dict[Engine, Denoiser] = {}
        self._cache: ContentCache[Tensor] = ContentCache(config.cache_bytes, lambda tensor: tensor.nbytes)
        adapter = CatAdapter.beside(checkpoint.folder) if variant is None else None
        self._wardrobe = Wardrobe(slots, config.style_cache_bytes, adapter)
        self._requests: dict[str, _Request] = {}
        positions = transformer.config.rope_max_seq_len
        self.model_info = ModelInfo(
            name=f"{checkpoint.name}+{variant.name}" if variant else checkpoint.name,
            family=checkpoint.family,
            fingerprint=fingerprint,
            device=str(self._model.device),
            dtype=str(self._model.dtype).removeprefix("torch."),
            engine=self._engines.current().name,
            parameters=parameters,
            weights_bytes=weights_bytes,
            size_multiple=self._pixel_stride * transformer.config.patch_size[1],
            max_frames=(positions - 1) * VAE_TEMPORAL_STRIDE + 1,
            max_size=positions * self._pixel_stride * transformer.config.patch_size[1],
            max_rank=config.max_rank,
            style_targets=dict(slots.targets),
            shift=self._model.shift,
            other_targets=others,
            variant=variant.name if variant else "",
            buckets=self._engines.only_buckets,
        )

    def _denoiser_for(self, shot: Shot, grid: Grid) -> tuple[Denoiser, str]:
        """The denoiser of a request, and its engine's name. Raises EngineError when no engine takes its shapes."""
        if shot.cat is None:
            counts: tuple[int, ...] = (grid.count,)
        elif shot.cat.keep_ratio is not None:
            counts = step_tokens(grid, shot.steps, shot.cat.keep_ratio)
        else:
            counts = tuple(rung_tokens(grid, rung) for rung in RUNGS)
        engine = self._engines.engine_for(counts)
        denoiser = self._denoisers.get(engine)
        if denoiser is None:
            transformer = self._model.transformer
            denoiser = Denoiser(transformer, EngineBlocks(transformer, engine, self._slots))
            self._denoisers[engine] = denoiser
        return denoiser, engine.name

    def _grid(self, shot: Shot) -> Grid:
        height, width = shot.image.shape[:2]
        multiple = self.model_info.size_multiple
        return Grid((shot.frames - 1) // VAE_TEMPORAL_STRIDE + 1, height // multiple, width // multiple)

    @property
    def _pixel_stride(self) -> int:
        """Pixels per latent, along width and height."""
        return int(self._model.vae.config.scale_factor_spatial)

    @torch.inference_mode()
    def condition(self, shot: Shot) -> Conditioned:
        """Makes a request's styles resident, encodes its inputs and draws its noise.

        Raises:
            NoFreeSlot: running requests wear all slots; nothing was encoded.
            EngineError: its styles cannot be worn.
        """
        self.release(shot.job_id)
        outfit = self._wardrobe.dress(shot.styles, merging=shot.cat is not None)
        try:
            return self._condition(shot, outfit)
        except BaseException:
            self._wardrobe.undress(outfit)
            raise

    def _condition(self, shot: Shot, outfit: Outfit) -> Conditioned:
        model, clock = self._model, _Clock(self._model.device)
        grid = self._grid(shot)
        tiling = stages.vae_tiling(model.vae, *shot.image.shape[:2])
        denoiser, engine = self._denoiser_for(shot, grid)
        guided = shot.guidance_scale > 1.0
        prompts = [shot.prompt, shot.negative_prompt] if guided else [shot.prompt]
        image_key = hashlib.sha256(shot.image.tobytes()).digest(), shot.image.shape
        texts = clock.time(
            "text_encode",
            lambda: [
                self._cache.get(("text", prompt), lambda prompt=prompt: self._encode_text(prompt))  # type: ignore[misc]
                for prompt in prompts
            ],
        )
        image = clock.time(
            "image_encode",
            lambda: [self._cache.get(("image", image_key), lambda: self._encode_image(shot.image))],
        )[0]
        condition = clock.time(
            "vae_encode",
            lambda: [
                self._cache.get(
                    ("condition", image_key, shot.frames, tiling),
                    lambda: stages.encode_condition(model.vae, shot.image, shot.frames, tiling),
                )
            ],
        )[0]
        latent_shape = (1, model.vae.config.z_dim, *condition.shape[2:])
        scheduler = model.new_scheduler(shot.steps, shot.shift)
        notes = tuple(note for note in (outfit.note, tiling.note, self._storage_note) if note)
        if stages.prompt_is_truncated(model, shot.prompt):
            notes += (f"prompt: cut after {stages.TEXT_TOKENS} tokens, which is all that the text encoder reads",)
        self._requests[shot.job_id] = _Request(
            latents=stages.starting_noise(shot.seed, latent_shape, model.device),
            condition=condition,
            branches=tuple(denoiser.project_context(text, image) for text in texts),
            guidance_scale=shot.guidance_scale,
            scheduler=scheduler,
            timesteps=scheduler.timesteps.cpu(),
            denoiser=denoiser,
            outfit=outfit,
            grid=grid,
            tiling=tiling,
            tokens=AdaptiveTokens.of(shot.cat, grid, len(scheduler.timesteps)) if shot.cat else None,
        )
        return Conditioned(
            tuple(clock.timings),
            grid.count,
            notes,
            self.residency(),
            engine,
            self._engines.news(),
            rows=len(self._requests[shot.job_id].branches),
            next=self._next(self._requests[shot.job_id]),
        )

    def _encode_text(self, prompt: str) -> Tensor:
        with on_device(self._model.text_encoder, self._model.device):
            return stages.encode_text(self._model, prompt)

    def _encode_image(self, image: NDArray[np.uint8]) -> Tensor:
        with on_device(self._model.image_encoder, self._model.device):
            return stages.encode_image(self._model, image)

    def save(self, job_id: str, path: Path) -> Saved:
        raise EngineError(f"job {job_id}: {path} cannot be written")

    def steps(self, job_ids: tuple[str, ...]) -> Stepped:
        started = time.perf_counter()
        stepped = tuple(map(self.step, job_ids))
        return Stepped(time.perf_counter() - started, stepped)

    def _next(self, request: _Request) -> StepShape | None:
        if request.step >= len(request.timesteps):
            return None
        return StepShape("torch", request.grid.count)

    @torch.inference_mode()
    def step(self, job_id: str) -> RequestStepped:
        """Runs the next denoising step.

        Raises:
            EngineError: the request is unknown, has done all its steps, or came out as NaN or infinity.
        """
        request = self._request(job_id)
        timesteps = request.timesteps
        if request.step >= len(timesteps):
            raise EngineError(f"job {job_id} has done all its {len(timesteps)} steps")
        tokens = request.tokens
        planned = tokens.seconds if tokens else 0.0
        timestep = timesteps[request.step]
        velocity, spent = self._velocity(request, timestep)
        if tokens is not None:
            tokens.observe(request.latents, velocity, float(timestep) / 1000.0, spent)
        request.latents = request.scheduler.step(velocity, timestep, request.latents, return_dict=False)[0]
        if not torch.isfinite(request.latents).all():
            raise EngineError(
                f"step {request.step + 1} gave NaN or infinity; lower the strengths or the guidance, or wear less"
            )
        request.step += 1
        synchronize(self._model.device)
        next = self._next(request)
        if tokens is None:
            return RequestStepped(job_id, request.step, len(timesteps), spent, next=next)
        return RequestStepped(
            job_id, request.step, len(timesteps), spent, tokens.seconds - planned, tokens.keep_ratio, next
        )

    def _velocity(self, request: _Request, timestep: Tensor) -> tuple[Tensor, int]:
        """The guided velocity of the coming step, and the tokens of each forward."""
        tokens, merged, worn = request.tokens, None, request.outfit.whole
        if tokens is not None and (plan := tokens.plan()) is not None and tokens.prediction is not None:
            merged, worn = Merged(plan, tokens.prediction), request.outfit.merged
        velocities = request.denoiser.velocities(
            request.latents, request.condition, timestep, request.branches, worn, merged
        )
        velocity = guided(velocities, request.guidance_scale)
        return velocity, request.grid.count if merged is None else merged.plan.tokens

    @torch.inference_mode()
    def decode(self, job_id: str, write: Callable[[Tensor], None]) -> Decoded:
        """Decodes the next latent frame and hands its frames, float32 [count, height, width, 3] in [0, 1], to `write`.

        Raises:
            EngineError: the request is unknown, has steps left, or is decoded to its end.
        """
        request = self._request(job_id)
        if request.step < len(request.scheduler.timesteps):
            raise EngineError(f"job {job_id} has {len(request.scheduler.timesteps) - request.step} steps left")
        started = time.perf_counter()
        if request.decoder is None:
            request.decoder = stages.ClipDecoder.start(self._model.vae, request.latents, request.tiling)
        decoder = request.decoder
        if decoder.frame >= decoder.total_frames:
            raise EngineError(f"job {job_id} has decoded all its {decoder.total_frames} frames")
        first = decoder.frame
        frames = decoder.next_frames()
        write(frames)
        return Decoded(first, decoder.frame - first, decoder.total_frames, time.perf_counter() - started)

    def release(self, job_id: str) -> None:
        """Frees a request, if it is known."""
        request = self._requests.pop(job_id, None)
        if request is not None:
            self._wardrobe.undress(request.outfit)

    @torch.inference_mode()
    def warm(self, style: StyleUse) -> None:
        """Makes a style resident, so that the next request that wears it reads no file.

        Raises:
            NoFreeSlot: running requests wear all slots.
            EngineError: it cannot be worn.
        """
        self._wardrobe.warm(style)

    def residency(self) -> tuple[ResidentStyle, ...]:
        """What is in the slots, least recently used first."""
        return self._wardrobe.residency()

    def _request(self, job_id: str) -> _Request:
        request = self._requests.get(job_id)
        if request is None:
            raise EngineError(f"job {job_id} is not in the engine core")
        return request


class _Clock:
    """Times stages whose work comes from the content cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.timings: list[StageTime] = []

    def time(self, stage: str, work: Callable[[], list[tuple[Tensor, bool]]]) -> list[Tensor]:
        started = time.perf_counter()
        results = work()
        synchronize(self._device)
        cached = all(known for _, known in results)
        self.timings.append(StageTime(stage, time.perf_counter() - started, cached))
        return [tensor for tensor, _ in results]


def _size(model: WanModel) -> tuple[int, int]:
    parameters = [p for module in model.modules for p in module.parameters()]
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
