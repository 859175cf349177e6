"""The metrics tell how many jobs there are and where time goes, with few labels."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from random import Random

from google.rpc import code_pb2
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from cinecat.engines.messages import StageTime, Stepped, StepShape
from cinecat.server.labels import jobs_label, tokens_label
from cinecat.server.lifecycle import FINAL_STATES, state_name
from cinecat.server.metrics import MOST_STYLES, MOST_TENANTS, QUANTA, Metrics
from cinecat.server.scheduler import _QUANTA
from cinecat.v1 import clip_pb2, generation_pb2, models_pb2, styles_pb2
from cinecat.v1 import job_pb2 as pb
from tests.server import metrics_table
from tests.server.samples import PATH_TO_SUCCESS, front, move, new_job

LABELS = {
    *("bucket", "cached", "code", "device", "dtype", "engine", "family", "jobs", "kind", "method", "model", "outcome"),
    *("priority", "python", "reason", "stage", "state", "style", "tenant", "tokenization", "torch", "version"),
}
"""All that are allowed; each takes few values by its nature or by `labels.Names`."""


SERVICES = [
    service
    for file in (generation_pb2, styles_pb2, models_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
]


def jobs_by_state(registry: CollectorRegistry) -> dict[str, float]:
    """Without the states in which there are none."""
    (family,) = [family for family in registry.collect() if family.name == "cinecat_jobs"]
    return {sample.labels["state"]: sample.value for sample in family.samples if sample.value}


def ended(registry: CollectorRegistry, outcome: str) -> float | None:
    return registry.get_sample_value("cinecat_jobs_ended_total", {"outcome": outcome, "priority": "interactive"})


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
                labels = {"outcome": outcome, "priority": "interactive"}
                assert f.registry.get_sample_value("cinecat_job_seconds_count", labels) == 1

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
            assert ended(f.registry, "succeeded") == 0

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


def test_what_has_not_happened_yet_is_told_as_zero() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    for name, labels in (
        ("cinecat_jobs", {"state": "queued"}),
        ("cinecat_jobs_ended_total", {"outcome": "failed", "priority": "batch"}),
        ("cinecat_quantum_seconds_count", {"kind": "evict"}),
        ("cinecat_tokens_total", {"tokenization": "cat"}),
        ("cinecat_engine_cache_total", {"outcome": "built"}),
    ):
        assert registry.get_sample_value(name, labels) == 0


def test_the_kinds_of_quanta_are_the_schedulers() -> None:
    assert set(QUANTA) == set(_QUANTA.values())


def test_labels_are_the_allowed_ones_and_metrics_are_explained() -> None:
    assert {label for metric in metrics_table.metrics() for label in metric._labelnames} == LABELS
    assert all(metric._documentation.endswith(".") for metric in metrics_table.metrics())


def test_the_table_in_the_documentation_is_current() -> None:
    assert metrics_table.DOCUMENT.read_text() == metrics_table.document(), "python -m tests.server.metrics_table"


def series(registry: CollectorRegistry) -> int:
    return sum(len(family.samples) for family in registry.collect())


def test_series_stay_few_however_many_names_come() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    random = Random(0)
    sizes = []
    for number in range(10_000):
        job = new_job(f"job-{number}")
        job.state, job.priority = pb.JOB_STATE_QUEUED, random.choice(pb.Priority.values())
        job.clip.prompt = f"prompt {number}"
        job.clip.tokenization.mode = random.choice(clip_pb2.Tokenization.Mode.values())
        job.clip.styles.add(name=f"style-{number}", strength=1.0)
        before = pb.Job()
        before.CopyFrom(job)
        metrics.job_accepted(job)
        metrics.job_entered(job.state)
        job.start_time.GetCurrentTime()
        job.state = pb.JOB_STATE_CONDITIONING
        metrics.job_moved(before, job)
        before.CopyFrom(job)
        shape = StepShape("torch", random.randrange(1, 700_000))
        metrics.stepped([job.clip] * random.randrange(1, 257), shape, Stepped(random.random(), ()))
        metrics.charged(f"tenant-{number}", job.clip, 1.0)
        job.state = random.choice(list(FINAL_STATES))
        metrics.job_moved(before, job)
        sizes.append(series(registry) if number in (7_499, 9_999) else 0)
    assert sizes[9_999] <= 1.03 * sizes[7_499] < 3_000
    text = generate_latest(registry)
    assert b"job-" not in text
    assert b"prompt " not in text
    assert (
        registry.get_sample_value("cinecat_tenant_device_seconds_total", {"tenant": "other"}) == 10_000 - MOST_TENANTS
    )
    assert registry.get_sample_value("cinecat_style_device_seconds_total", {"style": "other"}) == 10_000 - MOST_STYLES


def test_a_scrape_of_every_series_that_there_can_be_stays_small() -> None:
    """What a scrape costs grows with its size, and that is bounded whatever is asked of a server, and for how long."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    empty = len(generate_latest(registry))
    clips = [clip_pb2.ClipSpec(tokenization=clip_pb2.Tokenization(mode=mode)) for mode in (1, 2)]
    for clip, power, jobs in itertools.product(clips, range(25), range(1, 257)):
        metrics.stepped([clip] * jobs, StepShape("torch", 1 << power), Stepped(1.0, ()))
    for number in range(1_000):
        clip = clip_pb2.ClipSpec()
        clip.styles.add(name=f"style-{number}".ljust(64, "x"), strength=1.0)
        metrics.charged(f"tenant-{number}".ljust(64, "x"), clip, 1.0)
    for name, cached in itertools.product(pb.Stage.keys(), (False, True)):
        metrics.stage(StageTime(name.lower(), 1.0, cached))
    for state, priority, final in itertools.product(pb.JobState.values(), pb.Priority.values(), FINAL_STATES):
        for code in code_pb2.Code.values():
            before, job = (pb.Job(state=each, priority=priority, clip=clips[1]) for each in (state, final))
            job.error.code = code
            metrics.job_accepted(job)
            metrics.job_entered(state)
            metrics.job_moved(before, job)
    methods = [method.name for service in SERVICES for method in service.methods]
    for method, code in itertools.product(methods, code_pb2.Code.keys()):
        metrics.requests_refused.labels(method, code).inc()
    assert empty < len(generate_latest(registry)) < 500_000
    assert series(registry) < 6_000


@given(st.integers(1, 2_000_000), st.integers(1, 300))
def test_a_rounded_label_is_the_next_power_of_two(tokens: int, jobs: int) -> None:
    shown = int(tokens_label(tokens))
    assert shown == 1 << 20 or shown / 2 < tokens <= shown
    together = int(jobs_label(jobs))
    assert (together == 16 and jobs > 8) or together / 2 < jobs <= together
