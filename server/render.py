"""One job's way through the engine core: condition, steps, decode, and its files."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from cinecat.engines.messages import (
    VAE_TEMPORAL_STRIDE,
    Condition,
    Conditioned,
    Decode,
    Decoded,
    Release,
    Released,
    Shot,
    StageTime,
    Step,
    Stepped,
)
from cinecat.server.artifacts import ArtifactFormat, ArtifactInfo, ArtifactStore
from cinecat.server.core_process import CoreProcess, FrameBuffer
from cinecat.server.costs import Costs, pixel_frames, token_rows
from cinecat.server.inputs import JobInputs
from cinecat.server.jobs import Jobs, LiveJob
from cinecat.server.metrics import Metrics
from cinecat.server.mux import ClipShape, ClipWriter, clip_metadata, exact_rate, open_writer
from cinecat.server.styles import StyleCatalogue
from cinecat.v1 import clip_pb2
from cinecat.v1 import job_pb2 as pb

_FORMATS = {
    clip_pb2.ARTIFACT_FORMAT_MP4_H264: ArtifactFormat.MP4_H264,
    clip_pb2.ARTIFACT_FORMAT_FRAMES_F32: ArtifactFormat.FRAMES_F32,
}


class Stopped(Exception):
    """The job was cancelled and its work has stopped."""


@dataclass
class Rendered:
    """A clip whose frames all exist; `finish` completes its files without the engine core."""

    finish: Callable[[], Awaitable[None]]


@dataclass
class _Progress:
    """What becomes the job's result."""

    timings: list[StageTime] = field(default_factory=list)
    tokens_used: int = 0
    tokens_uniform: int = 0
    mux_seconds: float = 0.0


class Renderer:
    """Drives the engine core for one job at a time."""

    def __init__(
        self,
        core: CoreProcess,
        engine: str,
        jobs: Jobs,
        catalogue: StyleCatalogue,
        inputs: JobInputs,
        artifacts: ArtifactStore,
        metrics: Metrics,
        costs: Costs,
    ) -> None:
        self._core = core
        self._engine = engine
        self._jobs = jobs
        self._catalogue = catalogue
        self._inputs = inputs
        self._artifacts = artifacts
        self._metrics = metrics
        self._costs = costs

    async def render(self, live: LiveJob) -> Rendered:
        """Takes a queued job until its last frame is decoded, and releases the core.

        Raises:
            Stopped: it was cancelled.
            UnknownStyle, EngineError, CoreDied, ArtifactError: it failed; nothing of it is left but its input.
        """
        progress = _Progress()
        queued = (time.time() - live.job.create_time.ToMicroseconds() / 1e6) if live.attempts == 0 else 0.0
        progress.timings.append(StageTime("queue", max(0.0, queued)))
        await self._jobs.transition(live, pb.JOB_STATE_CONDITIONING)
        try:
            await self._condition(live, progress)
            await self._denoise(live, progress)
            writers = await self._decode(live, progress)
        finally:
            await self._release(live)
        return Rendered(lambda: self._finish(live, progress, writers))

    async def _condition(self, live: LiveJob, progress: _Progress) -> None:
        clip = live.job.clip
        shot = Shot(
            job_id=live.job_id,
            image=await asyncio.to_thread(self._inputs.load, live.job_id),
            prompt=clip.prompt,
            negative_prompt=clip.negative_prompt,
            frames=clip.frames,
            steps=clip.steps,
            guidance_scale=clip.guidance_scale,
            seed=clip.seed,
            styles=await asyncio.to_thread(self._catalogue.uses, clip.styles),
        )
        _stop_if_asked(live)
        conditioned = await self._core.call(Condition(shot), Conditioned)
        progress.timings += conditioned.timings
        progress.tokens_used, progress.tokens_uniform = conditioned.tokens_used, conditioned.tokens_uniform
        live.job.notes.extend(note for note in conditioned.notes if note not in live.job.notes)
        if not any(timing.cached for timing in conditioned.timings):
            seconds = sum(timing.seconds for timing in conditioned.timings)
            self._costs.observe("condition", pixel_frames(clip), seconds)

    async def _denoise(self, live: LiveJob, progress: _Progress) -> None:
        _stop_if_asked(live)
        await self._jobs.transition(live, pb.JOB_STATE_DENOISING)
        tokenization = clip_pb2.Tokenization.Mode.Name(live.job.clip.tokenization.mode).lower()
        total = 0.0
        for _ in range(live.job.clip.steps):
            _stop_if_asked(live)
            stepped = await self._core.call(Step(live.job_id), Stepped)
            total += stepped.seconds
            self._metrics.step_seconds.labels(tokenization).observe(stepped.seconds)
            self._costs.observe("step", token_rows(live.job.clip, progress.tokens_used), stepped.seconds)
            live.job.progress.step = stepped.step
            self._report(live, progress)
        progress.timings.append(StageTime("denoise", total))

    async def _decode(self, live: LiveJob, progress: _Progress) -> list[ClipWriter]:
        _stop_if_asked(live)
        await self._jobs.transition(live, pb.JOB_STATE_DECODING)
        clip = live.job.clip
        writers = await asyncio.to_thread(self._open_writers, live)
        deep = clip_pb2.ARTIFACT_FORMAT_FRAMES_F32 in clip.artifact_formats
        writing: asyncio.Task[None] | None = None
        total = 0.0
        try:
            with FrameBuffer(clip.height, clip.width, VAE_TEMPORAL_STRIDE, "float32" if deep else "uint8") as buffer:
                while live.job.progress.frames_decoded < clip.frames:
                    _stop_if_asked(live)
                    decoded = await self._core.call(Decode(live.job_id, buffer.name, buffer.dtype), Decoded)
                    total += decoded.seconds
                    self._costs.observe("decode", clip.width * clip.height * decoded.count, decoded.seconds)
                    frames = buffer.frames(decoded)
                    # The files grow while the core decodes on, one chunk behind it.
                    if writing is not None:
                        await writing
                    writing = asyncio.create_task(asyncio.to_thread(_write, writers, frames, progress))
                    live.job.progress.frames_decoded = decoded.first + decoded.count
                    self._report(live, progress)
            if writing is not None:
                await writing
        except BaseException:
            if writing is not None:
                await asyncio.wait([writing])
            _abort(writers)
            raise
        progress.timings.append(StageTime("vae_decode", total))
        return writers

    async def _finish(self, live: LiveJob, progress: _Progress, writers: list[ClipWriter]) -> None:
        """Completes and publishes the files and ends the job."""
        try:
            _stop_if_asked(live)
            await self._jobs.transition(live, pb.JOB_STATE_ENCODING)
            started = time.perf_counter()
            published = await asyncio.to_thread(self._publish, live.job_id, writers)
            progress.mux_seconds += time.perf_counter() - started
        except BaseException:
            _abort(writers)
            raise
        progress.timings.append(StageTime("mux", progress.mux_seconds))
        for timing in progress.timings:
            self._metrics.stage(timing)
        live.job.result.CopyFrom(self._result(live.job, progress, published))
        await self._jobs.transition(live, pb.JOB_STATE_SUCCEEDED)

    async def _release(self, live: LiveJob) -> None:
        """Frees the core's state; where the core is gone, so is the state."""
        try:
            await self._core.call(Release(live.job_id), Released)
        except Exception:
            return

    def _report(self, live: LiveJob, progress: _Progress) -> None:
        remaining = self._costs.remaining(live.job, progress.tokens_used)
        if remaining is not None:
            live.job.progress.eta.FromNanoseconds(int(remaining * 1e9))
        self._jobs.progress(live)

    def _open_writers(self, live: LiveJob) -> list[ClipWriter]:
        clip = live.job.clip
        shape = ClipShape(clip.width, clip.height, clip.frames, exact_rate(clip.fps))
        metadata = clip_metadata(clip.prompt, {"job_id": live.job_id, "engine": self._engine, **as_dict(clip)})
        writers: list[ClipWriter] = []
        try:
            for value in clip.artifact_formats:
                path = self._artifacts.scratch_path(live.job_id, _FORMATS[value])
                writers.append(open_writer(_FORMATS[value], path, shape, metadata))
        except BaseException:
            _abort(writers)
            raise
        return writers

    def _publish(self, job_id: str, writers: list[ClipWriter]) -> list[ArtifactInfo]:
        return [self._artifacts.publish(job_id, written) for written in [writer.finish() for writer in writers]]

    def _result(self, job: pb.Job, progress: _Progress, published: list[ArtifactInfo]) -> pb.ClipResult:
        result = pb.ClipResult(
            tokens_used=progress.tokens_used,
            tokens_uniform=progress.tokens_uniform,
            engine=self._engine,
        )
        for timing in progress.timings:
            entry = result.timings.add(stage=pb.Stage.Value(f"STAGE_{timing.stage.upper()}"), cached=timing.cached)
            entry.duration.FromNanoseconds(int(timing.seconds * 1e9))
        for value, info in zip(job.clip.artifact_formats, published, strict=True):
            result.artifacts.add(
                name=info.name, format=value, mime_type=info.mime_type, size_bytes=info.size_bytes, sha256=info.sha256
            )
        return result


def as_dict(message: Message) -> dict[str, Any]:
    """A message as plain JSON values, by its proto field names."""
    plain: dict[str, Any] = json.loads(json.dumps(MessageToDict(message, preserving_proto_field_name=True)))
    return plain


def _write(writers: list[ClipWriter], frames: Any, progress: _Progress) -> None:
    started = time.perf_counter()
    for writer in writers:
        writer.write(frames)
    progress.mux_seconds += time.perf_counter() - started


def _abort(writers: list[ClipWriter]) -> None:
    for writer in writers:
        writer.abort()


def _stop_if_asked(live: LiveJob) -> None:
    if live.stop_requested:
        raise Stopped
