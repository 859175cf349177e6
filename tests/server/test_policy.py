"""The policy, on snapshots and in simulated time: no model, no clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinecat.engines.messages import StepShape
from cinecat.server.policy import (
    Advance,
    Begin,
    DecodeChunk,
    Evict,
    Phase,
    Snapshot,
    Task,
    by_step,
    first_come,
)
from cinecat.server.shares import BATCH_SHARE
from tests.server.simulation import CHUNK_S, CONDITION_S, SimulatedJob, Simulation

SHAPE = StepShape("torch", 320)
RUNNING = Task("running", "", True, deadline=10.0, arrival=0.0, phase=Phase.DENOISING, shape=SHAPE, state_bytes=10)
WAITING = replace(RUNNING, job_id="waiting", phase=Phase.WAITING)
RENDER = replace(RUNNING, job_id="render", interactive=False, evictable=True, shape=StepShape("torch", 1280))


def snapshot(*tasks: Task, **changes: object) -> Snapshot:
    times = changes.pop("times", {})
    assert isinstance(times, dict)
    plain = Snapshot(tasks, {}, False, 0, False, 8, lambda shape, rows: times.get(rows))
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_nothing_to_do_is_no_decision() -> None:
    assert by_step(snapshot()) is None
    assert first_come(snapshot()) is None


def test_a_preview_comes_in_before_a_running_render_goes_on() -> None:
    assert by_step(snapshot(RENDER, WAITING)) == Begin("waiting")
    assert by_step(snapshot(RENDER, RUNNING)) == Advance(("running",))
    assert first_come(snapshot(RENDER, WAITING)) == Advance(("render",))


def test_batch_jobs_have_their_turn_when_it_is_due() -> None:
    assert by_step(snapshot(RENDER, RUNNING, batch_is_due=True)) == Advance(("render",))


def test_within_a_class_the_earliest_deadline_is_first() -> None:
    sooner = replace(RUNNING, job_id="sooner", deadline=5.0, phase=Phase.DECODING)
    assert by_step(snapshot(RUNNING, sooner)) == DecodeChunk("sooner")


def test_the_tenant_that_had_least_is_before_an_earlier_deadline() -> None:
    other = replace(RUNNING, job_id="other", tenant="b", deadline=99.0, alone=True)
    assert by_step(snapshot(RUNNING, other, tenant_seconds={"": 3.0, "b": 1.0})) == Advance(("other",))


def test_rows_go_together_where_that_was_measured_to_pay() -> None:
    mates = [replace(RUNNING, job_id=f"{number}") for number in range(3)]
    times = {1: 1.0, 2: 1.3, 3: 2.1, 4: 2.4}
    assert by_step(snapshot(*mates, times=times)) == Advance(("0", "1"))
    assert by_step(snapshot(*mates, times={1: 1.0, 2: 1.96, 3: 2.7})) == Advance(("0", "1", "2"))
    assert by_step(snapshot(*mates, times={1: 1.0, 2: 2.0, 3: 3.0})) == Advance(("0",))


def test_a_cached_step_comes_first_and_alone_so_that_the_next_one_can_be_shared() -> None:
    cached = replace(RUNNING, job_id="cached", deadline=20.0, shape=StepShape("torch", 0))
    assert by_step(snapshot(RUNNING, cached, times={1: 1.0})) == Advance(("cached",))
    assert by_step(snapshot(cached, replace(cached, job_id="other"), times={1: 1.0})) == Advance(("cached",))
    batch = replace(cached, interactive=False)
    assert by_step(snapshot(RUNNING, batch, times={1: 1.0})) == Advance(("running",))


def test_what_was_not_measured_is_measured_one_size_at_a_time() -> None:
    mates = [replace(RUNNING, job_id=f"{number}") for number in range(4)]
    assert by_step(snapshot(*mates, times={})) == Advance(("0",))
    assert by_step(snapshot(*mates, times={1: 1.0})) == Advance(("0", "1"))
    assert by_step(snapshot(*mates, times={1: 1.0, 2: 1.5})) == Advance(("0", "1", "2"))
    assert by_step(snapshot(*mates, times={1: 1.0, 2: 2.0})) == Advance(("0",))


@pytest.mark.parametrize(
    "different",
    [
        {"shape": StepShape("torch", 192)},
        {"shape": StepShape("inductor", 320)},
        {"shape": StepShape("torch", 320, merged=True)},
        {"interactive": False},
        {"alone": True},
        {"phase": Phase.DECODING},
    ],
)
def test_only_what_fits_together_goes_together(different: dict[str, object]) -> None:
    other = replace(RUNNING, job_id="other", deadline=20.0, **different)  # type: ignore[arg-type]
    assert by_step(snapshot(RUNNING, other, times={1: 1.0, 2: 1.0})) == Advance(("running",))


def test_a_batch_stays_within_the_engine_and_the_setting() -> None:
    narrow = replace(SHAPE, most_rows=2)
    mates = [replace(RUNNING, job_id=f"{number}", shape=narrow) for number in range(4)]
    times = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}
    assert by_step(snapshot(*mates, times=times)) == Advance(("0", "1"))
    wide = [replace(mate, shape=SHAPE) for mate in mates]
    assert by_step(snapshot(*wide, times=times, most_together=3)) == Advance(("0", "1", "2"))
    guided = [replace(mate, rows=2) for mate in mates]
    assert by_step(snapshot(*guided, times=times)) == Advance(("0",))


def test_a_waiting_job_is_let_in_to_share_forwards() -> None:
    assert by_step(snapshot(RUNNING, WAITING, times={1: 1.0, 2: 1.2})) == Begin("waiting")
    assert by_step(snapshot(RUNNING, WAITING, times={1: 1.0, 2: 2.0})) == Advance(("running",))
    assert by_step(snapshot(RUNNING, WAITING, times={1: 1.0}, state_bytes=15)) == Advance(("running",))


def test_a_preview_is_not_held_up_for_a_guest_who_gains_less() -> None:
    times = {1: 1.0, 2: 1.2}
    host, guest = replace(RUNNING, steps_left=4), replace(WAITING, begin_seconds=2.0)
    assert by_step(snapshot(host, guest, times=times)) == Begin("waiting")  # gains 4 x 0.8, costs 2 + 4 x 0.2
    assert by_step(snapshot(host, replace(guest, begin_seconds=3.0), times=times)) == Advance(("running",))
    assert by_step(snapshot(host, replace(guest, begin_seconds=3.0), times={1: 1.0})) == Begin("waiting")
    batch = [replace(task, interactive=False, begin_seconds=3.0) for task in (host, guest)]
    assert by_step(snapshot(*batch, times=times)) == Begin("waiting")


def test_a_preview_without_room_sends_a_render_out() -> None:
    assert by_step(snapshot(RENDER, WAITING, state_bytes=15)) == Evict("render")
    just_in = replace(RENDER, evictable=False)
    assert by_step(snapshot(just_in, WAITING, state_bytes=15)) == Advance(("render",))


def test_nobody_is_sent_out_for_his_own_class_or_in_vain() -> None:
    waiting_render = replace(RENDER, job_id="other", phase=Phase.WAITING, deadline=0.0)
    assert by_step(snapshot(RENDER, waiting_render, state_bytes=15)) == Advance(("render",))
    too_big = replace(WAITING, state_bytes=100)
    assert by_step(snapshot(RENDER, RUNNING, too_big, state_bytes=30)) == Advance(("running",))


def test_a_job_that_nothing_can_make_room_for_runs_alone() -> None:
    assert by_step(snapshot(replace(WAITING, state_bytes=100), state_bytes=15)) == Begin("waiting")


def test_nobody_overtakes_a_job_that_waits_for_room() -> None:
    big = replace(WAITING, job_id="big", deadline=1.0, state_bytes=12)
    small = replace(WAITING, job_id="small", deadline=2.0, state_bytes=1)
    assert by_step(snapshot(RUNNING, big, small, state_bytes=15)) == Advance(("running",))


def test_a_job_that_waits_for_a_slot_holds_back_other_styles_only() -> None:
    styled = replace(WAITING, job_id="styled", wears_style=True, deadline=1.0)
    other = replace(styled, job_id="other", deadline=2.0)
    plain = replace(WAITING, job_id="plain", deadline=3.0)
    assert by_step(snapshot(RUNNING, styled, other, plain, slots_full=True)) == Begin("plain")
    wearer = replace(RENDER, wears_style=True)
    assert by_step(snapshot(wearer, styled, slots_full=True)) == Evict("render")


# --- in simulated time ------------------------------------------------------------------------------------------------

JOBS = st.lists(
    st.builds(
        SimulatedJob,
        job_id=st.uuids().map(str),
        arrival=st.floats(0, 20),
        interactive=st.booleans(),
        tenant=st.sampled_from("abc"),
        steps=st.integers(1, 30),
        step_seconds=st.sampled_from((0.02, 0.1, 0.5)),
        chunks=st.integers(1, 5),
        state_bytes=st.integers(1, 6),
        wears_style=st.booleans(),
    ),
    min_size=1,
    max_size=25,
    unique_by=lambda job: job.job_id,
)


@settings(max_examples=100, deadline=None)
@given(JOBS, st.sampled_from((0, 6, 9)), st.sampled_from((1, 2, 100)), st.sampled_from((0.3, 1.0)))
def test_every_job_is_done_once_and_the_core_never_idles(
    jobs: list[SimulatedJob], state_bytes: int, slots: int, row_share: float
) -> None:
    simulation = Simulation(by_step, jobs, row_share=row_share, state_bytes=state_bytes, slots=slots)
    simulation.run()
    steps = Counter(
        job_id
        for quantum in simulation.quanta
        if isinstance(quantum.decision, Advance)
        for job_id in quantum.decision.job_ids
    )
    assert steps == {job.job_id: job.steps for job in jobs}
    # Besides their own work, jobs cost what sending out and taking in again costs, which each time a step paid for.
    evictions = sum(job.evictions for job in jobs)
    again = evictions * (0.01 + CONDITION_S + 5 * CHUNK_S)
    assert sum(quantum.seconds for quantum in simulation.quanta) <= sum(job.work for job in jobs) + again + 1e-6
    assert evictions <= sum(job.steps + job.chunks for job in jobs)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from((0.05, 0.3)),
    st.sampled_from((0.15, 0.3, 0.6)),
    st.sampled_from((0, 3)),
    st.sampled_from((1, 100)),
)
def test_a_render_ends_however_many_previews_keep_coming(
    tenants: int, render_step: float, gap: float, state_bytes: int, slots: int
) -> None:
    """Previews take more time than there is; a batch job still has its tenth, and its tenant an equal part of that."""
    render = SimulatedJob("render", 1.0, False, "r", steps=6, step_seconds=render_step, wears_style=True)
    flood = [
        SimulatedJob(f"{number}", number * gap, tenant=f"{number % tenants}", wears_style=True)
        for number in range(int(60 / gap))
    ]
    simulation = Simulation(by_step, [render, *flood], state_bytes=state_bytes, slots=slots, most_together=1)
    simulation.run(until=60.0)
    assert render.ended is not None
    # Ten times its work, and for each time that it was sent out, taking it in once more.
    work = render.work + render.evictions * (CONDITION_S + CHUNK_S)
    assert render.ended - render.arrival <= work / BATCH_SHARE + 10


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.sampled_from((0.05, 0.2)))
def test_a_tenant_with_many_jobs_takes_no_more_than_its_share(many: int, step_seconds: float) -> None:
    greedy = [SimulatedJob(f"g{number}", 0.0, tenant="greedy", step_seconds=step_seconds) for number in range(many)]
    modest = [SimulatedJob(f"m{number}", 0.0, tenant="modest", step_seconds=step_seconds) for number in range(2)]
    simulation = Simulation(by_step, [*greedy, *modest], most_together=1)
    simulation.run()
    ended = max(job.ended or 1e9 for job in modest)
    assert ended <= 2 * sum(job.work for job in modest) + CONDITION_S + step_seconds


def test_a_preview_waits_for_one_quantum_of_a_render() -> None:
    render = SimulatedJob("render", 0.0, interactive=False, steps=100, step_seconds=0.5)
    previews = [SimulatedJob(f"{number}", 3.0 * number + 0.7) for number in range(10)]
    Simulation(by_step, [render, *previews]).run()
    for preview in previews:
        assert preview.began is not None
        assert preview.began - preview.arrival <= 0.5 + 1e-6


def test_jobs_of_one_shape_gain_from_going_together() -> None:
    def makespan(row_share: float) -> float:
        jobs = [SimulatedJob(f"{number}", 0.0, steps=40) for number in range(4)]
        simulation = Simulation(by_step, jobs, row_share=row_share)
        simulation.run()
        return simulation.now

    assert makespan(0.3) < 0.8 * makespan(1.0)


def test_first_come_runs_whole_jobs_in_the_order_of_arrival() -> None:
    jobs = [SimulatedJob(f"{number}", 0.1 * number, interactive=number % 2 == 0) for number in range(6)]
    Simulation(first_come, jobs).run()
    ends = [job.ended or 0.0 for job in jobs]
    assert all(before < after for before, after in pairwise(ends))
