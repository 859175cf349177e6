"""Jobs and clips as a caller meets them: frozen, and free of protobuf."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from cinecat.errors import CinecatError, JobCancelled, JobFailed, status_of
from cinecat.previews import Previews, previews_from_proto
from cinecat.states import JobState
from cinecat.styles import Style, display
from cinecat.v1 import clip_pb2, job_pb2

FORMATS = {
    "mp4": clip_pb2.ARTIFACT_FORMAT_MP4_H264,
    "frames_f32": clip_pb2.ARTIFACT_FORMAT_FRAMES_F32,
}


@dataclass(frozen=True)
class ProfiledStep:
    """A denoising step that was recorded, counted from 1, and the file on the server's machine."""

    step: int
    path: str


@dataclass(frozen=True)
class Artifact:
    """A file that a job wrote. `format` is "mp4" or "frames_f32"; `sha256` is of the whole file, in
    hexadecimal.
    """

    name: str
    format: str
    mime_type: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """What a clip is made from, with every default filled in. Sizes in pixels, `fps` in frames per second. `prompt` is
    what the model reads; with `prompt_as_is`, asking for it again changes nothing about it. With `tokenization`
    "cat", one of `asked_keep_ratio` and `target_psnr_db` is what limits its tokens. `run_steps` is how many steps
    run the model; None for all.
    """

    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    fps: float
    steps: int
    guidance: float
    shift: float
    seed: int
    fit: str
    styles: tuple[Style, ...]
    tokenization: str
    prompt_as_is: bool = False
    asked_keep_ratio: float | None = None
    target_psnr_db: float | None = None
    run_steps: int | None = None

    @property
    def style(self) -> str:
        """The styles in one string for people, e.g. "noir:0.8+amber:0.5", or "none"."""
        return display(self.styles)


@dataclass(frozen=True, kw_only=True)
class Clip(ClipSettings):
    """A finished clip.

    `timings` gives seconds per stage; the stages in `cached` were not done because their result was known. Tokens are
    per forward of the denoiser: `step_tokens` in each step, `tokens_used` their mean, `keep_ratio` that mean over
    `tokens_uniform`. Below 1 the clip is an approximation of what the uniform path would have made. A step of 0 tokens
    was cached: it did not run the model, as `steps_run` steps did. `data` holds the first artifact when it was fetched
    into memory, `path` where it was saved; both are None when it was not fetched.
    """

    job_id: str
    tokens_used: int
    tokens_uniform: int
    step_tokens: tuple[int, ...]
    steps_run: int
    keep_ratio: float
    engine: str
    timings: dict[str, float]
    cached: tuple[str, ...]
    notes: tuple[str, ...]
    artifacts: tuple[Artifact, ...]
    data: bytes | None = field(default=None, repr=False)
    path: Path | None = None

    def fetched(self, artifact: bytes | Path) -> "Clip":
        """This clip with its first artifact: the bytes, or the path it was saved at."""
        if isinstance(artifact, bytes):
            return replace(self, data=artifact)
        return replace(self, path=artifact)


@dataclass(frozen=True, kw_only=True)
class Job:
    """An accepted request. `clip` is set once it has succeeded, `error` once it has failed; times are in UTC.
    `wait_reason` says why it waits when it is not for the jobs ahead of it. `priority` is "interactive" or "batch", ""
    where the server does not say; `previews` are the pictures that its events carry.
    `trace_id` is of the OpenTelemetry trace that it is part of, in hexadecimal, "" where there is none.
    """

    job_id: str
    state: JobState
    settings: ClipSettings
    request_id: str
    detached: bool
    step: int
    total_steps: int
    queue_position: int
    eta_seconds: float | None
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    notes: tuple[str, ...]
    wait_reason: str = ""
    priority: str = ""
    previews: Previews = field(default_factory=Previews)
    trace_id: str = ""
    clip: Clip | None = None
    error: CinecatError | None = None


def job_from_proto(job: job_pb2.Job) -> Job:
    state = JobState.from_proto(job.state)
    failed = state in (JobState.FAILED, JobState.CANCELLED)
    return Job(
        job_id=job.job_id,
        state=state,
        settings=ClipSettings(**_settings(job.clip)),
        request_id=job.request_id,
        detached=job.detached,
        step=job.progress.step,
        total_steps=job.progress.total_steps,
        queue_position=job.progress.queue_position,
        eta_seconds=eta_seconds(job.progress),
        create_time=moment(job, "create_time"),
        start_time=moment(job, "start_time"),
        end_time=moment(job, "end_time"),
        notes=tuple(job.notes),
        wait_reason=job.progress.wait_reason,
        priority=enum_name(job_pb2.Priority.DESCRIPTOR, "PRIORITY_", job.priority) if job.priority else "",
        previews=previews_from_proto(job.previews),
        trace_id=_trace_id(job.traceparent),
        clip=clip_from_proto(job) if state is JobState.SUCCEEDED else None,
        error=job_error(job) if failed else None,
    )


def clip_from_proto(job: job_pb2.Job) -> Clip:
    """The clip of a job in state SUCCEEDED."""
    result = job.result
    names = {timing.stage: enum_name(job_pb2.Stage.DESCRIPTOR, "STAGE_", timing.stage) for timing in result.timings}
    return Clip(
        **_settings(job.clip),
        job_id=job.job_id,
        tokens_used=result.tokens_used,
        tokens_uniform=result.tokens_uniform,
        step_tokens=tuple(result.step_tokens),
        # A server older than step caching ran them all.
        steps_run=result.run_steps or len(result.step_tokens),
        # A server older than CAT reports none.
        keep_ratio=result.keep_ratio or 1.0,
        engine=result.engine,
        timings={names[timing.stage]: timing.duration.ToNanoseconds() / 1e9 for timing in result.timings},
        cached=tuple(names[timing.stage] for timing in result.timings if timing.cached),
        notes=tuple(job.notes),
        artifacts=tuple(map(artifact_from_proto, result.artifacts)),
    )


def artifact_from_proto(artifact: job_pb2.Artifact) -> Artifact:
    return Artifact(
        name=artifact.name,
        format=next((name for name, number in FORMATS.items() if number == artifact.format), str(artifact.format)),
        mime_type=artifact.mime_type,
        size_bytes=artifact.size_bytes,
        sha256=artifact.sha256,
    )


def _trace_id(traceparent: str) -> str:
    fields = traceparent.split("-")
    return fields[1] if len(fields) == 4 else ""


def job_error(job: job_pb2.Job) -> CinecatError:
    """Why a job in state FAILED or CANCELLED has no clip."""
    if job.state == job_pb2.JOB_STATE_CANCELLED:
        return JobCancelled(f"job {job.job_id} was cancelled", job_id=job.job_id)
    code = status_of(job.error.code)
    # OK would say that nothing is wrong.
    code = grpc.StatusCode.UNKNOWN if code is grpc.StatusCode.OK else code
    return JobFailed(job.error.message or f"job {job.job_id} failed", code=code, job_id=job.job_id)


def eta_seconds(progress: job_pb2.JobProgress) -> float | None:
    return progress.eta.ToNanoseconds() / 1e9 if progress.HasField("eta") else None


def moment(message: Message, name: str) -> datetime | None:
    """The timestamp field `name` of `message`, None when it is not set."""
    if not message.HasField(name):
        return None
    timestamp: Timestamp = getattr(message, name)
    return timestamp.ToDatetime(tzinfo=UTC)


def _settings(clip: clip_pb2.ClipSpec) -> dict[str, Any]:
    budget = clip.tokenization.WhichOneof("budget")
    return {
        "model": clip.model,
        "prompt": clip.prompt,
        "negative_prompt": clip.negative_prompt,
        "width": clip.width,
        "height": clip.height,
        "frames": clip.frames,
        "fps": clip.fps,
        "steps": clip.steps,
        "guidance": clip.guidance_scale,
        "shift": clip.shift,
        "seed": clip.seed,
        "fit": enum_name(clip_pb2.Fit.DESCRIPTOR, "FIT_", clip.fit),
        "styles": tuple(map(Style.from_proto, clip.styles)),
        "tokenization": "cat" if clip.tokenization.mode == clip_pb2.Tokenization.CAT else "uniform",
        "prompt_as_is": clip.prompt_as_is,
        "asked_keep_ratio": clip.tokenization.keep_ratio if budget == "keep_ratio" else None,
        "target_psnr_db": clip.tokenization.target_psnr_db if budget == "target_psnr_db" else None,
        "run_steps": clip.run_steps if clip.HasField("run_steps") else None,
    }


def enum_name(enum: EnumDescriptor, prefix: str, value: int) -> str:
    """A value of a protobuf enum in the words of this package, e.g. "vae_decode" for STAGE_VAE_DECODE."""
    # A server newer than this client may send a value that has no name here.
    known = enum.values_by_number.get(value)
    return known.name.removeprefix(prefix).lower() if known else str(value)
