"""Every metric of the server, by Prometheus' conventions. Job ids, prompts and paths are never labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cinecat.engines.messages import StageTime
from cinecat.server.lifecycle import FINAL_STATES, state_name
from cinecat.v1 import job_pb2 as pb

if TYPE_CHECKING:
    from cinecat.server.lifecycle import State

# From a cached look-up to a half-hour render.
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)


class Metrics:
    """The server's metrics in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.jobs = Gauge("cinecat_jobs", "Jobs that have not ended.", ["state"], registry=registry)
        self.jobs_ended = Counter("cinecat_jobs_ended", "Jobs that have ended.", ["outcome"], registry=registry)
        self.job_seconds = Histogram(
            "cinecat_job_seconds",
            "From acceptance to the end of a job.",
            ["outcome"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "cinecat_stage_seconds",
            "Time of one job in one stage.",
            ["stage", "cached"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.step_seconds = Histogram(
            "cinecat_step_seconds",
            "One denoising step, both guidance branches included.",
            ["tokenization"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.engine_steps = Counter(
            "cinecat_engine_steps", "Denoising steps by the backend that ran them.", ["engine"], registry=registry
        )
        self.engine_building = Gauge(
            "cinecat_engine_building",
            "1 while the engine that the settings name is being built and torch stands in.",
            registry=registry,
        )
        self.step_jobs = Histogram(
            "cinecat_step_jobs", "Jobs that shared one step.", buckets=(1, 2, 3, 4, 6, 8, 16), registry=registry
        )
        self.preemptions = Counter(
            "cinecat_preemptions",
            "Jobs sent out of the engine core so that a more urgent one could come in.",
            registry=registry,
        )
        self.resumes = Counter(
            "cinecat_resumes", "Jobs that went on from a checkpoint instead of from the beginning.", registry=registry
        )
        self.checkpoint_seconds = Histogram(
            "cinecat_checkpoint_seconds", "Writing one checkpoint.", buckets=_SECONDS, registry=registry
        )
        self.jobs_removed = Counter(
            "cinecat_jobs_removed",
            "Jobs removed for their age or for the size of all clips, or of which only files were left.",
            ["reason"],
            registry=registry,
        )
        self.queue_depth = Gauge("cinecat_queue_depth", "Jobs waiting for the engine core.", registry=registry)
        self.core_restarts = Counter("cinecat_core_restarts", "Engine cores started after one died.", registry=registry)
        self.requests_refused = Counter(
            "cinecat_requests_refused", "RPCs answered with an error status.", ["method", "code"], registry=registry
        )
        self.ready = Gauge("cinecat_ready", "1 once the warm-up is through and jobs are taken.", registry=registry)

    def job_entered(self, state: State) -> None:
        self.jobs.labels(state_name(state)).inc()

    def job_moved(self, before: State, job: pb.Job) -> None:
        self.jobs.labels(state_name(before)).dec()
        if job.state not in FINAL_STATES:
            self.jobs.labels(state_name(job.state)).inc()
            return
        outcome = state_name(job.state)
        self.jobs_ended.labels(outcome).inc()
        seconds = (job.end_time.ToMicroseconds() - job.create_time.ToMicroseconds()) / 1e6
        self.job_seconds.labels(outcome).observe(max(0.0, seconds))

    def stage(self, timing: StageTime) -> None:
        self.stage_seconds.labels(timing.stage, str(timing.cached).lower()).observe(timing.seconds)
