"""Every metric of the server, by Prometheus' conventions; docs/metrics.md is made from it.

Job ids, prompts and paths are never labels, and what callers name (tenants, styles) is held to a few values by
`labels.Names`. Everything is counted where it happens: a scrape reads numbers and asks nobody.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from google.protobuf import timestamp_pb2
from google.rpc import code_pb2
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

from cinecat.engines.backends.store_events import Outcome
from cinecat.engines.messages import Decoded, EngineCacheEvent, SlotUse, StageTime, Stepped, StepShape
from cinecat.server.labels import Names, jobs_label, tokens_label
from cinecat.server.lifecycle import FINAL_STATES, TRANSITIONS, state_name
from cinecat.server.request_options import is_interactive
from cinecat.v1 import clip_pb2, models_pb2
from cinecat.v1 import job_pb2 as pb

if TYPE_CHECKING:
    from cinecat.server.lifecycle import State

MOST_TENANTS, MOST_STYLES = 50, 100
"""That have series of their own; all later ones share one."""

PRIORITIES = ("interactive", "batch")

QUANTA = ("begin", "step", "decode", "evict")
"""Kinds of what the scheduler lets the engine core do."""

MEMORY_KINDS = ("resident", "allocated", "peak", "available")

REPLICA_STATES = ("loading", "ready", "restarting", "draining")
"""What the engine core of a replica is about; one that has left is in none."""

REMOVALS = ("age", "size", "orphan")
"""Reasons for which retention removes a job."""

# From a preview of a tenth of a second to a render of half an hour.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)
_STEP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATIOS = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics:
    """The server's metrics in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tenants, self._styles = Names(MOST_TENANTS), Names(MOST_STYLES)
        self._loaded: dict[str, tuple[str, ...]] = {}
        # The time when each series began would be a series more, which nothing here reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"cinecat_{name}", help_text, labels, registry=registry)

        def gauge(name: str, help_text: str, *labels: str) -> Gauge:
            return Gauge(f"cinecat_{name}", help_text, labels, registry=registry)

        def histogram(name: str, help_text: str, *labels: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"cinecat_{name}", help_text, labels, buckets=buckets, registry=registry)

        self.ready = gauge("ready", "1 while jobs are taken and some replica can work on them.")
        self.build_info = gauge("build_info", "1; the labels tell what is running.", "version", "python", "torch")
        self.model_info = gauge(
            "model_info", "1; the labels tell what is loaded.", "model", "family", "device", "dtype", "engine"
        )

        self.replicas = gauge(
            "replicas",
            "Engine cores of a model: loading, ready, restarting after a death, or draining.",
            "model",
            "state",
        )

        self.jobs = gauge("jobs", "Jobs that have not ended.", "state")
        self.jobs_accepted = counter("jobs_accepted", "Jobs that were accepted.", "priority")
        self.jobs_ended = counter("jobs_ended", "Jobs that have ended.", "outcome", "priority")
        self.job_seconds = histogram("job_seconds", "From acceptance to the end of a job.", "outcome", "priority")
        self.job_errors = counter("job_errors", "Jobs that failed, by the state that they failed in.", "code", "state")
        self.requests_refused = counter("requests_refused", "RPCs answered with an error status.", "method", "code")
        self.queue_depth = gauge("queue_depth", "Jobs waiting for an engine core.", "priority")
        self.queue_limit = gauge("queue_limit", "Jobs that may wait; one more is refused.")
        self.queue_seconds = histogram("queue_seconds", "From acceptance to the first work on a job.", "priority")
        self.first_preview_seconds = histogram(
            "first_preview_seconds", "From acceptance to the first picture of an unfinished clip.", "priority"
        )
        self.first_frame_seconds = histogram(
            "first_frame_seconds", "From acceptance to the first decoded frames.", "priority"
        )
        self.stage_seconds = histogram("stage_seconds", "Time of a job that succeeded in one stage.", "stage", "cached")
        self.jobs_removed = counter(
            "jobs_removed",
            "Jobs removed for their age or for the size of all clips, or of which only files were left.",
            "reason",
        )

        self.quantum_seconds = histogram(
            "quantum_seconds", "What the scheduler let the engine core do between two decisions.", "kind"
        )
        self.step_seconds = histogram(
            "step_seconds",
            "One denoising step of all jobs that share it, both guidance branches included. bucket: the power of two "
            "that the tokens of a row do not exceed; jobs: that their number does not exceed, or 16 for more.",
            "tokenization",
            "bucket",
            "jobs",
            buckets=_STEP_SECONDS,
        )
        self.communication_seconds = counter(
            "communication_seconds",
            "Time that the first rank of a replica spent in exchanges with the others.",
        )
        self.communication_bytes = counter(
            "communication_bytes", "What the first rank of a replica sent to the others."
        )
        self.step_jobs = histogram("step_jobs", "Jobs that shared one step.", buckets=(1, 2, 3, 4, 6, 8, 16))
        self.cached_steps = counter(
            "cached_steps", "Denoising steps of jobs that ran no model, but carried its last predictions on."
        )
        self.engine_steps = counter("engine_steps", "Denoising steps of jobs by the backend that ran them.", "engine")
        self.tokens = counter("tokens", "Tokens that were denoised, of all rows and steps.", "tokenization")
        self.tokens_uniform = counter(
            "tokens_uniform", "Tokens that the uniform path takes for the same rows and steps.", "tokenization"
        )
        self.frames = counter("frames", "Frames of finished clips.", "tokenization")
        self.megapixels = counter("megapixels", "Megapixels of the frames of finished clips.", "tokenization")
        self.keep_ratio = histogram(
            "keep_ratio", "Tokens of a finished CAT clip over those of the uniform path.", buckets=_RATIOS
        )
        self.preemptions = counter(
            "preemptions", "Jobs sent out of the engine core so that a more urgent one could come in."
        )
        self.resumes = counter("resumes", "Jobs that went on from a checkpoint instead of from the beginning.")
        self.checkpoint_seconds = histogram("checkpoint_seconds", "Writing one checkpoint.")
        self.tenant_device_seconds = counter(
            "tenant_device_seconds",
            f"Time of the engine core by tenant: the first {MOST_TENANTS} that came, other, or none.",
            "tenant",
        )
        self.style_device_seconds = counter(
            "style_device_seconds",
            f"Time of the engine core by style: the first {MOST_STYLES} that came, other, or none. A clip that wears "
            "several counts for each.",
            "style",
        )

        self.style_slots = gauge("style_slots", "Styles that may be resident at once, of all engine cores.")
        self.style_slots_resident = gauge(
            "style_slots_resident", "Slots that hold a style or a stack of them, of all engine cores."
        )
        self.style_slot_hits = counter(
            "style_slot_hits", "Styles or stacks that were resident when a job came for them."
        )
        self.style_slot_loads = counter("style_slot_loads", "Styles or stacks that were written into a slot.")
        self.style_slot_evictions = counter("style_slot_evictions", "Styles or stacks that gave way in a slot.")
        self.style_swap_seconds = histogram("style_swap_seconds", "Making one style or stack resident.")

        self.engine_cache = counter(
            "engine_cache", "What happened in the cache of built engines, as this server saw it.", "outcome"
        )
        self.engine_build_seconds = histogram("engine_build_seconds", "Building one engine.")
        self.engine_building = gauge(
            "engine_building",
            "Engine cores for which the engine that the settings name is being built while torch stands in.",
        )
        self.core_restarts = counter("core_restarts", "Engine cores started after one died.")
        self.core_memory = gauge(
            "core_memory_bytes",
            "Memory as the engine cores last saw it, summed over them: resident of their processes, and allocated, at "
            "its peak and available of their devices (a CPU is its host, and counts for each core on it).",
            "kind",
        )
        self._begin_at_zero()
        # Of the front's process: CPU seconds, resident memory, open files.
        ProcessCollector(registry=registry)

    def _begin_at_zero(self) -> None:
        """Series whose labels are known from the start are there from the start: 0 says that it has not happened yet,
        and `rate` sees the first time that it does.
        """
        for state in TRANSITIONS.keys() - FINAL_STATES:
            self.jobs.labels(state_name(state))
        for priority in PRIORITIES:
            self.queue_depth.labels(priority)
            self.jobs_accepted.labels(priority)
            for latency in (self.queue_seconds, self.first_preview_seconds, self.first_frame_seconds):
                latency.labels(priority)
            for outcome in map(state_name, FINAL_STATES):
                self.jobs_ended.labels(outcome, priority)
                self.job_seconds.labels(outcome, priority)
        for mode in clip_pb2.Tokenization.UNIFORM, clip_pb2.Tokenization.CAT:
            for count in (self.tokens, self.tokens_uniform, self.frames, self.megapixels):
                count.labels(_mode_name(mode))
        for kind in QUANTA:
            self.quantum_seconds.labels(kind)
        for happened in Outcome:
            self.engine_cache.labels(happened.value)
        for reason in REMOVALS:
            self.jobs_removed.labels(reason)

    def job_accepted(self, job: pb.Job) -> None:
        self.jobs_accepted.labels(priority_name(job)).inc()

    def job_entered(self, state: State) -> None:
        """A job is among those that have not ended: it was accepted, or brought back after a restart."""
        self.jobs.labels(state_name(state)).inc()

    def job_moved(self, before: pb.Job, job: pb.Job) -> None:
        """A transition was stored. `before` is the job as it was."""
        priority = priority_name(job)
        self.jobs.labels(state_name(before.state)).dec()
        if job.state not in FINAL_STATES:
            self.jobs.labels(state_name(job.state)).inc()
            if job.HasField("start_time") and not before.HasField("start_time"):
                self.queue_seconds.labels(priority).observe(_seconds_between(job.create_time, job.start_time))
            return
        outcome = state_name(job.state)
        self.jobs_ended.labels(outcome, priority).inc()
        self.job_seconds.labels(outcome, priority).observe(_seconds_between(job.create_time, job.end_time))
        if job.state == pb.JOB_STATE_FAILED:
            self.job_errors.labels(code_pb2.Code.Name(job.error.code), state_name(before.state)).inc()
        elif job.state == pb.JOB_STATE_SUCCEEDED:
            self._clip_finished(job)

    def _clip_finished(self, job: pb.Job) -> None:
        clip, tokenization = job.clip, tokenization_name(job.clip)
        self.frames.labels(tokenization).inc(clip.frames)
        self.megapixels.labels(tokenization).inc(clip.frames * clip.width * clip.height / 1e6)
        if clip.tokenization.mode == clip_pb2.Tokenization.CAT:
            self.keep_ratio.observe(job.result.keep_ratio)

    def first_preview(self, job: pb.Job) -> None:
        self.first_preview_seconds.labels(priority_name(job)).observe(_age(job))

    def first_frame(self, job: pb.Job) -> None:
        self.first_frame_seconds.labels(priority_name(job)).observe(_age(job))

    def stage(self, timing: StageTime) -> None:
        self.stage_seconds.labels(timing.stage, str(timing.cached).lower()).observe(timing.seconds)

    def stepped(self, clips: Sequence[clip_pb2.ClipSpec], shape: StepShape, stepped: Stepped) -> None:
        """A step of jobs that shared a forward."""
        seconds = stepped.seconds
        self.communicated(stepped)
        if not shape.tokens:
            self.cached_steps.inc(len(clips))
            return
        # Rows of one shape are of one path: a CAT clip that keeps all its tokens may share with a uniform one.
        tokenization = tokenization_name(clips[0])
        self.step_seconds.labels(tokenization, tokens_label(shape.tokens), jobs_label(len(clips))).observe(seconds)
        self.step_jobs.observe(len(clips))
        self.engine_steps.labels(shape.engine).inc(len(clips))

    def communicated(self, quantum: Stepped | Decoded) -> None:
        """What exchanges between ranks took of a quantum."""
        self.communication_seconds.inc(quantum.communication_seconds)
        self.communication_bytes.inc(quantum.communication_bytes)

    def denoised(self, clip: clip_pb2.ClipSpec, tokens: int, tokens_uniform: int) -> None:
        """One job's part of a step: tokens of all its rows, and what the uniform path takes."""
        tokenization = tokenization_name(clip)
        self.tokens.labels(tokenization).inc(tokens)
        self.tokens_uniform.labels(tokenization).inc(tokens_uniform)

    def charged(self, tenant: str, clip: clip_pb2.ClipSpec, seconds: float) -> None:
        """Time of the engine core that one job took."""
        self.tenant_device_seconds.labels(self._tenants.label(tenant)).inc(seconds)
        for style in {style.name for style in clip.styles if style.strength} or {""}:
            self.style_device_seconds.labels(self._styles.label(style)).inc(seconds)

    def slots_used(self, use: SlotUse) -> None:
        """What one call did with the style slots."""
        self.style_slot_hits.inc(use.hits)
        self.style_slot_loads.inc(len(use.swap_seconds))
        self.style_slot_evictions.inc(use.evictions)
        for seconds in use.swap_seconds:
            self.style_swap_seconds.observe(seconds)

    def engine_event(self, event: EngineCacheEvent) -> None:
        self.engine_cache.labels(event.outcome).inc()
        if event.seconds:
            self.engine_build_seconds.observe(event.seconds)

    def loaded(self, model: models_pb2.Model) -> None:
        """What is served, and on which engine from now on."""
        self.unloaded(model)
        labels = self._loaded[model.name] = (model.name, model.family, model.device, model.dtype, model.engine)
        self.model_info.labels(*labels).set(1)
        for state in REPLICA_STATES:
            self.replicas.labels(model.name, state)

    def unloaded(self, model: models_pb2.Model) -> None:
        """A model is no longer served."""
        if (labels := self._loaded.pop(model.name, None)) is not None:
            self.model_info.remove(*labels)


def priority_name(job: pb.Job) -> str:
    return PRIORITIES[not is_interactive(job)]


def tokenization_name(clip: clip_pb2.ClipSpec) -> str:
    return _mode_name(clip.tokenization.mode)


def _mode_name(mode: clip_pb2.Tokenization.Mode.ValueType) -> str:
    return clip_pb2.Tokenization.Mode.Name(mode).lower()


def _age(job: pb.Job) -> float:
    return max(0.0, time.time() - job.create_time.ToNanoseconds() / 1e9)


def _seconds_between(start: timestamp_pb2.Timestamp, end: timestamp_pb2.Timestamp) -> float:
    """Clocks can be set back; a time is never negative."""
    return max(0.0, (end.ToNanoseconds() - start.ToNanoseconds()) / 1e9)
