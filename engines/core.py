"""The engine core: requests as small states, moved on by one call at a time."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence, Set
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cinecat.engines import resume, stages
from cinecat.engines.backends.contract import Engine
from cinecat.engines.backends.loading import served_spec
from cinecat.engines.backends.source import EngineSource
from cinecat.engines.backends.stack import WanStack, attention
from cinecat.engines.cache import ContentCache
from cinecat.engines.checkpoint import Checkpoint
from cinecat.engines.denoise import Denoiser, EngineBlocks, forward_rows, guided
from cinecat.engines.errors import EngineError
from cinecat.engines.memory import available_bytes, check_slots_fit, core_memory, slot_memory
from cinecat.engines.messages import (
    VAE_TEMPORAL_STRIDE,
    Conditioned,
    CoreConfig,
    Decoded,
    Failure,
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
    Warmed,
)
from cinecat.engines.model import WanModel, load_model, synchronize
from cinecat.engines.placement import checked, on_device, on_host, place, storage_note
from cinecat.engines.previews import Palette
from cinecat.engines.request import Request
from cinecat.engines.sharding.choice import for_ranks, layout_of
from cinecat.engines.sharding.leader import Leader
from cinecat.engines.slots import StyleSlots, other_targets
from cinecat.engines.tokens.adaptive import AdaptiveTokens
from cinecat.engines.tokens.budget import step_tokens
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.schedule import RUNGS, rung_tokens, spread_steps
from cinecat.engines.variants import Variant, fuse_variant
from cinecat.engines.wardrobe import CatAdapter, Outfit, Wardrobe


class EngineCore:
    """A loaded model and the requests in it. Not thread-safe: one caller, one call at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: CoreConfig,
        variant: Variant | None = None,
        announce: Callable[[Notice], object] = lambda notice: None,
        lost: Callable[[Failure | None], None] = lambda words: os._exit(1),
    ) -> None:
        """Loads the model.

        Args:
            variant: what is fused into it.
            announce: hears what happens meanwhile.
            lost: hears, in another thread, that a rank is gone, and what it had to say; must end this process.

        Raises:
            ModelError: it cannot be served here.
        """
        layout = layout_of(checkpoint, config)
        config = for_ranks(checkpoint, checked(config, layout.ranks > 1), layout)
        if config.threads:
            torch.set_num_threads(config.threads)
        self._ranks = Leader(config, layout) if layout.ranks > 1 else None
        try:
            self._load(checkpoint, config, variant, announce, lost)
        except BaseException:
            self.close()
            raise

    def _load(
        self,
        checkpoint: Checkpoint,
        config: CoreConfig,
        variant: Variant | None,
        announce: Callable[[Notice], object],
        lost: Callable[[Failure | None], None],
    ) -> None:
        ranks = self._ranks
        self._model = load_model(
            checkpoint,
            config.device,
            config.dtype,
            encoders_on_host=config.offload != "none",
            transformer_on_host=on_host(config),
        )
        parameters, weights_bytes = _size(self._model)
        transformer = self._model.transformer
        if variant is not None:
            announce(fuse_variant(transformer, variant))
        memory = slot_memory(self._model, config)
        announce(memory)
        check_slots_fit(memory)
        others = other_targets(transformer)
        device = self._model.device
        attend = ranks.meet(device, lost) if ranks else attention
        slots = StyleSlots(
            transformer.blocks,
            config.style_slots,
            config.max_rank,
            self._model.dtype,
            others,
            device,
            lambda slot: ranks.share_slot(slots.engine_banks, slot) if ranks else None,
        )
        fingerprint = variant.fingerprint(checkpoint.fingerprint) if variant else checkpoint.fingerprint
        spec = served_spec(checkpoint, fingerprint, transformer, config)
        self._slots = slots
        stack = WanStack(transformer, attend)
        place(transformer, stack, device, config.offload, config.storage_dtype)
        eager = ranks.engine(transformer, stack, config.shard_weights) if ranks else None
        self._storage_note = storage_note(config.storage_dtype)
        self._engines = EngineSource(stack, spec, config, eager)
        for news in self._engines.news():
            announce(news)
        self._denoisers: dict[Engine, Denoiser] = {}
        self._cache: ContentCache[Tensor] = ContentCache(config.cache_bytes, lambda tensor: tensor.nbytes)
        adapter = CatAdapter.beside(checkpoint.folder) if variant is None else None
        self._wardrobe = Wardrobe(slots, config.style_cache_bytes, adapter)
        self._requests: dict[str, Request] = {}
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
            state_bytes=_state_bound(self._model.device),
            ranks=ranks.layout.ranks if ranks else 1,
        )

    def close(self) -> None:
        """Ends the other ranks, where there are any."""
        if self._ranks is not None:
            self._ranks.close()

    def _denoiser_for(self, shot: Shot, grid: Grid) -> tuple[Denoiser, Engine]:
        """The denoiser of a request, and its engine. Raises EngineError when no engine takes its shapes."""
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
            spread = self._ranks is not None
            denoiser = Denoiser(transformer, EngineBlocks(transformer, engine, self._slots, spread))
            self._denoisers[engine] = denoiser
        return denoiser, engine

    def _grid(self, shot: Shot) -> Grid:
        height, width = shot.image.shape[:2]
        multiple = self.model_info.size_multiple
        return Grid((shot.frames - 1) // VAE_TEMPORAL_STRIDE + 1, height // multiple, width // multiple)

    @property
    def _pixel_stride(self) -> int:
        """Pixels per latent, along width and height."""
        return int(self._model.vae.config.scale_factor_spatial)

    @torch.inference_mode()
    def condition(self, shot: Shot, checkpoint: Path | None = None) -> Conditioned:
        """Makes a request's styles resident, encodes its inputs, and draws its noise or goes on from a checkpoint.

        Args:
            checkpoint: what `save` wrote; one that cannot be gone on from is noted, and the request starts with noise.

        Raises:
            NoFreeSlot: running requests wear all slots; nothing was encoded.
            EngineError: its styles cannot be worn.
        """
        self.release(shot.job_id)
        outfit = self._wardrobe.dress(shot.styles, merging=shot.cat is not None)
        try:
            return self._condition(shot, outfit, checkpoint)
        except BaseException:
            self._wardrobe.undress(outfit)
            raise

    def _condition(self, shot: Shot, outfit: Outfit, checkpoint: Path | None) -> Conditioned:
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
        model_key = (self.model_info.fingerprint, self.model_info.dtype, self._storage_note)
        request = Request(
            latents=stages.starting_noise(shot.seed, latent_shape, model.device),
            condition=condition,
            branches=tuple(denoiser.project_context(text, image) for text in texts),
            guidance_scale=shot.guidance_scale,
            digest=resume.shot_digest(shot, model_key, scheduler),
            scheduler=scheduler,
            timesteps=scheduler.timesteps.cpu(),
            denoiser=denoiser,
            engine=engine,
            outfit=outfit,
            grid=grid,
            tiling=tiling,
            tokens=AdaptiveTokens.of(shot.cat, grid, len(scheduler.timesteps)) if shot.cat else None,
            runs=_runs(shot),
        )
        if checkpoint is not None:
            notes += request.take_up(checkpoint)
        self._requests[shot.job_id] = request
        return Conditioned(
            tuple(clock.timings),
            grid.count,
            notes,
            self.residency(),
            engine.name,
            self._wardrobe.take_use(),
            self._engines.news(),
            rows=len(request.branches),
            state_bytes=request.state_bytes,
            decode_bytes=self._decode_bytes(request),
            next=self._next(request),
            step_tokens=request.spent,
            keep_ratio=request.keep_ratio,
            memory=core_memory(self._model.device),
        )

    def _encode_text(self, prompt: str) -> Tensor:
        with on_device(self._model.text_encoder, self._model.device):
            return stages.encode_text(self._model, prompt)

    def _encode_image(self, image: NDArray[np.uint8]) -> Tensor:
        with on_device(self._model.image_encoder, self._model.device):
            return stages.encode_image(self._model, image)

    @torch.inference_mode()
    def save(self, job_id: str, path: Path) -> Saved:
        """Writes a request's checkpoint.

        Raises:
            EngineError: the request is unknown, has done no step, or the file cannot be written.
        """
        request = self._request(job_id)
        if not request.step:
            raise EngineError(f"job {job_id} has done no step yet; there is nothing to save")
        started = time.perf_counter()
        progress = resume.Progress(
            latents=request.latents,
            solver=resume.solver_state(request.scheduler),
            spent=request.spent,
            keep_ratio=request.keep_ratio,
            surroundings=request.surroundings,
            remembered=request.remembered.predictions,
        )
        size = resume.write(path, request.digest, progress)
        return Saved(time.perf_counter() - started, size)

    def _next(self, request: Request) -> StepShape | None:
        if request.step >= len(request.timesteps):
            return None
        if request.coming_is_cached:
            return StepShape(request.engine.name, 0)
        count = request.grid.count if request.tokens is None else request.tokens.coming
        most_rows = self._engines.most_rows(request.engine, count)
        return StepShape(request.engine.name, count, count < request.grid.count, most_rows)

    @torch.inference_mode()
    def step(self, job_ids: Sequence[str], previews: Set[str] = frozenset()) -> Stepped:
        """Runs the coming denoising step of every request named, their rows in one forward, or in two with guidance at
        many tokens (`denoise.TOGETHER_TOKENS`). A cached step runs none, and asks nothing of other ranks. Requests
        change once all of it is done, or not at all.

        A request alone is computed as ever. In a batch, rounding differs with the number of rows and with the longest
        prompt; the same batches give the same bits.

        Args:
            previews: whose clean prediction comes as pictures.

        Raises:
            EngineError: a request is unknown, named twice or has done all its steps, the shapes of their steps differ,
                or they have more rows than the engine takes.
        """
        started = time.perf_counter()
        requests = [self._request(job_id) for job_id in job_ids]
        self._check_together(job_ids, requests)
        planned = [request.tokens.seconds if request.tokens else 0.0 for request in requests]
        moments, spent = zip(*(request.moment() for request in requests), strict=True)
        if requests[0].coming_is_cached:  # so all are: their shapes are equal
            velocities = [request.cached_velocity(moment) for request, moment in zip(requests, moments, strict=True)]
        else:
            found = requests[0].denoiser.velocities_of(moments)
            velocities = [guided(each, request.guidance_scale) for each, request in zip(found, requests, strict=True)]
        advances = [
            request.advance(moment, velocity, count)
            for request, moment, velocity, count in zip(requests, moments, velocities, spent, strict=True)
        ]
        pictures = {
            job_id: self._palette.pictures((moment.latents - moment.sigma * velocity).float())
            for job_id, moment, velocity in zip(job_ids, moments, velocities, strict=True)
            if job_id in previews
        }
        synchronize(self._model.device)
        answers: list[RequestStepped | Failure] = []
        for job_id, request, advance, before in zip(job_ids, requests, advances, planned, strict=True):
            if isinstance(advance, Failure):
                answers.append(advance)
                continue
            request.take(advance)
            answers.append(
                RequestStepped(
                    job_id,
                    request.step,
                    len(request.timesteps),
                    request.spent[-1],
                    request.tokens.seconds - before if request.tokens else 0.0,
                    request.keep_ratio,
                    self._next(request),
                    pictures.get(job_id),
                )
            )
        return Stepped(time.perf_counter() - started, tuple(answers), *self._communication())

    def step_alone(self, job_id: str) -> RequestStepped:
        """`step` of one request. Raises EngineError also where it failed by itself."""
        (answer,) = self.step((job_id,)).requests
        if isinstance(answer, Failure):
            raise EngineError(answer.message)
        return answer

    def _check_together(self, job_ids: Sequence[str], requests: Sequence[Request]) -> None:
        if not job_ids or len(set(job_ids)) < len(job_ids):
            raise EngineError(f"step: {', '.join(job_ids) or 'nobody'}: it takes each request once, and at least one")
        first, *others = [self._next(request) for request in requests]
        for job_id, request in zip(job_ids, requests, strict=True):
            if request.step >= len(request.timesteps):
                raise EngineError(f"job {job_id} has done all its {len(request.timesteps)} steps")
        assert first is not None
        for job_id, other in zip(job_ids[1:], others, strict=True):
            if other != first:
                raise EngineError(f"step: {job_ids[0]} and {job_id} cannot share a forward: {first}, {other}")
        rows = forward_rows(first.tokens, [len(request.branches) for request in requests])
        # Alone, a request is no worse off on an engine that says itself what it takes.
        if len(requests) > 1 and first.most_rows and rows > first.most_rows:
            raise EngineError(
                f"step: {', '.join(job_ids)} have {rows} rows together, the {first.engine} engine takes "
                f"{first.most_rows} of {first.tokens} tokens; step fewer at once"
            )

    @cached_property
    def _palette(self) -> Palette:
        return Palette.of(self._model.vae)

    @torch.inference_mode()
    def decode(self, job_id: str, write: Callable[[Tensor], None]) -> Decoded:
        """Decodes the next latent frame and hands its frames, float32 [count, height, width, 3] in [0, 1], to `write`.

        Raises:
            EngineError: the request is unknown, has steps left, or is decoded to its end.
        """
        request = self._request(job_id)
        if request.step < len(request.timesteps):
            raise EngineError(f"job {job_id} has {len(request.timesteps) - request.step} steps left")
        started = time.perf_counter()
        if request.decoder is None:
            request.decoder = self._new_decoder(job_id, request)
        decoder = request.decoder
        if decoder.frame >= decoder.total_frames:
            raise EngineError(f"job {job_id} has decoded all its {decoder.total_frames} frames")
        first = decoder.frame
        frames = decoder.next_frames()
        write(frames)
        seconds = time.perf_counter() - started
        memory = core_memory(self._model.device)
        return Decoded(first, decoder.frame - first, decoder.total_frames, seconds, memory, *self._communication())

    def _communication(self) -> tuple[float, int]:
        """Seconds and bytes of exchanges between ranks since the last call."""
        if self._ranks is None:
            return 0.0, 0
        traffic = self._ranks.ranks.take_traffic()
        return traffic.seconds, traffic.sent.total()

    def _new_decoder(self, job_id: str, request: Request) -> stages.Decoder:
        vae, latents = self._model.vae, request.latents
        on_all = self._ranks.decoder(vae, latents, job_id) if self._ranks else None
        return on_all or stages.ClipDecoder.start(vae, latents, request.tiling)

    def _decode_bytes(self, request: Request) -> int:
        vae, latents = self._model.vae, request.latents
        if self._ranks is not None and self._ranks.decodes(vae, latents):
            return self._ranks.decoder_bytes(vae, latents)
        return stages.decoder_bytes(vae, latents, request.tiling)

    def release(self, job_id: str) -> None:
        """Frees a request, if it is known."""
        request = self._requests.pop(job_id, None)
        if request is not None:
            if request.decoder is not None:
                request.decoder.close()
            self._wardrobe.undress(request.outfit)

    @torch.inference_mode()
    def warm(self, style: StyleUse) -> Warmed:
        """Makes a style resident, so that the next request that wears it reads no file.

        Raises:
            NoFreeSlot: running requests wear all slots.
            EngineError: it cannot be worn.
        """
        self._wardrobe.warm(style)
        return Warmed(self.residency(), self._wardrobe.take_use())

    def residency(self) -> tuple[ResidentStyle, ...]:
        """What is in the slots, least recently used first."""
        return self._wardrobe.residency()

    def _request(self, job_id: str) -> Request:
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


def _runs(shot: Shot) -> frozenset[int] | None:
    """Steps that run the model; None where all do."""
    if shot.run_steps is None or shot.run_steps == shot.steps:
        return None
    return spread_steps(shot.steps, shot.run_steps)


def _state_bound(device: torch.device) -> int:
    """What requests may hold: half of what the device has left with the model loaded. The other half is for the work of
    a forward or a decode, which grows with the clip as states do, and for the caches. 0 where it cannot be told.
    """
    available = available_bytes(device)
    return 0 if available is None else max(1, available // 2)


def _size(model: WanModel) -> tuple[int, int]:
    parameters = [p for module in model.modules for p in module.parameters()]
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
