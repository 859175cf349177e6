"""Rates, quantiles and counts from the text of scrapes."""

from __future__ import annotations

import bisect

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from cinecat.engines.messages import CoreMemory, SlotUse, Stepped, StepShape
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.metrics import Metrics
from cinecat.server.scrapes import ENOUGH_JOBS, ENOUGH_STEPS, History, NotMetrics, Scrape, Window, figures
from cinecat.v1 import clip_pb2
from cinecat.v1 import job_pb2 as pb
from tests.server.samples import new_job

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)


class Server:
    """Its metrics, and scrapes of them."""

    def __init__(self, started: float = 1.0) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        # The front's own, where there is no /proc too.
        if b"process_start_time_seconds" not in generate_latest(self.registry):
            Gauge("process_start_time_seconds", "Start.", registry=self.registry).set(started)

    def scrape(self, at: float) -> Scrape:
        return Scrape.of(generate_latest(self.registry).decode(), at)

    def steps(self, number: int, mode: clip_pb2.Tokenization.Mode.ValueType, tokens: int, together: int = 1) -> None:
        clip = clip_pb2.ClipSpec(tokenization=clip_pb2.Tokenization(mode=mode))
        for _ in range(number):
            self.metrics.stepped([clip] * together, StepShape("torch", tokens), Stepped(0.5, ()))
            for _ in range(together):
                self.metrics.denoised(clip, tokens, 320)

    def ends(self, jobs: int, seconds: int = 3) -> None:
        for _ in range(jobs):
            before, job = new_job(), new_job()
            before.state, job.state = pb.JOB_STATE_ENCODING, pb.JOB_STATE_SUCCEEDED
            job.end_time.FromSeconds(job.create_time.seconds + seconds)
            self.metrics.job_moved(before, job)


def seen(*scrapes: Scrape) -> History:
    history = History()
    for scrape in scrapes:
        history.add(scrape)
    return history


def test_rates_are_differences_of_two_scrapes_over_the_time_between_them() -> None:
    server = Server()
    server.steps(7, clip_pb2.Tokenization.CAT, 160)
    before = server.scrape(100.0)
    server.steps(10, clip_pb2.Tokenization.CAT, 160)
    server.steps(10, clip_pb2.Tokenization.UNIFORM, 320, together=3)
    found = figures(seen(before, server.scrape(104.0)))
    assert (found.rate_seconds, found.steps_per_second, found.jobs_per_step) == (4.0, 5.0, 2.0)
    assert found.tokens_per_second == {"uniform": 10 * 3 * 320 / 4, "cat": 10 * 160 / 4}
    assert (found.uniform_per_second, found.keep_ratio) == (10 * 320 / 4, 0.5)


def test_where_nothing_happened_there_is_no_mean_and_no_ratio() -> None:
    server = Server()
    found = figures(seen(server.scrape(1.0), server.scrape(1.0)))
    assert (found.steps_per_second, found.jobs_per_step, found.keep_ratio) == (0.0, None, None)
    assert found.latencies == []
    assert found.tenants == {}


def test_slow_steps_are_counted_over_a_longer_time() -> None:
    server, scrapes = Server(), []
    for second in range(121):
        if second % 30 == 29:
            server.steps(1, clip_pb2.Tokenization.UNIFORM, 320)
        scrapes.append(server.scrape(float(second)))
    assert figures(seen(*scrapes)).rate_seconds == 120.0
    server.steps(ENOUGH_STEPS, clip_pb2.Tokenization.UNIFORM, 320)
    assert figures(seen(*scrapes, server.scrape(121.0))).rate_seconds == 10.0


def test_a_server_that_starts_anew_has_no_negative_rates() -> None:
    server = Server(started=1.0)
    server.steps(50, clip_pb2.Tokenization.UNIFORM, 320)
    old = server.scrape(1.0)
    started = {"process_start_time_seconds": {frozenset[tuple[str, str]](): 1e12}}
    new = Scrape(2.0, {**Server().scrape(2.0).samples, **started})
    assert figures(seen(old, new)).steps_per_second == 0.0


def test_quantiles_are_of_the_last_minutes_only_where_enough_ended_in_them() -> None:
    server = Server()
    server.ends(100, seconds=500)
    before = server.scrape(1.0)
    server.ends(ENOUGH_JOBS - 1)
    few = figures(seen(before, server.scrape(2.0)))
    assert (few.latency_seconds, few.latencies[0].count) == (None, 100 + ENOUGH_JOBS - 1)
    server.ends(1)
    (latency,) = (enough := figures(seen(before, server.scrape(3.0)))).latencies
    assert (enough.latency_seconds, latency.what, latency.priority) == (2.0, "end to end", "interactive")
    assert 2.5 < latency.p50 < latency.p95 <= 5.0
    assert few.ended["succeeded"] == 100 + ENOUGH_JOBS - 1


@given(st.lists(st.floats(0.0, 5000.0), min_size=1), st.lists(st.floats(0.0, 5000.0)), st.sampled_from([0.5, 0.95]))
def test_a_quantile_lies_in_the_bucket_of_the_observation_that_has_its_rank(
    values: list[float], earlier: list[float], q: float
) -> None:
    server = Server()
    histogram = server.metrics.first_frame_seconds.labels("batch")
    for value in earlier:
        histogram.observe(value)
    before = server.scrape(0.0)
    for value in values:
        histogram.observe(value)
    found = Window(before, server.scrape(1.0)).quantile("cinecat_first_frame_seconds", q, priority="batch")
    assert found is not None
    of_rank = sorted(values)[min(len(values) - 1, max(0, -(-int(q * 100) * len(values) // 100) - 1))]
    index = bisect.bisect_left(BOUNDS, of_rank)
    low, high = (0.0, *BOUNDS)[index], (*BOUNDS, BOUNDS[-1])[index]
    assert low - 1e-9 <= found <= high + 1e-9


def test_slots_memory_and_tenants_are_told_as_they_are() -> None:
    server = Server()
    server.metrics.style_slots.set(8)
    core = CoreGauges(server.metrics)
    core.slots(2, SlotUse(hits=3, evictions=1, swap_seconds=(0.1, 0.2)))
    core.memory(CoreMemory(1, 2, 3, 4))
    before = server.scrape(0.0)
    for tenant, seconds in (("", 1.0), ("studio", 3.0)):
        server.metrics.charged(tenant, clip_pb2.ClipSpec(), seconds)
    found = figures(seen(before, server.scrape(1.0)))
    assert (found.slots, found.slots_resident, found.slot_hits, found.slot_loads) == (8, 2, 3, 2)
    assert found.slot_evictions == 1
    assert found.memory == {"resident": 1, "allocated": 2, "peak": 3, "available": 4}
    assert list(found.tenants.items()) == [("studio", 0.75), ("none", 0.25)]


@pytest.mark.parametrize("text", ["<html>", "up 1\n", "", "cinecat_ready{"])
def test_what_is_no_scrape_of_cinecat_is_refused(text: str) -> None:
    with pytest.raises(NotMetrics):
        Scrape.of(text, 0.0)
