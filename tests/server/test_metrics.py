"""The metrics tell how many jobs there are and where time goes, with few labels."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from cinecat.engines.messages import StageTime
from cinecat.server.lifecycle import FINAL_STATES, state_name
from cinecat.server.metrics import Metrics
from cinecat.v1 import job_pb2 as pb
from tests.server.samples import PATH_TO_SUCCESS, front, move, new_job

LABELS = {
    "cinecat_jobs": {"state"},
    "cinecat_jobs_ended": {"outcome"},
    "cinecat_job_seconds": {"outcome"},
    "cinecat_stage_seconds": {"stage", "cached"},
    "cinecat_step_seconds": {"tokenization"},
    "cinecat_engine_steps": {"engine"},
    "cinecat_engine_building": set(),
    "cinecat_step_jobs": set(),
    "cinecat_preemptions": set(),
    "cinecat_resumes": set(),
    "cinecat_checkpoint_seconds": set(),
    "cinecat_jobs_removed": {"reason"},
    "cinecat_queue_depth": set(),
    "cinecat_core_restarts": set(),
    "cinecat_requests_refused": {"method", "code"},
    "cinecat_ready": set(),
}


def jobs_by_state(registry: CollectorRegistry) -> dict[str, float]:
    """Without the states in which there are none."""
    (family,) = [family for family in registry.collect() if family.name == "cinecat_jobs"]
    return {sample.labels["state"]: sample.value for sample in family.samples if sample.value}


def ended(registry: CollectorRegistry, outcome: str) -> float | None:
    return registry.get_sample_value("cinecat_jobs_ended_total", {"outcome": outcome})


def test_counts_agree_with_the_jobs_after_every_transition(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            first, second, third = [await f.accept(new_job()) for _ in range(3)]
            assert jobs_by_state(f.registry) == {"queued": 3}
            for state in PATH_TO_SUCCESS[:-1]:
                await f.jobs.transition(first, state)
                assert jobs_by_state(f.registry) == {"queued": 2, state_name(state): 1}
            await f.jobs.transition(first, pb.JOB_STATE_SUCCEEDED)
            assert jobs_by_state(f.registry) == {"queued": 2}
            await f.jobs.cancel(second.job_id)
            await move(f.jobs, third, pb.JOB_STATE_CONDITIONING)
            await f.jobs.requeue(third)
            assert jobs_by_state(f.registry) == {"queued": 1}
            await f.jobs.fail(third, 13, "broken")
            assert jobs_by_state(f.registry) == {}
            assert [ended(f.registry, outcome) for outcome in ("succeeded", "cancelled", "failed")] == [1, 1, 1]
            for outcome in map(state_name, FINAL_STATES):
                assert f.registry.get_sample_value("cinecat_job_seconds_count", {"outcome": outcome}) == 1

    asyncio.run(scenario())


def test_restored_jobs_are_counted_where_they_are(tmp_path: Path) -> None:
    async def before() -> None:
        async with front(tmp_path) as f:
            await f.accept(new_job())
            await move(f.jobs, await f.accept(new_job()), *PATH_TO_SUCCESS[:2])
            await move(f.jobs, await f.accept(new_job()), *PATH_TO_SUCCESS)

    async def after() -> None:
        async with front(tmp_path) as f:
            await f.jobs.restore()
            assert jobs_by_state(f.registry) == {"queued": 2}
            assert ended(f.registry, "succeeded") is None

    asyncio.run(before())
    asyncio.run(after())


def test_stages_are_told_apart_from_their_cached_look_ups() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.stage(StageTime("text_encode", 2.0))
    metrics.stage(StageTime("text_encode", 0.001, cached=True))
    sums = [
        registry.get_sample_value("cinecat_stage_seconds_sum", {"stage": "text_encode", "cached": cached})
        for cached in ("false", "true")
    ]
    assert sums == [2.0, 0.001]


def test_no_metric_has_a_label_that_grows_with_use(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job("a-job-id"))
            await move(f.jobs, live, *PATH_TO_SUCCESS)
            f.metrics.stage(StageTime("mux", 1.0))
            f.metrics.step_seconds.labels("uniform").observe(1.0)
            f.metrics.engine_steps.labels("torch").inc()
            f.metrics.jobs_removed.labels("age").inc()
            f.metrics.requests_refused.labels("Generate", "NOT_FOUND").inc()
            labels: dict[str, set[str]] = {family.name: set() for family in f.registry.collect()}
            for family in f.registry.collect():
                for sample in family.samples:
                    labels[family.name] |= sample.labels.keys() - {"le"}
            assert labels == LABELS
            assert b"a-job-id" not in generate_latest(f.registry)

    asyncio.run(scenario())


def test_every_metric_is_explained() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    assert all(family.documentation.endswith(".") for family in registry.collect())
