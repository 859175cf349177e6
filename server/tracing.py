"""A job's life as an OpenTelemetry trace, sent when the job has ended.

It is made from what is stored of the job, so that a trace is whole also after a restart of the server; only the single
steps of an earlier server are missing. A caller's context, the metadata `traceparent` (W3C Trace Context), is kept with
the job. Without one the trace has the job's id, which has the form of a trace id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from google.rpc import code_pb2

from cinecat.server.lifecycle import state_name
from cinecat.server.live_job import LiveJob
from cinecat.server.metrics import priority_name, tokenization_name
from cinecat.server.settings import SettingsError
from cinecat.v1 import job_pb2 as pb

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer as OtelTracer

    from cinecat.server.lifecycle import State

TRACEPARENT_KEY = "traceparent"

# Version 00, trace id, parent id, flags; neither id may be all zeros.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")

_EXPORT_SECONDS = 5
_FLUSH_SECONDS = 5

# The vocabulary's stages, for the states that a job is in meanwhile.
_STAGES = {
    pb.JOB_STATE_QUEUED: "queue",
    pb.JOB_STATE_CONDITIONING: "condition",
    pb.JOB_STATE_DENOISING: "denoise",
    pb.JOB_STATE_DECODING: "vae_decode",
    pb.JOB_STATE_ENCODING: "mux",
}
_ENCODERS = ("text_encode", "image_encode", "vae_encode")


class Tracer(Protocol):
    """Who hears of jobs that have ended."""

    def ended(self, live: LiveJob) -> None:
        """Takes a job's trace. Neither blocks nor raises."""

    def close(self) -> None:
        """Sends what is left, within seconds."""


class NoTracer:
    """Traces nothing."""

    def ended(self, live: LiveJob) -> None:
        """As `Tracer`."""

    def close(self) -> None:
        """As `Tracer`."""


@dataclass(frozen=True)
class Visit:
    """A time that a job spent in one state, in nanoseconds since 1970."""

    state: State
    start_ns: int
    end_ns: int
    reason: str


def traceparent_of(metadata: Iterable[Any] | None) -> str:
    """The caller's trace context; empty where there is none or, as W3C has it, none that can be read."""
    for key, value in metadata or ():
        if key == TRACEPARENT_KEY and isinstance(value, str) and _TRACEPARENT.fullmatch(value):
            return value
    return ""


def open_tracer(endpoint: str) -> Tracer:
    """A tracer that sends to an OTLP collector over HTTP; to nobody where `endpoint` is empty.

    Headers, such as a collector's credentials, come from OTEL_EXPORTER_OTLP_HEADERS.

    Raises:
        SettingsError: OpenTelemetry is not installed.
    """
    if not endpoint:
        return NoTracer()
    try:
        return OtlpTracer(endpoint)
    except ImportError as error:
        raise SettingsError(
            f"trace_endpoint: OpenTelemetry is not installed ({error}); pip install 'cinecat[otel]', or leave it empty"
        ) from error


def visits(transitions: Sequence[pb.JobEvent]) -> Iterator[Visit]:
    """The states of a job that has ended, one after the other."""
    for event, following in pairwise(transitions):
        start, end = event.time.ToNanoseconds(), following.time.ToNanoseconds()
        yield Visit(event.job.state, start, max(start, end), event.job.progress.wait_reason)


class OtlpTracer:
    """Sends traces in a thread of its own; what a collector does not take in time is dropped."""

    def __init__(self, endpoint: str) -> None:
        """Raises ImportError."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        class JobIds(RandomIdGenerator):
            """A new trace is called after its job."""

            trace_id = 0

            def generate_trace_id(self) -> int:
                return self.trace_id or super().generate_trace_id()

        self._ids = JobIds()
        resource = Resource.create({"service.name": "cinecat", "service.version": version("cinecat")})
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint, timeout=_EXPORT_SECONDS)
        self._processor = BatchSpanProcessor(exporter, export_timeout_millis=_EXPORT_SECONDS * 1000)
        self._provider.add_span_processor(self._processor)
        self._tracer: OtelTracer = self._provider.get_tracer("cinecat")

    def ended(self, live: LiveJob) -> None:
        try:
            self._trace(live)
        except Exception as error:
            live.log.error("no trace", exc_info=error)

    def close(self) -> None:
        if self._processor.force_flush(_FLUSH_SECONDS * 1000):
            self._provider.shutdown()
        # Else its thread is a daemon that ends with the process: waiting once for a dead collector is enough.

    def _trace(self, live: LiveJob) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        job, times = live.job, list(visits(live.transitions))
        context = TraceContextTextMapPropagator().extract({TRACEPARENT_KEY: job.traceparent})
        self._ids.trace_id = int(job.job_id, 16)
        whole = self._tracer.start_span(
            "job",
            context,
            trace.SpanKind.SERVER,
            _attributes(live),
            start_time=times[0].start_ns,
        )
        inside = trace.set_span_in_context(whole)
        encoded = next((visit for visit in times if visit.state == pb.JOB_STATE_CONDITIONING), None)
        for visit in times:
            span = self._tracer.start_span(_STAGES[visit.state], inside, start_time=visit.start_ns)
            if visit.reason:
                span.set_attribute("cinecat.wait_reason", visit.reason)
            if visit is encoded:
                self._encoders(job, visit, trace.set_span_in_context(span))
            for step in live.steps if visit.state == pb.JOB_STATE_DENOISING else ():
                if visit.start_ns <= step.end_ns <= visit.end_ns:
                    span.add_event(
                        "step", {"step": step.step, "tokens": step.tokens, "seconds": step.seconds}, step.end_ns
                    )
            span.end(visit.end_ns)
        if job.state == pb.JOB_STATE_FAILED:
            code = code_pb2.Code.Name(job.error.code)
            whole.set_attribute("cinecat.error_code", code)
            whole.set_status(trace.Status(trace.StatusCode.ERROR, f"{code}: {job.error.message}"))
        whole.end(max(visit.end_ns for visit in times))

    def _encoders(self, job: pb.Job, visit: Visit, context: Any) -> None:
        """Their durations are known, not their times: one after the other, they end with the visit."""
        names = {pb.Stage.Value(f"STAGE_{name.upper()}"): name for name in _ENCODERS}
        timings = [(names[timing.stage], timing) for timing in job.result.timings if timing.stage in names]
        start = visit.end_ns - sum(timing.duration.ToNanoseconds() for _, timing in timings)
        for name, timing in timings:
            end = start + timing.duration.ToNanoseconds()
            span = self._tracer.start_span(name, context, start_time=max(start, visit.start_ns))
            span.set_attribute("cinecat.cached", timing.cached)
            span.end(max(end, visit.start_ns))
            start = end


def _attributes(live: LiveJob) -> dict[str, str | int | float | Sequence[str]]:
    """Without the prompt, which is the customer's."""
    job, clip = live.job, live.job.clip
    return {
        "cinecat.job_id": job.job_id,
        "cinecat.request_id": job.request_id,
        "cinecat.tenant": live.tenant,
        "cinecat.outcome": state_name(job.state),
        "cinecat.priority": priority_name(job),
        "cinecat.model": clip.model,
        "cinecat.styles": [style.name for style in clip.styles],
        "cinecat.width": clip.width,
        "cinecat.height": clip.height,
        "cinecat.frames": clip.frames,
        "cinecat.steps": clip.steps,
        "cinecat.tokenization": tokenization_name(clip),
        "cinecat.engine": job.result.engine,
        "cinecat.keep_ratio": job.result.keep_ratio,
    }
