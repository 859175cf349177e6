"""A server that plays a script: what each stream sends and where it breaks off. It records what it is asked."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2

from cinecat.v1 import clip_pb2, generation_pb2, job_pb2, models_pb2, styles_pb2
from cinecat.v1.generation_pb2_grpc import GenerationServicer, add_GenerationServicer_to_server
from cinecat.v1.models_pb2_grpc import ModelsServicer, add_ModelsServicer_to_server
from cinecat.v1.styles_pb2_grpc import StylesServicer, add_StylesServicer_to_server

PNG = b"\x89PNG\r\n\x1a\n and so on"
MP4 = bytes(range(256)) * 40
FRAMES = b"safetensors"


@dataclass(frozen=True)
class Break:
    """The stream breaks off here."""

    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    details: str = "scripted break"
    trailer: bytes = b""


@dataclass(frozen=True)
class Hold:
    """The stream says nothing until the job is cancelled."""


Step = job_pb2.JobEvent | generation_pb2.DownloadChunk | Break | Hold


def job(state: int, **fields: object) -> job_pb2.Job:
    clip = clip_pb2.ClipSpec(model="wan-tiny", width=64, height=48, frames=5, fps=8, steps=4, guidance_scale=5, seed=7)
    clip.prompt = "a cat"
    clip.styles.add(name="noir", version="1.0", strength=0.8)
    clip.styles.add(name="amber", version="1.0", strength=0.5)
    clip.tokenization.mode = clip_pb2.Tokenization.UNIFORM
    return job_pb2.Job(job_id="job-1", state=state, clip=clip, **fields)


def denoising(sequence: int, step: int = 1) -> job_pb2.JobEvent:
    progress = job_pb2.JobProgress(step=step, total_steps=4, total_frames=5)
    progress.eta.FromMilliseconds(2500)
    return job_pb2.JobEvent(sequence=sequence, job=job(job_pb2.JOB_STATE_DENOISING, progress=progress))


def with_preview(event: job_pb2.JobEvent, step: int, *indices: int) -> job_pb2.JobEvent:
    """`event` with pictures of these frames; each one says what it is of."""
    frames = [job_pb2.PreviewFrame(index=index, webp=picture(step, index)) for index in indices]
    event.preview.CopyFrom(job_pb2.Preview(step=step, frames=frames))
    return event


def picture(step: int, index: int) -> bytes:
    return f"step {step}, frame {index}".encode()


def succeeded(sequence: int) -> job_pb2.JobEvent:
    return job_pb2.JobEvent(sequence=sequence, job=succeeded_job())


def succeeded_job(sha: str = "") -> job_pb2.Job:
    result = job_pb2.ClipResult(
        tokens_used=12, tokens_uniform=24, engine="torch", step_tokens=[24, 8, 8, 8], keep_ratio=0.5
    )
    result.artifacts.add(
        name="clip.mp4",
        format=clip_pb2.ARTIFACT_FORMAT_MP4_H264,
        mime_type="video/mp4",
        size_bytes=len(MP4),
        sha256=sha or sha256(MP4).hexdigest(),
    )
    result.artifacts.add(
        name="frames.safetensors",
        format=clip_pb2.ARTIFACT_FORMAT_FRAMES_F32,
        size_bytes=len(FRAMES),
        sha256=sha256(FRAMES).hexdigest(),
    )
    result.timings.add(stage=job_pb2.STAGE_DENOISE).duration.FromMilliseconds(1500)
    result.timings.add(stage=job_pb2.STAGE_TEXT_ENCODE, cached=True).duration.FromMilliseconds(1)
    return job(job_pb2.JOB_STATE_SUCCEEDED, result=result, notes=["image: cropped"])


def failed(sequence: int) -> job_pb2.JobEvent:
    error = job_pb2.JobError(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="out of [memory]")
    return job_pb2.JobEvent(sequence=sequence, job=job(job_pb2.JOB_STATE_FAILED, error=error))


def cancelled(sequence: int) -> job_pb2.JobEvent:
    return job_pb2.JobEvent(sequence=sequence, job=job(job_pb2.JOB_STATE_CANCELLED))


def chunk(start: int, stop: int, data: bytes = MP4) -> generation_pb2.DownloadChunk:
    return generation_pb2.DownloadChunk(offset=start, data=data[start:stop], total_size_bytes=len(data))


def bad_request(code: grpc.StatusCode, *violations: tuple[str, str]) -> Break:
    body = error_details_pb2.BadRequest()
    for name, description in violations:
        body.field_violations.add(field=name, description=description)
    status = status_pb2.Status(code=code.value[0], message="refused")
    detail = Any()
    detail.Pack(body)
    status.details.append(detail)
    return Break(code, "refused", status.SerializeToString())


@dataclass
class Script(GenerationServicer, StylesServicer, ModelsServicer):
    """Each call of a streaming method plays the next of its streams; a unary method answers the same every time.

    Attributes:
        early_break: what InstallStyle answers to the first message, every time: an answer that meets a client that
            still writes may be lost, and then the client sends again. The other breaks wait for the last message.
    """

    generate: deque[list[Step]] = field(default_factory=deque)
    watch: deque[list[Step]] = field(default_factory=deque)
    download: deque[list[Step]] = field(default_factory=deque)
    unary_breaks: deque[Break] = field(default_factory=deque)
    early_break: Break | None = None
    finished_job: job_pb2.Job = field(default_factory=succeeded_job)
    asked: list[object] = field(default_factory=list)
    tenants: list[str | None] = field(default_factory=list)
    uploads: list[list[styles_pb2.InstallStyleRequest]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def requests(self, kind: type) -> list[object]:
        return [request for request in self.asked if isinstance(request, kind)]

    def Generate(self, request: object, context: grpc.ServicerContext) -> Iterator[object]:  # noqa: N802
        return self._play(self.generate, request, context)

    def Watch(self, request: object, context: grpc.ServicerContext) -> Iterator[object]:  # noqa: N802
        return self._play(self.watch, request, context)

    def Download(self, request: object, context: grpc.ServicerContext) -> Iterator[object]:  # noqa: N802
        return self._play(self.download, request, context)

    def Submit(self, request: object, context: grpc.ServicerContext) -> job_pb2.Job:  # noqa: N802
        self._answer(request, context)
        return job(job_pb2.JOB_STATE_QUEUED, detached=True)

    def GetJob(self, request: object, context: grpc.ServicerContext) -> job_pb2.Job:  # noqa: N802
        self._answer(request, context)
        return self.finished_job

    def CancelJob(self, request: object, context: grpc.ServicerContext) -> job_pb2.Job:  # noqa: N802
        self._answer(request, context)
        self.cancelled.set()
        return job(job_pb2.JOB_STATE_DENOISING)

    def ListJobs(  # noqa: N802
        self, request: generation_pb2.ListJobsRequest, context: grpc.ServicerContext
    ) -> generation_pb2.ListJobsResponse:
        self._answer(request, context)
        if request.page_token:
            return generation_pb2.ListJobsResponse(jobs=[job(job_pb2.JOB_STATE_QUEUED)])
        return generation_pb2.ListJobsResponse(jobs=[self.finished_job], next_page_token="second")

    def ListStyles(  # noqa: N802
        self, request: styles_pb2.ListStylesRequest, context: grpc.ServicerContext
    ) -> styles_pb2.ListStylesResponse:
        self._answer(request, context)
        problems = [styles_pb2.StyleProblem(folder="broken", reason="no style.toml")]
        if request.page_token:
            return styles_pb2.ListStylesResponse(styles=[_style("noir")], problems=problems)
        return styles_pb2.ListStylesResponse(styles=[_style("amber")], problems=problems, next_page_token="second")

    def GetStyle(self, request: styles_pb2.GetStyleRequest, context: grpc.ServicerContext) -> styles_pb2.Style:  # noqa: N802
        self._answer(request, context)
        return _style(request.name)

    def InstallStyle(  # noqa: N802
        self, request_iterator: Iterator[styles_pb2.InstallStyleRequest], context: grpc.ServicerContext
    ) -> styles_pb2.InstallStyleResponse:
        self._note_tenant(context)
        parts = []
        for part in request_iterator:
            parts.append(part)
            if self.early_break is not None:
                _break(self.early_break, context)
        if self.unary_breaks:
            _break(self.unary_breaks.popleft(), context)
        self.uploads.append(parts)
        return styles_pb2.InstallStyleResponse(style=_style(_sent_name(parts)), notes=["made for [another] model"])

    def RemoveStyle(  # noqa: N802
        self, request: styles_pb2.RemoveStyleRequest, context: grpc.ServicerContext
    ) -> styles_pb2.RemoveStyleResponse:
        self._answer(request, context)
        style = _style(request.name)
        style.jobs = 2
        return styles_pb2.RemoveStyleResponse(style=style)

    def WarmStyle(self, request: styles_pb2.WarmStyleRequest, context: grpc.ServicerContext) -> styles_pb2.Style:  # noqa: N802
        self._answer(request, context)
        style = _style(request.name)
        style.residency.slots.append(3)
        return style

    def ListModels(self, request: object, context: grpc.ServicerContext) -> models_pb2.ListModelsResponse:  # noqa: N802
        self._answer(request, context)
        model = models_pb2.Model(name="wan-tiny", engine="torch", tokenizations=[clip_pb2.Tokenization.UNIFORM])
        return models_pb2.ListModelsResponse(models=[model])

    def _note_tenant(self, context: grpc.ServicerContext) -> None:
        sent = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        self.tenants.append(sent.get("cinecat-tenant"))

    def _answer(self, request: object, context: grpc.ServicerContext) -> None:
        self._note_tenant(context)
        self.asked.append(request)
        if self.unary_breaks:
            _break(self.unary_breaks.popleft(), context)

    def _play(self, streams: deque[list[Step]], request: object, context: grpc.ServicerContext) -> Iterator[object]:
        self._note_tenant(context)
        self.asked.append(request)
        for step in streams.popleft():
            if isinstance(step, Break):
                _break(step, context)
            elif isinstance(step, Hold):
                self.cancelled.wait(30)
            else:
                yield step


def start(script: Script) -> tuple[grpc.Server, str]:
    """A running server that plays `script`, and its address."""
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 64 * 1024**2)])
    add_GenerationServicer_to_server(script, server)
    add_StylesServicer_to_server(script, server)
    add_ModelsServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


def _style(name: str) -> styles_pb2.Style:
    # The title tries to be markup and to drive the terminal.
    style = styles_pb2.Style(
        name=name,
        version="1.0",
        title="[red]hot\x1b[2J",
        default_strength=0.8,
        compatible=True,
        trigger_words=["rain"],
        origin=styles_pb2.STYLE_ORIGIN_INSTALLED,
        sampler=styles_pb2.SamplerDefaults(steps=4),
        ignored_key_count=2,
    )
    style.ignored_keys.add(key="img_emb", reason="not a layer")
    style.preview.file_name = "rain.png"
    style.preview.data = b"a picture"
    return style


def _sent_name(parts: list[styles_pb2.InstallStyleRequest]) -> str:
    return parts[0].upload.fields.name or "from-toml"


def _break(step: Break, context: grpc.ServicerContext) -> None:
    if step.trailer:
        context.set_trailing_metadata((("grpc-status-details-bin", step.trailer),))
    context.abort(step.code, step.details)
