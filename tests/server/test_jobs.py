"""Jobs: what watchers see, what a restart keeps, and when an attached job is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from cinecat.server.errors import RequestError, ShuttingDown
from cinecat.server.jobs import Jobs
from cinecat.server.live_job import LiveJob
from cinecat.server.store import JobFilter
from cinecat.v1 import job_pb2 as pb
from tests.server.samples import FRAME, PATH_TO_SUCCESS, front, move, new_job, until

QUEUED = pb.JOB_STATE_QUEUED
CONDITIONING = pb.JOB_STATE_CONDITIONING
DENOISING = pb.JOB_STATE_DENOISING
CANCELLED = pb.JOB_STATE_CANCELLED

AT_ONCE = 0.001


def step(jobs: Jobs, live: LiveJob, number: int) -> None:
    live.job.progress.step = number
    jobs.progress(live)


def states(events: list[pb.JobEvent]) -> list[int]:
    return [event.job.state for event in events]


def sequences(events: list[pb.JobEvent]) -> list[int]:
    return [event.sequence for event in events]


async def watched(jobs: Jobs, job_id: str, after_sequence: int = 0) -> list[pb.JobEvent]:
    return [event async for event in jobs.watch(job_id, after_sequence)]


async def first_of(watching: AsyncIterator[pb.JobEvent]) -> pb.JobEvent:
    return await anext(aiter(watching))


def test_a_watcher_sees_every_transition_once_and_in_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            watching = asyncio.create_task(watched(f.jobs, live.job_id))
            await until(lambda: live.watchers == 1)
            await move(f.jobs, live, *PATH_TO_SUCCESS)
            events = await watching
            assert states(events) == [QUEUED, *PATH_TO_SUCCESS]
            assert sequences(events) == sorted(set(sequences(events)))

    asyncio.run(scenario())


def test_watching_again_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            await move(f.jobs, live, *PATH_TO_SUCCESS[:2])
            while_it_runs = [asyncio.create_task(watched(f.jobs, live.job_id, n)) for n in (0, 1, 2, 3)]
            await until(lambda: live.watchers == 4)
            await move(f.jobs, live, *PATH_TO_SUCCESS[2:])
            everything = await watched(f.jobs, live.job_id)
            assert [await task for task in while_it_runs] == [
                everything,
                everything[1:],
                everything[2:],
                everything[3:],
            ]
            last = everything[-1].sequence
            assert await watched(f.jobs, live.job_id, last - 1) == everything[-1:]
            assert await watched(f.jobs, live.job_id, last) == []

    asyncio.run(scenario())


def test_a_slow_watcher_skips_progress_but_no_transition(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            watching = f.jobs.watch(live.job_id, 0)
            seen = [await anext(watching)]
            await move(f.jobs, live, CONDITIONING)
            for number in range(50):
                step(f.jobs, live, number)
            seen += [await anext(watching), await anext(watching)]
            assert states(seen) == [QUEUED, CONDITIONING, CONDITIONING]
            assert seen[-1].job.progress.step == 49
            for number in range(50, 90):
                step(f.jobs, live, number)
            await move(f.jobs, live, *PATH_TO_SUCCESS[1:])
            rest = [event async for event in watching]
            assert states(rest) == list(PATH_TO_SUCCESS[1:])
            assert sequences(seen + rest) == sorted(set(sequences(seen + rest)))

    asyncio.run(scenario())


def test_progress_in_quick_succession_is_one_event(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            await move(f.jobs, live, CONDITIONING)
            seen: list[pb.JobEvent] = []

            async def watch() -> None:
                async for event in f.jobs.watch(live.job_id, 2):
                    seen.append(event)  # noqa: PERF401 - it is read while it grows

            watching = asyncio.create_task(watch())
            await until(lambda: live.watchers == 1)
            for number in range(1, 31):
                step(f.jobs, live, number)
                await asyncio.sleep(0.001)
            await until(lambda: bool(seen) and seen[-1].job.progress.step == 30)
            assert len(seen) < 15
            watching.cancel()

    asyncio.run(scenario())


def test_progress_is_not_told_beside_a_newer_picture(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            step(f.jobs, live, 1)
            f.jobs.progress(live, pb.Preview(step=1))
            assert [event.preview.step for event in live.events_after(1)] == [1]
            step(f.jobs, live, 2)
            assert [event.job.progress.step for event in live.events_after(1)] == [1, 2]

    asyncio.run(scenario())


def test_what_follows_a_transition_is_not_seen_before_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            f.store.hold()
            moving = asyncio.create_task(move(f.jobs, live, CONDITIONING))
            await f.reached()
            step(f.jobs, live, 1)
            f.jobs.progress(live, pb.Preview(step=1))
            step(f.jobs, live, 2)
            assert states(live.events_after(0)) == [QUEUED]
            assert live.known.state == QUEUED
            f.store.open.set()
            await moving
            assert states(live.events_after(0)) == [QUEUED, *[CONDITIONING] * 3]
            assert live.known.progress.step == 2

    asyncio.run(scenario())


def test_events_do_not_change_after_they_were_seen(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            first = await first_of(f.jobs.watch(live.job_id, 0))
            live.job.progress.step = 7
            await move(f.jobs, live, CONDITIONING)
            assert (first.job.state, first.job.progress.step) == (QUEUED, 0)

    asyncio.run(scenario())


def test_watching_during_the_last_write_still_ends_with_the_final_state(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            f.store.hold()
            cancelling = asyncio.create_task(f.jobs.cancel(live.job_id))
            await f.reached()
            watching = asyncio.create_task(watched(f.jobs, live.job_id))
            await until(lambda: live.watchers == 1)
            f.store.open.set()
            assert states(await watching) == [QUEUED, CANCELLED]
            await cancelling

    asyncio.run(scenario())


def test_an_unknown_job_cannot_be_watched_read_or_cancelled(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            for call in (watched(f.jobs, "no"), f.jobs.get("no"), f.jobs.cancel("no")):
                with pytest.raises(RequestError, match="job_id: no job 'no'"):
                    await call

    asyncio.run(scenario())


def test_sequence_numbers_grow_across_restarts_even_of_a_job_that_only_waits(tmp_path: Path) -> None:
    async def life(seen: list[int]) -> None:
        async with front(tmp_path) as f:
            restored = await f.jobs.restore()
            live = restored[0] if restored else await f.accept(new_job("waiting"))
            for number in range(3):
                step(f.jobs, live, number)
                event = live.latest
                assert event is not None
                seen.append(event.sequence)

    seen: list[int] = []
    for _ in range(3):
        asyncio.run(life(seen))
    assert seen == sorted(set(seen))


def test_a_watcher_from_before_the_restart_misses_no_transition(tmp_path: Path) -> None:
    async def before() -> int:
        async with front(tmp_path) as f:
            live = await f.accept(new_job("job"))
            await move(f.jobs, live, CONDITIONING)
            for number in range(100):
                step(f.jobs, live, number)
            return live.sequence

    async def after(seen: int) -> list[pb.JobEvent]:
        async with front(tmp_path) as f:
            (live,) = await f.jobs.restore()
            watching = asyncio.create_task(watched(f.jobs, "job", seen))
            await until(lambda: live.watchers == 1)
            await move(f.jobs, live, *PATH_TO_SUCCESS)
            return await watching

    events = asyncio.run(after(asyncio.run(before())))
    assert states(events) == [QUEUED, *PATH_TO_SUCCESS]


def test_a_restart_queues_what_was_running_from_its_beginning_oldest_first(tmp_path: Path) -> None:
    async def before() -> None:
        async with front(tmp_path) as f:
            oldest = await f.accept(new_job("oldest"))
            await f.accept(new_job("waiting"))
            ended = await f.accept(new_job("ended"))
            await move(f.jobs, oldest, *PATH_TO_SUCCESS[:3])
            oldest.job.progress.step, oldest.job.progress.frames_decoded = 2, 1
            await move(f.jobs, ended, *PATH_TO_SUCCESS)

    async def after() -> None:
        async with front(tmp_path) as f:
            oldest, waiting = await f.jobs.restore()
            assert (oldest.job_id, oldest.job.state, oldest.attempts) == ("oldest", QUEUED, 0)
            assert (oldest.job.progress.step, oldest.job.progress.frames_decoded) == (0, 0)
            assert oldest.job.start_time.ToMicroseconds() >= oldest.job.create_time.ToMicroseconds()
            assert (waiting.job_id, waiting.job.state) == ("waiting", QUEUED)

    asyncio.run(before())
    asyncio.run(after())


def test_an_attached_job_is_cancelled_when_its_last_watcher_has_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path, grace_seconds=AT_ONCE) as f:
            live = await f.accept(new_job(detached=False))
            staying, leaving = (asyncio.create_task(watched(f.jobs, live.job_id)) for _ in range(2))
            await until(lambda: live.watchers == 2)
            leaving.cancel()
            await until(lambda: live.watchers == 1)
            assert live.grace is None
            staying.cancel()
            await until(lambda: live.ended)
            assert states(await watched(f.jobs, live.job_id)) == [QUEUED, CANCELLED]

    asyncio.run(scenario())


def test_without_any_grace_the_caller_can_still_begin_to_watch(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path, grace_seconds=0.0) as f:
            live = await f.accept(new_job(detached=False))
            await asyncio.sleep(0.01)
            assert not live.ended
            await first_of(f.jobs.watch(live.job_id, 0))
            await until(lambda: live.ended)

    asyncio.run(scenario())


def test_a_running_attached_job_is_asked_to_stop(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path, grace_seconds=AT_ONCE) as f:
            live = await f.accept(new_job(detached=False))
            await move(f.jobs, live, CONDITIONING)
            await first_of(f.jobs.watch(live.job_id, 0))
            await until(lambda: live.stop_requested)
            assert live.job.state == CONDITIONING

    asyncio.run(scenario())


def test_watching_again_in_time_saves_an_attached_job(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job(detached=False))
            counting = live.grace
            assert counting is not None
            watching = asyncio.create_task(watched(f.jobs, live.job_id))
            await until(lambda: live.watchers == 1)
            assert counting.cancelled()
            assert live.grace is None
            watching.cancel()
            await until(lambda: live.watchers == 0)
            assert live.grace is not None  # counted anew

    asyncio.run(scenario())


def test_a_stream_that_is_dropped_between_two_events_counts_as_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path, grace_seconds=AT_ONCE) as f:
            live = await f.accept(new_job(detached=False))
            await first_of(f.jobs.watch(live.job_id, 0))
            await until(lambda: live.ended)

    asyncio.run(scenario())


def test_a_detached_job_needs_no_watcher(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path, grace_seconds=0.0) as f:
            live = await f.accept(new_job(detached=True))
            watching = asyncio.create_task(watched(f.jobs, live.job_id))
            await until(lambda: live.watchers == 1)
            watching.cancel()
            attached = await f.accept(new_job(detached=False))
            await first_of(f.jobs.watch(attached.job_id, 0))
            await until(lambda: attached.ended)  # whose grace began later
            assert (live.grace, live.stop_requested, live.job.state) == (None, False, QUEUED)

    asyncio.run(scenario())


def test_a_shutdown_cancels_nothing_and_the_grace_is_counted_anew_afterwards(tmp_path: Path) -> None:
    async def before() -> None:
        async with front(tmp_path, grace_seconds=AT_ONCE) as f:
            live = await f.accept(new_job("job", detached=False))
            f.jobs.stop_watching()
            assert live.grace is not None
            assert live.grace.cancelled()

    async def after() -> None:
        async with front(tmp_path) as f:
            (live,) = await f.jobs.restore()
            assert live.grace is not None
            assert (live.job.state, live.job.detached, live.stop_requested) == (QUEUED, False, False)

    asyncio.run(before())
    asyncio.run(after())


def test_watchers_are_told_of_a_shutdown(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job(detached=False))
            watching = asyncio.create_task(watched(f.jobs, live.job_id))
            await until(lambda: live.watchers == 1)
            f.jobs.stop_watching()
            with pytest.raises(ShuttingDown, match="the job is kept"):
                await watching
            with pytest.raises(ShuttingDown):
                await watched(f.jobs, live.job_id)
            assert live.grace is None

    asyncio.run(scenario())


def test_a_queued_job_is_cancelled_at_once_and_only_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            answers = await asyncio.gather(*(f.jobs.cancel(live.job_id) for _ in range(3)))
            assert [answer.state for answer in answers] == [CANCELLED] * 3
            assert (await f.jobs.cancel(live.job_id)).state == CANCELLED
            assert states(await watched(f.jobs, live.job_id)) == [QUEUED, CANCELLED]
            assert (await f.jobs.get(live.job_id)).HasField("end_time")

    asyncio.run(scenario())


def test_a_job_that_is_being_cancelled_cannot_be_started(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            f.store.hold()
            cancelling = asyncio.create_task(f.jobs.cancel(live.job_id))
            await f.reached()
            starting = asyncio.create_task(f.jobs.transition(live, CONDITIONING))
            f.store.open.set()
            assert (await cancelling).state == CANCELLED
            with pytest.raises(ValueError, match="from cancelled to conditioning"):
                await starting


def test_a_transition_that_is_taken_back_takes_no_later_one_with_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            f.store.hold()
            f.store.broken_once = True
            starting = asyncio.create_task(f.jobs.transition(live, CONDITIONING))
            await f.reached()
            cancelling = asyncio.create_task(f.jobs.transition(live, CANCELLED))
            f.store.open.set()
            with pytest.raises(OSError, match="disk full"):
                await starting
            await cancelling
            assert states(await watched(f.jobs, live.job_id)) == [QUEUED, CANCELLED]

    asyncio.run(scenario())


def test_a_cancel_whose_caller_vanishes_is_still_carried_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            f.store.hold()
            cancelling = asyncio.create_task(f.jobs.cancel(live.job_id))
            await f.reached()
            cancelling.cancel()
            await asyncio.wait([cancelling])
            f.store.open.set()
            assert states(await watched(f.jobs, live.job_id)) == [QUEUED, CANCELLED]

    asyncio.run(scenario())


def test_a_job_whose_caller_vanishes_while_it_is_accepted_is_known_or_not_stored(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            f.store.hold()
            accepting = asyncio.create_task(f.accept(new_job("job", detached=False)))
            await f.reached()
            accepting.cancel()
            await asyncio.wait([accepting])
            f.store.open.set()
            await until(lambda: f.jobs.live("job") is not None)
            live = f.jobs.live("job")
            assert live is not None
            assert live.grace is not None
            assert await f.jobs.page(10, None, JobFilter([QUEUED])) == [live.job]

    asyncio.run(scenario())


def test_a_transition_that_cannot_be_stored_did_not_happen(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            f.store.broken = True
            with pytest.raises(OSError, match="disk full"):
                await f.jobs.transition(live, CONDITIONING)
            assert (live.job.state, live.attempts, len(live.transitions)) == (QUEUED, 0, 1)
            assert f.registry.get_sample_value("cinecat_jobs", {"state": "queued"}) == 1
            f.store.broken = False
            await move(f.jobs, live, *PATH_TO_SUCCESS)
            assert states(await watched(f.jobs, live.job_id)) == [QUEUED, *PATH_TO_SUCCESS]

    asyncio.run(scenario())


def test_a_job_that_cannot_be_stored_is_not_accepted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            f.store.broken = True
            with pytest.raises(RequestError, match="cannot be stored now: disk full") as refused:
                await f.accept(new_job("job"))
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE
            assert f.jobs.live("job") is None
            assert await f.jobs.page(10, None, JobFilter()) == []
            assert list((tmp_path / "inputs").iterdir()) == []

    asyncio.run(scenario())


def test_a_request_id_makes_one_job(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            both = await asyncio.gather(
                *(f.jobs.accept(new_job(name, request_id="r"), FRAME, name) for name in ("a", "b"))
            )
            (live,) = [live for live, _ in both if live is not None]
            (existing,) = [stored for _, stored in both if stored is not None]
            assert existing.job.job_id == existing.request_hash == live.job_id
            assert await f.jobs.by_request_id("", "r") == existing
            assert [path.stem for path in (tmp_path / "inputs").iterdir()] == [live.job_id]

    asyncio.run(scenario())


def test_lists_show_the_progress_of_what_runs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            await move(f.jobs, live, CONDITIONING, DENOISING)
            live.job.progress.step = 2
            f.jobs.progress(live)
            (listed,) = await f.jobs.page(10, None, JobFilter([DENOISING]))
            assert listed.progress.step == (await f.jobs.get(live.job_id)).progress.step == 2

    asyncio.run(scenario())


def test_a_failed_job_says_why_and_has_no_result(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with front(tmp_path) as f:
            live = await f.accept(new_job())
            await move(f.jobs, live, CONDITIONING, DENOISING)
            await f.jobs.fail(live, 13, "the engine failed")
            job = await f.jobs.get(live.job_id)
            assert (job.state, job.error.code, job.error.message) == (pb.JOB_STATE_FAILED, 13, "the engine failed")
            assert not job.HasField("result")

    asyncio.run(scenario())


def test_the_frame_of_a_job_is_kept_until_its_end_and_across_restarts(tmp_path: Path) -> None:
    async def before() -> None:
        async with front(tmp_path) as f:
            await f.accept(new_job("kept"))
            ended = await f.accept(new_job("ended"))
            await f.jobs.cancel(ended.job_id)
            f.inputs.save("never-accepted", FRAME)

    async def after() -> None:
        async with front(tmp_path) as f:
            await f.jobs.restore()
            assert [path.name for path in (tmp_path / "inputs").iterdir()] == ["kept.png"]

    asyncio.run(before())
    asyncio.run(after())


def test_the_weights_of_a_job_are_kept_until_its_end_and_across_restarts(tmp_path: Path) -> None:
    fingerprint = "f" * 64
    weights = tmp_path / "noir.safetensors"
    weights.write_bytes(b"noir")
    job = new_job("kept")
    job.clip.styles.add(name="noir", version="1.0.0", strength=1.0, fingerprint=fingerprint)

    async def before() -> None:
        async with front(tmp_path) as f:
            await f.jobs.accept(job, FRAME, "hash", {fingerprint: weights})

    async def after() -> None:
        async with front(tmp_path) as f:
            (live,) = await f.jobs.restore()
            kept = f.inputs.weights(fingerprint)
            assert kept is not None
            assert kept.read_bytes() == b"noir"
            await f.jobs.cancel(live.job_id)
            assert f.inputs.weights(fingerprint) is None

    asyncio.run(before())
    weights.unlink()
    asyncio.run(after())
