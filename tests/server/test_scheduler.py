"""The queue is worked off in order, whatever becomes of single jobs, of the engine core and of the database."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from cinecat.engines.errors import CoreDied, EngineError, EngineFault, ModelError, NoFreeSlot, OutOfMemory
from cinecat.engines.messages import Failure, Release, StepShape
from cinecat.plugins.registry import UnknownStyle
from cinecat.server import patience as patience_module
from cinecat.server import render as render_module
from cinecat.server import scheduler as scheduler_module
from cinecat.server.artifacts import ArtifactError
from cinecat.server.backlog import Backlog
from cinecat.server.errors import RequestError, ShuttingDown
from cinecat.server.live_job import LiveJob
from cinecat.server.render import Stopped
from cinecat.v1 import clip_pb2
from cinecat.v1 import job_pb2 as pb
from tests.server.line import Line, ended, with_line
from tests.server.samples import NEVER_S, new_job, until
from tests.server.scripted_core import STEP_S

FAILED = pb.JOB_STATE_FAILED
INTERACTIVE = {"priority": "interactive"}
QUEUED = pb.JOB_STATE_QUEUED
CANCELLED = pb.JOB_STATE_CANCELLED
SUCCEEDED = pb.JOB_STATE_SUCCEEDED


def test_jobs_are_worked_off_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        jobs = await line.enqueue("a", "b", "c")
        await ended(*jobs)
        assert line.core.begun == ["a", "b", "c"]
        assert {live.job.state for live in jobs} == {SUCCEEDED}

    with_line(tmp_path, scenario)


def test_a_full_queue_takes_no_more(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        running, *_ = await line.enqueue("running")
        await until(lambda: bool(line.core.begun))
        waiting = await line.enqueue("a", "b")
        with pytest.raises(RequestError, match="2 jobs are waiting") as refused:
            line.fleet.admit()
        assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        await line.front.jobs.cancel("a")
        line.fleet.admit()
        line.core.gate.set()
        await ended(running, *waiting)

    with_line(tmp_path, scenario, max_queue=2)


def test_waiting_jobs_know_their_place_and_a_running_one_has_none(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        a, b, c = await line.enqueue("a", "b", "c")
        await until(lambda: a.job.state == pb.JOB_STATE_DENOISING)
        assert [live.job.progress.queue_position for live in (a, b, c)] == [0, 1, 2]
        assert line.front.registry.get_sample_value("cinecat_queue_depth", INTERACTIVE) == 2
        await line.front.jobs.cancel("b")
        assert c.job.progress.queue_position == 1
        line.core.gate.set()
        await until(lambda: c.job.state != QUEUED)
        assert c.job.progress.queue_position == 0
        await ended(a, c)
        assert line.front.registry.get_sample_value("cinecat_queue_depth", INTERACTIVE) == 0

    with_line(tmp_path, scenario)


def test_waiting_jobs_have_an_eta_once_costs_are_known(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        a, b = await line.enqueue("a", "b")
        assert not b.job.progress.HasField("eta")
        for work in ("condition", "step", "decode"):
            line.costs.observe(work, 1, 0.001)
        (c,) = await line.enqueue("c")
        assert 0 < b.job.progress.eta.ToNanoseconds() < c.job.progress.eta.ToNanoseconds()
        line.core.gate.set()
        await ended(a, b, c)

    with_line(tmp_path, scenario)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownStyle("no style 'noir'"), grpc.StatusCode.NOT_FOUND),
        (OutOfMemory("out of memory"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (EngineFault("broken"), grpc.StatusCode.INTERNAL),
        (EngineError("refused"), grpc.StatusCode.FAILED_PRECONDITION),
        (ArtifactError("bucket is gone"), grpc.StatusCode.UNAVAILABLE),
        (ZeroDivisionError(), grpc.StatusCode.INTERNAL),
    ],
)
def test_a_failing_job_says_why_and_the_next_one_is_served(
    tmp_path: Path, error: Exception, code: grpc.StatusCode
) -> None:
    async def scenario(line: Line) -> None:
        line.core.fates["bad"] = [error]
        bad, good = await line.enqueue("bad", "good")
        await ended(bad, good)
        assert (bad.job.state, bad.job.error.code) == (FAILED, code.value[0])
        assert bad.job.error.message == (f"{error}" or "the server failed on this request; its log says why")
        assert good.job.state == SUCCEEDED

    with_line(tmp_path, scenario)


def test_a_cancelled_running_job_ends_and_the_next_one_is_served(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        running, following = await line.enqueue("running", "following")
        await until(lambda: running.job.state == pb.JOB_STATE_DENOISING)
        await line.front.jobs.cancel("running")
        line.core.gate.set()
        await ended(running, following)
        assert (running.job.state, following.job.state) == (CANCELLED, SUCCEEDED)

    with_line(tmp_path, scenario)


def test_a_job_whose_core_died_is_tried_once_more_before_the_others(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.fates["a"] = [CoreDied("exit code -9")]
        a, b = await line.enqueue("a", "b")
        await ended(a, b)
        assert line.core.begun == ["a", "a", "b"]
        assert (a.job.state, a.attempts, line.core.restarts) == (SUCCEEDED, 0, 1)
        assert line.core_states == [False, True]

    with_line(tmp_path, scenario)


def test_a_job_that_keeps_killing_the_core_fails_and_is_not_taken_again(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.fates["a"] = [CoreDied("exit code -9"), CoreDied("exit code -9"), CoreDied("exit code -11")]
        a, b = await line.enqueue("a", "b")
        await ended(a, b)
        assert (a.job.state, a.job.error.code) == (FAILED, grpc.StatusCode.UNAVAILABLE.value[0])
        assert "exit code -11; the job was tried 3 times" in a.job.error.message
        assert b.job.state == SUCCEEDED
        assert line.core.restarts == 3
        line.fleet.admit(b.request_hash)
        with pytest.raises(RequestError, match=r"killed the engine core again and again \(job a\)") as refused:
            line.fleet.admit(a.request_hash)
        assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION

    with_line(tmp_path, scenario)


def test_a_job_that_gets_on_between_two_deaths_is_not_given_up(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        died = CoreDied("exit code -9")
        line.core.fates["a"] = [None, None, died, None, None, died, None, None, died, None, None, died]
        (a,) = await line.enqueue("a", clip=clip_pb2.ClipSpec(steps=9))
        await ended(a)
        assert (a.job.state, line.core.restarts) == (SUCCEEDED, 4)
        assert set(line.core.steps.values()) == {1}

    with_line(tmp_path, scenario)


def test_a_resumed_job_repeats_no_more_steps_than_a_checkpoint_is_old(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.fates["a"] = [None] * 5 + [CoreDied("exit code -9")]
        (a,) = await line.enqueue("a", clip=clip_pb2.ClipSpec(steps=8))
        await ended(a)
        assert a.job.state == SUCCEEDED
        # Saved after every second step, the last time after the fourth.
        assert [line.core.steps["a", step] for step in range(1, 9)] == [1, 1, 1, 1, 2, 1, 1, 1]
        assert line.front.registry.get_sample_value("cinecat_resumes_total") == 1
        assert not line.front.checkpoints.path("a").exists()

    with_line(tmp_path, scenario)


def test_a_poisonous_job_takes_its_mates_down_once(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.row_share = 0.0
        for _ in range(5):
            line.costs.observe_step(StepShape("torch", 32), 1, STEP_S)
        line.core.fates["poison"] = [CoreDied("exit code -9")] * 9
        line.core.gate.clear()
        jobs = await line.enqueue("a", "poison", "b", clip=clip_pb2.ClipSpec(steps=6))
        line.core.gate.set()
        await ended(*jobs)
        assert [live.job.state for live in jobs] == [SUCCEEDED, FAILED, SUCCEEDED]
        shared = [ids for ids in line.core.stepped if "poison" in ids and len(ids) > 1]
        assert len(shared) == 1
        # One death together, then three alone.
        assert line.core.restarts == 4

    with_line(tmp_path, scenario)


def test_jobs_share_steps_where_that_is_quicker(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.row_share = 0.2
        jobs = await line.enqueue("a", "b", "c", clip=clip_pb2.ClipSpec(steps=30))
        await ended(*jobs)
        assert {live.job.state for live in jobs} == {SUCCEEDED}
        assert max(map(len, line.core.stepped)) == 3
        assert set(line.core.steps.values()) == {1}

    with_line(tmp_path, scenario)


def test_jobs_do_not_share_steps_where_that_is_no_quicker(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        jobs = await line.enqueue("a", "b", clip=clip_pb2.ClipSpec(steps=30))
        await ended(*jobs)
        # It was tried until it could be judged by.
        assert 0 < sum(len(ids) == 2 for ids in line.core.stepped) <= 4

    with_line(tmp_path, scenario)


def test_a_failure_of_one_in_a_shared_step_is_its_own(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.row_share = 0.0
        line.core.fates["bad"] = [None] * 8 + [Failure("request", "step 9 gave NaN or infinity")]
        jobs = await line.enqueue("good", "bad", clip=clip_pb2.ClipSpec(steps=30))
        await ended(*jobs)
        good, bad = jobs
        assert (good.job.state, bad.job.state) == (SUCCEEDED, FAILED)
        assert bad.job.error.message == "step 9 gave NaN or infinity"
        assert set(line.core.steps.values()) == {1}

    with_line(tmp_path, scenario)


def test_what_fails_together_goes_on_alone(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.row_share = 0.0
        line.core.fates["big"] = [None] * 8 + [OutOfMemory("out of memory")]
        line.core.gate.clear()
        jobs = await line.enqueue("big", "other", clip=clip_pb2.ClipSpec(steps=30))
        line.core.gate.set()
        await ended(*jobs)
        assert {live.job.state for live in jobs} == {SUCCEEDED}
        assert set(line.core.steps.values()) == {1}
        widths = [len(ids) for ids in line.core.stepped]
        assert max(widths) == 2
        assert widths[-1] == 1

    with_line(tmp_path, scenario)


def test_a_preview_overtakes_a_running_render(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        (render,) = await line.enqueue("render", clip=clip_pb2.ClipSpec(steps=50), priority=pb.PRIORITY_BATCH)
        await until(lambda: render.job.progress.step >= 3)
        await line.enqueue("preview")
        seen = [event.job async for event in line.front.jobs.watch("preview", 0)]
        assert {job.progress.queue_position for job in seen if job.state != QUEUED} == {0}
        assert render.job.state == pb.JOB_STATE_DENOISING
        await ended(render)
        assert line.core.begun == ["render", "preview"]
        assert set(line.core.steps.values()) == {1}

    with_line(tmp_path, scenario)


def test_a_render_is_sent_out_where_there_is_no_room_and_goes_on_from_where_it_was(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.state_bytes = 10
        (render,) = await line.enqueue("render", clip=clip_pb2.ClipSpec(steps=50), priority=pb.PRIORITY_BATCH)
        await until(lambda: render.job.progress.step >= 3)
        (preview,) = await line.enqueue("preview")
        await until(lambda: render.job.state == QUEUED)
        assert "a more urgent clip needs the room" in render.job.progress.wait_reason
        await ended(preview, render)
        assert {preview.job.state, render.job.state} == {SUCCEEDED}
        assert line.core.begun == ["render", "preview", "render"]
        assert set(line.core.steps.values()) == {1}
        assert line.front.registry.get_sample_value("cinecat_preemptions_total") == 1

    with_line(tmp_path, scenario, state_bytes=15)


def test_a_render_that_is_cancelled_while_it_is_sent_out_ends_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(line: Line) -> None:
        line.core.state_bytes = 10
        (render,) = await line.enqueue("render", clip=clip_pb2.ClipSpec(steps=50), priority=pb.PRIORITY_BATCH)
        await until(lambda: render.job.progress.step >= 3)
        call = line.core.call

        async def cancelled_meanwhile(what: Any, kind: Any) -> Any:
            if what == Release("render"):
                await line.front.jobs.cancel("render")
            return await call(what, kind)

        monkeypatch.setattr(line.core, "call", cancelled_meanwhile)
        (preview,) = await line.enqueue("preview")
        await ended(preview, render)
        assert [event.job.state for event in render.transitions].count(QUEUED) == 1
        assert render.job.state == CANCELLED

    with_line(tmp_path, scenario, state_bytes=15)


def test_tenants_take_turns(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        many = [await line.add(new_job(f"many-{number}"), "a") for number in range(4)]
        one = await line.add(new_job("one"), "b")
        line.core.gate.set()
        await ended(one, *many)
        assert line.core.begun.index("one") <= 2

    with_line(tmp_path, scenario)


def test_watchers_see_estimates_at_the_rate_asked_for_and_every_frame_once(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        clip = clip_pb2.ClipSpec(steps=6, frames=9)
        line.core.gate.clear()
        (live,) = await line.enqueue("a", clip=clip, previews=pb.Previews(every_steps=2, frames=True))
        events: list[pb.JobEvent] = []

        async def watch() -> None:
            events.extend([event async for event in line.front.jobs.watch("a", 0)])

        watching = asyncio.create_task(watch())
        line.core.gate.set()
        await watching
        estimates = [event.preview.step for event in events if event.preview.step]
        assert set(estimates) <= {2, 4, 6}
        assert estimates == sorted(set(estimates))
        shown = [frame.index for event in events if not event.preview.step for frame in event.preview.frames]
        assert shown == list(range(9))
        sequences = [event.sequence for event in events]
        assert sequences == sorted(set(sequences))
        assert live.job.state == SUCCEEDED

    with_line(tmp_path, scenario)


def test_frames_are_not_shown_again_after_the_core_died_while_decoding(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.decode_fates["a"] = [None, CoreDied("exit code -9")]
        clip = clip_pb2.ClipSpec(steps=4, frames=9)
        (live,) = await line.enqueue("a", clip=clip, previews=pb.Previews(frames=True))
        await ended(live)
        shown = [frame.index for event in live.frames for frame in event.preview.frames]
        assert shown == list(range(9))
        assert set(line.core.steps.values()) == {1}

    with_line(tmp_path, scenario)


def test_a_core_that_dies_while_idle_is_replaced(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.died.set()
        await until(lambda: line.core_states == [False, True])
        (live,) = await line.enqueue("a")
        await ended(live)
        assert live.job.state == SUCCEEDED

    with_line(tmp_path, scenario)


def test_a_core_that_does_not_start_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience_module, "_PAUSES_S", (0.0, 0.001))

    async def scenario(line: Line) -> None:
        line.core.fates["a"] = [CoreDied("exit code -9")]
        (live,) = await line.enqueue("a")
        await ended(live)
        assert (live.job.state, line.core.restarts) == (SUCCEEDED, 4)

    with_line(tmp_path, scenario, core_refuses=(CoreDied("no"), ModelError("no"), OutOfMemory("no")))


def test_a_shutdown_does_not_wait_for_the_next_try_to_start_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience_module, "_PAUSES_S", (0.0, NEVER_S))

    async def scenario(line: Line) -> None:
        line.core.fates["a"] = [CoreDied("exit code -9")]
        (live,) = await line.enqueue("a")
        await until(lambda: line.core.restarts == 1)
        await line.drain()
        assert (live.job.state, line.core.restarts) == (QUEUED, 1)

    with_line(tmp_path, scenario, core_refuses=(ModelError("no"),))


def test_a_drain_lets_the_running_job_end_and_keeps_the_waiting_ones(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        running, waiting = await line.enqueue("running", "waiting")
        await until(lambda: running.job.state == pb.JOB_STATE_DENOISING)
        draining = asyncio.create_task(line.drain())
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            line.fleet.admit()
        line.core.gate.set()
        await draining
        assert (running.job.state, waiting.job.state) == (SUCCEEDED, QUEUED)
        assert not line.core.killed.is_set()

    with_line(tmp_path, scenario)


@pytest.mark.parametrize("seconds", [0.01, NEVER_S])
def test_a_drain_that_takes_too_long_puts_the_running_job_back(tmp_path: Path, seconds: float) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        (running,) = await line.enqueue("running")
        await until(lambda: running.job.state == pb.JOB_STATE_DENOISING)
        hurry = asyncio.Event()
        draining = asyncio.create_task(line.drain(seconds, hurry))
        if seconds == NEVER_S:
            await asyncio.sleep(0.01)
            hurry.set()
        await draining
        assert line.core.killed.is_set()
        assert (running.job.state, running.attempts, line.core.restarts) == (QUEUED, 0, 0)

    with_line(tmp_path, scenario)


def test_a_job_that_was_cancelled_is_not_put_back_by_a_drain(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        (running,) = await line.enqueue("running")
        await until(lambda: running.job.state == pb.JOB_STATE_DENOISING)
        await line.front.jobs.cancel("running")
        await line.drain(0.0)
        assert running.job.state == CANCELLED

    with_line(tmp_path, scenario)


@pytest.mark.parametrize(
    ("fate", "end"),
    [(Stopped(), CANCELLED), (EngineFault("broken"), FAILED), (CoreDied("exit code -9"), SUCCEEDED)],
)
def test_a_database_that_fails_for_a_while_only_delays_what_must_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: Exception, end: int
) -> None:
    monkeypatch.setattr(patience_module, "_PAUSES_S", (0.0, 0.001))

    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        line.core.fates["unlucky"] = [fate]
        unlucky, _ = await line.enqueue("unlucky", "following")
        following = line.front.jobs.live("following")
        assert following is not None
        await until(lambda: unlucky.transitions[-1].job.state == pb.JOB_STATE_DENOISING)
        line.front.store.hold()
        line.core.gate.set()
        await line.front.reached()
        line.front.store.broken_once = True
        line.front.store.open.set()
        await ended(unlucky, following)
        assert (unlucky.job.state, following.job.state) == (end, SUCCEEDED)

    with_line(tmp_path, scenario)


NO_SLOT = "no style slot is free: 2 of 2 are worn by running clips"


def test_a_job_without_a_slot_waits_and_says_why_until_a_clip_leaves_the_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "_SLOT_RETRY_S", NEVER_S)

    async def scenario(line: Line) -> None:
        line.core.fates["a"] = [NoFreeSlot(NO_SLOT)]
        line.core.gate.clear()
        (a,) = await line.enqueue("a", style="noir")
        (plain,) = await line.enqueue("plain")
        line.core.gate.set()
        await until(lambda: a.job.progress.wait_reason == NO_SLOT)
        assert (a.job.state, a.attempts) == (QUEUED, 0)
        await ended(a, plain)
        assert line.core.begun == ["a", "plain", "a"]
        assert {a.job.state, plain.job.state} == {SUCCEEDED}
        waited = [event.job for event in a.transitions if event.job.progress.wait_reason]
        assert [(job.state, job.progress.wait_reason) for job in waited] == [(QUEUED, NO_SLOT)]

    with_line(tmp_path, scenario)


def test_a_job_that_waits_for_a_slot_is_not_overtaken_by_one_that_needs_a_slot_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "_SLOT_RETRY_S", 0.001)

    async def scenario(line: Line) -> None:
        line.core.fates["first"] = [NoFreeSlot(NO_SLOT)] * 3
        styled = await line.enqueue("first", "second", style="noir")
        await ended(*styled)
        assert line.core.begun == ["first"] * 4 + ["second"]
        assert {live.job.state for live in styled} == {SUCCEEDED}

    with_line(tmp_path, scenario)


def test_a_job_at_strength_zero_needs_no_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_SLOT_RETRY_S", NEVER_S)

    async def scenario(line: Line) -> None:
        line.core.fates["first"] = [NoFreeSlot(NO_SLOT)]
        (first,) = await line.enqueue("first", style="noir")
        await until(lambda: first.job.progress.wait_reason == NO_SLOT)
        job = new_job("off")
        job.clip.styles.add(name="noir", strength=0.0)
        off = await line.add(job)
        await ended(first, off)
        assert line.core.begun == ["first", "off", "first"]

    with_line(tmp_path, scenario)


def test_a_job_that_waits_for_a_slot_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_SLOT_RETRY_S", NEVER_S)

    async def scenario(line: Line) -> None:
        line.core.fates["a"] = [NoFreeSlot(NO_SLOT)]
        (a,) = await line.enqueue("a", style="noir")
        await until(lambda: a.job.progress.wait_reason == NO_SLOT)
        await line.front.jobs.cancel("a")
        await ended(a)
        assert a.job.state == CANCELLED
        await ended(*await line.enqueue("b"))
        assert line.core.begun == ["a", "b"]

    with_line(tmp_path, scenario)


def test_a_job_that_is_cancelled_while_it_finds_no_slot_ends(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        line.core.fates["a"] = [NoFreeSlot(NO_SLOT)]
        (a,) = await line.enqueue("a", style="noir")
        await until(lambda: a.job.state == pb.JOB_STATE_DENOISING)
        a.stop_requested = True
        line.core.gate.set()
        await ended(a)
        assert a.job.state == CANCELLED

    with_line(tmp_path, scenario)


# --- what a review found ----------------------------------------------------------------------------------------------


def test_a_clip_of_merged_tokens_that_finds_no_slot_for_the_adapter_waits_like_any_other(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.on_begin["cat"] = [NoFreeSlot(NO_SLOT)] * 3
        clip = clip_pb2.ClipSpec(steps=40)
        (resident,) = await line.enqueue("resident", clip=clip, priority=pb.PRIORITY_BATCH)
        await until(lambda: resident.job.progress.step >= 1)
        merged = clip_pb2.Tokenization(mode=clip_pb2.Tokenization.CAT, keep_ratio=0.5)
        (cat,) = await line.enqueue("cat", clip=clip_pb2.ClipSpec(tokenization=merged))
        await ended(resident)
        # Tried once, and again when a clip had left the core; not before every step.
        assert line.core.begun.count("cat") <= 2
        line.core.on_begin["cat"] = []
        await ended(cat)

    with_line(tmp_path, scenario)


def test_a_death_after_one_of_several_has_failed_leaves_nobody_behind(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.row_share = 0.0
        # Both at the ninth step, after which the other one is saved.
        line.core.fates["bad"] = [None] * 9 + [Failure("request", "NaN")]
        line.core.save_fates["good"] = [None] * 4 + [CoreDied("exit code -9")]
        line.core.gate.clear()
        jobs = await line.enqueue("good", "bad", "next", clip=clip_pb2.ClipSpec(steps=30))
        line.core.gate.set()
        await ended(*jobs)
        assert [live.job.state for live in jobs] == [SUCCEEDED, FAILED, SUCCEEDED]

    with_line(tmp_path, scenario)


def test_a_clean_up_that_fails_ends_neither_the_server_nor_other_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(line: Line) -> None:
        def broken(job_id: str) -> None:
            raise RuntimeError("a bucket's own error")

        monkeypatch.setattr(line.artifacts, "delete_job", broken)
        line.core.decode_fates["bad"] = [EngineFault("broken")]
        bad, good = await line.enqueue("bad", "good")
        await ended(bad, good)
        assert (bad.job.state, good.job.state) == (FAILED, SUCCEEDED)
        assert not line.fleet.broken.done()

    with_line(tmp_path, scenario)


def test_a_database_that_fails_once_fails_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience_module, "_PAUSES_S", (0.0, 0.001))

    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        (live,) = await line.enqueue("a")
        await until(lambda: live.transitions[-1].job.state == pb.JOB_STATE_DENOISING)
        line.front.store.broken_once = True
        line.core.gate.set()
        await ended(live)
        assert live.job.state == SUCCEEDED

    with_line(tmp_path, scenario)


def test_a_cancel_that_is_not_stored_leaves_the_job_in_the_queue(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        _, waiting = await line.enqueue("running", "waiting")
        await until(lambda: bool(line.core.stepped))
        line.front.store.broken_once = True
        with pytest.raises(OSError, match="disk full"):
            await line.front.jobs.cancel("waiting")
        line.core.gate.set()
        # The wish is known, and is carried out before anything else.
        await ended(waiting)
        assert waiting.job.state == CANCELLED

    with_line(tmp_path, scenario)


def test_a_render_that_cannot_be_saved_is_not_sent_out(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.state_bytes = 10
        line.core.save_fates["render"] = [EngineError("no space left on device")] * 99
        (render,) = await line.enqueue("render", clip=clip_pb2.ClipSpec(steps=20), priority=pb.PRIORITY_BATCH)
        await until(lambda: render.job.progress.step >= 3)
        (preview,) = await line.enqueue("preview")
        await ended(preview, render)
        assert {preview.job.state, render.job.state} == {SUCCEEDED}
        assert set(line.core.steps.values()) == {1}

    with_line(tmp_path, scenario, state_bytes=15)


def test_a_preview_that_cannot_be_drawn_fails_no_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> pb.Preview:
        raise ValueError("no picture")

    monkeypatch.setattr(render_module.previews, "estimate", broken)
    monkeypatch.setattr(render_module.previews, "decoded", broken)

    async def scenario(line: Line) -> None:
        (live,) = await line.enqueue("a", previews=pb.Previews(every_steps=1, frames=True))
        await ended(live)
        assert live.job.state == SUCCEEDED

    with_line(tmp_path, scenario)


def test_copies_of_a_job_that_keeps_killing_the_core_are_not_tried(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        jobs = await line.enqueue("a", "b")
        for live in jobs:
            live.request_hash = "the same"
            line.core.fates[live.job_id] = [CoreDied("exit code -9")] * 9
        line.core.gate.set()
        await ended(*jobs)
        assert {live.job.state for live in jobs} == {FAILED}
        assert line.core.restarts == 3

    with_line(tmp_path, scenario)


def test_a_thousand_waiting_jobs_do_not_make_a_decision_slow(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        backlog = Backlog(line.front.jobs, line.costs, 8, line.front.metrics)
        for number in range(1000):
            job = new_job(f"{number}")
            job.clip.model = "wan-tiny"
            job.create_time.GetCurrentTime()
            live = LiveJob(job, "")
            backlog.add(line.renderer.take(live))
        assert len(backlog.snapshot(line.replicas[0], resident_only=False).tasks) <= 64
        assert backlog.waiting == 1000

    with_line(tmp_path, scenario)
