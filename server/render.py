"""One job's way through the engine core: condition, steps, decode, and its files."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from numpy.typing import NDArray

from cinecat.engines.errors import EngineError
from cinecat.engines.messages import (
    VAE_TEMPORAL_STRIDE,
    Cat,
    Condition,
    Conditioned,
    Decode,
    Decoded,
    Release,
    Released,
    RequestStepped,
    Shot,
    StageTime,
    Step,
    Stepped,
)
from cinecat.engines.tokens.budget import step_tokens
from cinecat.server.artifacts import ArtifactError, ArtifactFormat, ArtifactInfo, ArtifactStore
from cinecat.server.core_process import CoreProcess, FrameBuffer, tell
from cinecat.server.costs import Costs, pixel_frames, token_rows
from cinecat.server.inputs import JobInputs
from cinecat.server.jobs import Jobs, LiveJob
from cinecat.server.metrics import Metrics
from cinecat.server.models import token_grid
from cinecat.server.mux import ClipShape, ClipWriter, clip_metadata, exact_rate, open_writer
from cinecat.server.styles import StyleCatalogue
from cinecat.v1 import clip_pb2, models_pb2
from cinecat.v1 import job_pb2 as pb

_FORMATS = {
    clip_pb2.ARTIFACT_FORMAT_MP4_H264: ArtifactFormat.MP4_H264,
    clip_pb2.ARTIFACT_FORMAT_FRAMES_F32: ArtifactFormat.FRAMES_F32,
}


class Stopped(Exception):
    """The job was cancelled and its work has stopped."""


@dataclass
class _Tally:
    """What becomes of a rendering's measurements in the job's result."""

    timings: list[StageTime] = field(default_factory=list)
    plan_seconds: float = 0.0
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0
    mux_seconds: float = 0.0
    step_tokens: list[int] = field(default_factory=list)
    engine: str = ""
    tokens_uniform: int = 0


@dataclass(frozen=True)
class Renderer:
    """What every rendering works with."""

    core: CoreProcess
    model: models_pb2.Model
    jobs: Jobs
    catalogue: StyleCatalogue
    inputs: JobInputs
    artifacts: ArtifactStore
    metrics: Metrics
    costs: Costs

    def begin(self, live: LiveJob) -> Rendering:
        return Rendering(self, live)


class Rendering:
    """One job on its way through the engine core, one call to the core at a time.

    The scheduler calls `advance` until it says that all frames are decoded, then `leave_core` and `finish`; between
    two calls it may do something else, or nothing ever again after `abandon`.
    """

    def __init__(self, renderer: Renderer, live: LiveJob) -> None:
        self.live = live
        self._renderer = renderer
        self._tally = _Tally()
        self._keep_ratio = 1.0  # that the core holds the clip to
        self._writers: list[ClipWriter] = []
        self._buffer: FrameBuffer | None = None
        self._writing: asyncio.Task[None] | None = None

    async def advance(self) -> bool:
        """Does the next quantum: encodes the inputs, or one step, or decodes one chunk. True after the last chunk.

        Raises:
            Stopped: the job was cancelled.
            RequestError, UnknownStyle, EngineError, CoreDied, ArtifactError: it failed.
        """
        job = self.live.job
        self._stop_if_asked()
        if job.state == pb.JOB_STATE_QUEUED:
            await self._condition()
        elif job.progress.step < job.clip.steps:
            await self._step()
        else:
            await self._decode()
        return self.live.job.progress.frames_decoded == job.clip.frames

    async def leave_core(self) -> None:
        """Frees the core's state of this job; where the core is gone, so is the state."""
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
        with contextlib.suppress(EngineError):
            await self._renderer.core.call(Release(self.live.job_id), Released)

    async def finish(self) -> None:
        """Completes and publishes the files, and ends the job. Needs no core.

        Raises:
            Stopped: the job was cancelled.
            ArtifactError: a file could not be written or published.
        """
        r, live, tally = self._renderer, self.live, self._tally
        if self._writing is not None:
            await self._writing
        self._stop_if_asked()
        await r.jobs.transition(live, pb.JOB_STATE_ENCODING)
        started = time.perf_counter()
        published = await asyncio.to_thread(self._publish)
        tally.mux_seconds += time.perf_counter() - started
        if live.job.clip.tokenization.mode == clip_pb2.Tokenization.CAT:
            tally.timings.append(StageTime("plan", tally.plan_seconds))
        tally.timings += [
            StageTime("denoise", tally.denoise_seconds),
            StageTime("vae_decode", tally.decode_seconds),
            StageTime("mux", tally.mux_seconds),
        ]
        result = self._result(published)
        await r.jobs.transition(live, pb.JOB_STATE_SUCCEEDED, lambda job: job.result.CopyFrom(result))
        for timing in tally.timings:
            r.metrics.stage(timing)

    async def abandon(self) -> None:
        """Gives up: leaves the core, and no file behind."""
        await self.leave_core()
        if self._writing is not None:
            await asyncio.wait([self._writing])
        await asyncio.to_thread(self._remove_files)

    async def _condition(self) -> None:
        r, live, clip = self._renderer, self.live, self.live.job.clip
        if clip.model != r.model.name:
            raise EngineError(f"the job was accepted for the model {clip.model}, this server now has {r.model.name}")
        waited = time.time() - live.job.create_time.ToMicroseconds() / 1e6 if live.attempts == 0 else 0.0
        self._tally.timings.append(StageTime("queue", max(0.0, waited)))
        await r.jobs.transition(live, pb.JOB_STATE_CONDITIONING)
        shot = Shot(
            job_id=live.job_id,
            image=await asyncio.to_thread(r.inputs.load, live.job_id),
            prompt=clip.prompt,
            negative_prompt=clip.negative_prompt,
            frames=clip.frames,
            steps=clip.steps,
            guidance_scale=clip.guidance_scale,
            seed=clip.seed,
            styles=await asyncio.to_thread(r.catalogue.uses, clip.styles, r.inputs.weights),
            shift=clip.shift if clip.HasField("shift") else None,
            cat=_cat(clip.tokenization),
        )
        self._stop_if_asked()
        conditioned = await r.core.call(Condition(shot), Conditioned)
        r.catalogue.activity.resident = conditioned.resident
        for news in conditioned.news:
            tell(news, r.metrics)
        r.model.engine = conditioned.engine
        self._tally.engine = conditioned.engine
        if live.attempts == 1:
            for style in shot.styles:
                r.catalogue.activity.used(style.fingerprint)
        self._tally.timings += conditioned.timings
        self._tally.tokens_uniform = conditioned.tokens_uniform
        live.job.notes.extend(note for note in conditioned.notes if note not in live.job.notes)
        if not any(timing.cached for timing in conditioned.timings):
            r.costs.observe("condition", pixel_frames(clip), sum(timing.seconds for timing in conditioned.timings))

    async def _step(self) -> None:
        r, live = self._renderer, self.live
        if live.job.state == pb.JOB_STATE_CONDITIONING:
            await r.jobs.transition(live, pb.JOB_STATE_DENOISING)
        answer = await r.core.call(Step((live.job_id,)), Stepped)
        stepped = answer.requests[0]
        assert isinstance(stepped, RequestStepped)
        self._tally.step_tokens.append(stepped.tokens)
        self._tally.plan_seconds += stepped.plan_seconds
        self._tally.denoise_seconds += answer.seconds - stepped.plan_seconds
        tokenization = clip_pb2.Tokenization.Mode.Name(live.job.clip.tokenization.mode).lower()
        r.metrics.step_seconds.labels(tokenization).observe(answer.seconds)
        r.metrics.engine_steps.labels(self._tally.engine).inc()
        r.costs.observe("step", token_rows(live.job.clip, stepped.tokens), answer.seconds)
        live.job.progress.step = stepped.step
        self._keep_ratio = stepped.keep_ratio
        self._report()

    async def _decode(self) -> None:
        r, live = self._renderer, self.live
        if live.job.state == pb.JOB_STATE_DENOISING:
            await r.jobs.transition(live, pb.JOB_STATE_DECODING)
            await asyncio.to_thread(self._open_files)
        clip, buffer = live.job.clip, self._buffer
        assert buffer is not None
        decoded = await r.core.call(Decode(live.job_id, buffer.name, buffer.dtype), Decoded)
        self._tally.decode_seconds += decoded.seconds
        r.costs.observe("decode", clip.width * clip.height * decoded.count, decoded.seconds)
        frames = await asyncio.to_thread(buffer.frames, decoded)
        # The files grow while the core decodes on, one chunk behind it.
        if self._writing is not None:
            await self._writing
        self._writing = asyncio.create_task(asyncio.to_thread(self._write, frames))
        live.job.progress.frames_decoded = decoded.first + decoded.count
        self._report()

    def _stop_if_asked(self) -> None:
        if self.live.stop_requested:
            raise Stopped

    def _report(self) -> None:
        clip = self.live.job.clip
        expected = step_tokens(token_grid(self._renderer.model, clip), clip.steps, self._keep_ratio)
        remaining = self._renderer.costs.remaining(self.live.job, expected)
        if remaining is not None:
            self.live.job.progress.eta.FromNanoseconds(int(remaining * 1e9))
        self._renderer.jobs.progress(self.live)

    def _open_files(self) -> None:
        clip, job_id, artifacts = self.live.job.clip, self.live.job_id, self._renderer.artifacts
        shape = ClipShape(clip.width, clip.height, clip.frames, exact_rate(clip.fps))
        settings = {"job_id": job_id, "engine": self._tally.engine, **as_dict(clip)}
        for value in clip.artifact_formats:
            path = artifacts.scratch_path(job_id, _FORMATS[value])
            self._writers.append(open_writer(_FORMATS[value], path, shape, clip_metadata(clip.prompt, settings)))
        deep = clip_pb2.ARTIFACT_FORMAT_FRAMES_F32 in clip.artifact_formats
        self._buffer = FrameBuffer(clip.height, clip.width, VAE_TEMPORAL_STRIDE, "float32" if deep else "uint8")

    def _write(self, frames: NDArray[Any]) -> None:
        started = time.perf_counter()
        for writer in self._writers:
            writer.write(frames)
        self._tally.mux_seconds += time.perf_counter() - started

    def _publish(self) -> list[ArtifactInfo]:
        """All files are whole before the first of them is published."""
        finished = [writer.finish() for writer in self._writers]
        return [self._renderer.artifacts.publish(self.live.job_id, written) for written in finished]

    def _remove_files(self) -> None:
        for writer in self._writers:
            writer.abort()
        with contextlib.suppress(ArtifactError):
            self._renderer.artifacts.delete_job(self.live.job_id)

    def _result(self, published: list[ArtifactInfo]) -> pb.ClipResult:
        tally = self._tally
        mean = sum(tally.step_tokens) / len(tally.step_tokens)
        result = pb.ClipResult(
            tokens_used=round(mean),
            tokens_uniform=tally.tokens_uniform,
            engine=tally.engine,
            step_tokens=tally.step_tokens,
            keep_ratio=mean / tally.tokens_uniform,
        )
        for timing in tally.timings:
            entry = result.timings.add(stage=pb.Stage.Value(f"STAGE_{timing.stage.upper()}"), cached=timing.cached)
            entry.duration.FromNanoseconds(int(timing.seconds * 1e9))
        for value, info in zip(self.live.job.clip.artifact_formats, published, strict=True):
            result.artifacts.add(
                name=info.name, format=value, mime_type=info.mime_type, size_bytes=info.size_bytes, sha256=info.sha256
            )
        return result


def _cat(tokenization: clip_pb2.Tokenization) -> Cat | None:
    if tokenization.mode != clip_pb2.Tokenization.CAT:
        return None
    if tokenization.WhichOneof("budget") == "keep_ratio":
        return Cat(keep_ratio=tokenization.keep_ratio)
    return Cat(target_psnr_db=tokenization.target_psnr_db)


def as_dict(message: Message) -> dict[str, Any]:
    """A message as plain JSON values, by its proto field names."""
    return dict(MessageToDict(message, preserving_proto_field_name=True))
