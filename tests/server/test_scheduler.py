"""The queue is worked off in order, whatever becomes of single jobs, of the engine core and of the database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cinecat.engines.errors import CoreDied, EngineError, EngineFault, ModelError, NoFreeSlot, OutOfMemory
from cinecat.plugins.registry import UnknownStyle
from cinecat.server import scheduler as scheduler_module
from cinecat.server.artifacts import ArtifactError
from cinecat.server.costs import Costs
from cinecat.server.errors import RequestError, ShuttingDown
from cinecat.server.jobs import LiveJob
from cinecat.server.render import Stopped
from cinecat.server.scheduler import Scheduler
from cinecat.v1 import job_pb2 as pb
from tests.server.samples import NEVER_S, PATH_TO_SUCCESS, Front, front, model, move, new_job, until

FAILED = pb.JOB_STATE_FAILED
QUEUED = pb.JOB_STATE_QUEUED
CANCELLED = pb.JOB_STATE_CANCELLED
SUCCEEDED = pb.JOB_STATE_SUCCEEDED


class ScriptedCore:
    """An engine core that dies, and comes back, when told to."""

    def __init__(self) -> None:
        self.died = asyncio.Event()
        self.restarts = 0
        self.refusals: list[Exception] = []
        self.killed = asyncio.Event()

    async def restart(self) -> None:
        self.restarts += 1
        if self.refusals:
            raise self.refusals.pop(0)
        self.died = asyncio.Event()

    def kill(self) -> None:
        self.killed.set()


class ScriptedRenderer:
    """Moves jobs along; what happens to a job while it denoises is looked up by its id, once for each attempt."""

    def __init__(self, f: Front, core: ScriptedCore) -> None:
        self._jobs = f.jobs
        self._core = core
        self.rendered: list[str] = []
        self.fates: dict[str, list[Exception]] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    def begin(self, live: LiveJob) -> ScriptedRendering:
        self.rendered.append(live.job_id)
        return ScriptedRendering(self, live)

    async def advance(self, live: LiveJob) -> bool:
        if live.job.state == QUEUED:
            await move(self._jobs, live, *PATH_TO_SUCCESS[:2])
            return False
        await self._work()
        if live.stop_requested:
            raise Stopped
        if fates := self.fates.get(live.job_id):
            if isinstance(fates[0], CoreDied):
                self._core.died.set()
            raise fates.pop(0)
        await self._jobs.transition(live, PATH_TO_SUCCESS[2])
        return True

    async def finish(self, live: LiveJob) -> None:
        await move(self._jobs, live, *PATH_TO_SUCCESS[3:])

    async def _work(self) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (self.gate, self._core.killed)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._core.killed.is_set():
            self._core.died.set()
            raise CoreDied("the engine core died with exit code -9")


class ScriptedRendering:
    def __init__(self, renderer: ScriptedRenderer, live: LiveJob) -> None:
        self._renderer = renderer
        self.live = live

    async def advance(self) -> bool:
        return await self._renderer.advance(self.live)

    async def finish(self) -> None:
        await self._renderer.finish(self.live)

    async def leave_core(self) -> None:
        pass

    async def abandon(self) -> None:
        pass


class Line:
    """A scheduler, its worker, and all that they work with."""

    def __init__(self, f: Front, max_queue: int) -> None:
        self.front = f
        self.core = ScriptedCore()
        self.renderer = ScriptedRenderer(f, self.core)
        self.core_states: list[bool] = []
        self.costs = Costs()
        renderer: Any = self.renderer
        core: Any = self.core
        self.scheduler = Scheduler(
            f.jobs, renderer, core, model(), max_queue, f.metrics, self.costs, self._on_core_state
        )
        self.worker = asyncio.create_task(self.scheduler.run())

    async def _on_core_state(self, alive: bool) -> None:
        self.core_states.append(alive)

    async def enqueue(self, *names: str, style: str = "") -> list[LiveJob]:
        made = [new_job(name) for name in names]
        if style:
            for job in made:
                job.clip.styles.add(name=style, strength=1.0)
        jobs = [await self.front.accept(job) for job in made]
        for live in jobs:
            self.scheduler.enqueue(live)
        return jobs

    async def drain(self, seconds: float = NEVER_S, hurry: asyncio.Event | None = None) -> None:
        await self.scheduler.drain(self.worker, seconds, hurry or asyncio.Event())


def with_line(
    folder: Path, scenario: Callable[[Line], Any], *, max_queue: int = 10, core_refuses: tuple[Exception, ...] = ()
) -> None:
    async def run() -> None:
        async with line(folder, max_queue) as running:
            running.core.refusals += core_refuses
            await asyncio.wait_for(scenario(running), 60)

    asyncio.run(run())


@asynccontextmanager
async def line(folder: Path, max_queue: int) -> AsyncIterator[Line]:
    async with front(folder) as f:
        running = Line(f, max_queue)
        yield running
        running.renderer.gate.set()
        await running.drain()


async def ended(*jobs: LiveJob) -> None:
    await until(lambda: all(live.transitions[-1].job.state in (SUCCEEDED, FAILED, CANCELLED) for live in jobs))


def test_jobs_are_worked_off_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        jobs = await line.enqueue("a", "b", "c")
        await ended(*jobs)
        assert line.renderer.rendered == ["a", "b", "c"]
        assert {live.job.state for live in jobs} == {SUCCEEDED}

    with_line(tmp_path, scenario)


def test_a_full_queue_takes_no_more(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.renderer.gate.clear()
        running, *_ = await line.enqueue("running")
        await until(lambda: bool(line.renderer.rendered))
        waiting = await line.enqueue("a", "b")
        with pytest.raises(RequestError, match="2 jobs are waiting") as refused:
            line.scheduler.admit()
        assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        await line.front.jobs.cancel("a")
        line.scheduler.admit()
        line.renderer.gate.set()
        await ended(running, *waiting)

    with_line(tmp_path, scenario, max_queue=2)


def test_waiting_jobs_know_their_place_and_a_running_one_has_none(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.renderer.gate.clear()
        a, b, c = await line.enqueue("a", "b", "c")
        await until(lambda: a.job.state == PATH_TO_SUCCESS[1])
        assert [live.job.progress.queue_position for live in (a, b, c)] == [0, 1, 2]
        assert line.front.registry.get_sample_value("cinecat_queue_depth") == 2
        await line.front.jobs.cancel("b")
        assert c.job.progress.queue_position == 1
        line.renderer.gate.set()
        await until(lambda: c.job.state != QUEUED)
        assert c.job.progress.queue_position == 0
        await ended(a, c)
        assert line.front.registry.get_sample_value("cinecat_queue_depth") == 0

    with_line(tmp_path, scenario)


def test_waiting_jobs_have_an_eta_once_costs_are_known(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.renderer.gate.clear()
        a, b = await line.enqueue("a", "b")
        assert not b.job.progress.HasField("eta")
        for work in ("condition", "step", "decode"):
            line.costs.observe(work, 1, 0.001)
        (c,) = await line.enqueue("c")
        assert 0 < b.job.progress.eta.ToNanoseconds() < c.job.progress.eta.ToNanoseconds()
        line.renderer.gate.set()
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
        line.renderer.fates["bad"] = [error]
        bad, good = await line.enqueue("bad", "good")
        await ended(bad, good)
        assert (bad.job.state, bad.job.error.code) == (FAILED, code.value[0])
        assert bad.job.error.message == (f"{error}" or "the server failed on this request; its log says why")
        assert good.job.state == SUCCEEDED

    with_line(tmp_path, scenario)


def test_a_cancelled_running_job_ends_and_the_next_one_is_served(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.renderer.gate.clear()
        running, following = await line.enqueue("running", "following")
        await until(lambda: running.job.state == PATH_TO_SUCCESS[1])
        await line.front.jobs.cancel("running")
        line.renderer.gate.set()
        await ended(running, following)
        assert (running.job.state, following.job.state) == (CANCELLED, SUCCEEDED)

    with_line(tmp_path, scenario)


def test_a_job_whose_core_died_is_tried_once_more_before_the_others(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.renderer.fates["a"] = [CoreDied("exit code -9")]
        a, b = await line.enqueue("a", "b")
        await ended(a, b)
        assert line.renderer.rendered == ["a", "a", "b"]
        assert (a.job.state, a.attempts, line.core.restarts) == (SUCCEEDED, 2, 1)
        assert line.core_states == [False, True]

    with_line(tmp_path, scenario)


def test_a_job_that_kills_the_core_twice_fails(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.renderer.fates["a"] = [CoreDied("exit code -9"), CoreDied("exit code -11")]
        a, b = await line.enqueue("a", "b")
        await ended(a, b)
        assert (a.job.state, a.job.error.code) == (FAILED, grpc.StatusCode.UNAVAILABLE.value[0])
        assert "exit code -11; the job was tried 2 times" in a.job.error.message
        assert b.job.state == SUCCEEDED
        assert line.core.restarts == 2

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
    monkeypatch.setattr(scheduler_module, "_PAUSES_S", (0.0, 0.001))

    async def scenario(line: Line) -> None:
        line.renderer.fates["a"] = [CoreDied("exit code -9")]
        (live,) = await line.enqueue("a")
        await ended(live)
        assert (live.job.state, line.core.restarts) == (SUCCEEDED, 4)

    with_line(tmp_path, scenario, core_refuses=(CoreDied("no"), ModelError("no"), OutOfMemory("no")))


def test_a_shutdown_does_not_wait_for_the_next_try_to_start_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "_PAUSES_S", (0.0, NEVER_S))

    async def scenario(line: Line) -> None:
        line.renderer.fates["a"] = [CoreDied("exit code -9")]
        (live,) = await line.enqueue("a")
        await until(lambda: line.core.restarts == 1)
        await line.drain()
        assert (live.job.state, line.core.restarts) == (QUEUED, 1)

    with_line(tmp_path, scenario, core_refuses=(ModelError("no"),))


def test_a_drain_lets_the_running_job_end_and_keeps_the_waiting_ones(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.renderer.gate.clear()
        running, waiting = await line.enqueue("running", "waiting")
        await until(lambda: running.job.state == PATH_TO_SUCCESS[1])
        draining = asyncio.create_task(line.drain())
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            line.scheduler.admit()
        line.renderer.gate.set()
        await draining
        assert (running.job.state, waiting.job.state) == (SUCCEEDED, QUEUED)
        assert not line.core.killed.is_set()

    with_line(tmp_path, scenario)


@pytest.mark.parametrize("seconds", [0.01, NEVER_S])
def test_a_drain_that_takes_too_long_puts_the_running_job_back(tmp_path: Path, seconds: float) -> None:
    async def scenario(line: Line) -> None:
        line.renderer.gate.clear()
        (running,) = await line.enqueue("running")
        await until(lambda: running.job.state == PATH_TO_SUCCESS[1])
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
        line.renderer.gate.clear()
        (running,) = await line.enqueue("running")
        await until(lambda: running.job.state == PATH_TO_SUCCESS[1])
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
    monkeypatch.setattr(scheduler_module, "_PAUSES_S", (0.0, 0.001))

    async def scenario(line: Line) -> None:
        line.renderer.gate.clear()
        line.renderer.fates["unlucky"] = [fate]
        unlucky, _ = await line.enqueue("unlucky", "following")
        following = line.front.jobs.live("following")
        assert following is not None
        await until(lambda: unlucky.transitions[-1].job.state == PATH_TO_SUCCESS[1])
        line.front.store.hold()
        line.renderer.gate.set()
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
        line.renderer.fates["a"] = [NoFreeSlot(NO_SLOT)]
        line.renderer.gate.clear()
        (a,) = await line.enqueue("a", style="noir")
        (plain,) = await line.enqueue("plain")
        line.renderer.gate.set()
        await until(lambda: a.job.progress.wait_reason == NO_SLOT)
        assert (a.job.state, a.attempts) == (QUEUED, 0)
        await ended(a, plain)
        assert line.renderer.rendered == ["a", "plain", "a"]
        assert {a.job.state, plain.job.state} == {SUCCEEDED}
        waited = [event.job for event in a.transitions if event.job.progress.wait_reason]
        assert [(job.state, job.progress.wait_reason) for job in waited] == [(QUEUED, NO_SLOT)]
        assert a.attempts == 1

    with_line(tmp_path, scenario)


def test_a_job_that_waits_for_a_slot_is_not_overtaken_by_one_that_needs_a_slot_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "_SLOT_RETRY_S", 0.001)

    async def scenario(line: Line) -> None:
        line.renderer.fates["first"] = [NoFreeSlot(NO_SLOT)] * 3
        styled = await line.enqueue("first", "second", style="noir")
        await ended(*styled)
        assert line.renderer.rendered == ["first"] * 4 + ["second"]
        assert {live.job.state for live in styled} == {SUCCEEDED}

    with_line(tmp_path, scenario)


def test_a_job_at_strength_zero_needs_no_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_SLOT_RETRY_S", NEVER_S)

    async def scenario(line: Line) -> None:
        line.renderer.fates["first"] = [NoFreeSlot(NO_SLOT)]
        (first,) = await line.enqueue("first", style="noir")
        await until(lambda: first.job.progress.wait_reason == NO_SLOT)
        job = new_job("off")
        job.clip.styles.add(name="noir", strength=0.0)
        off = await line.front.accept(job)
        line.scheduler.enqueue(off)
        await ended(first, off)
        assert line.renderer.rendered == ["first", "off", "first"]

    with_line(tmp_path, scenario)


def test_a_job_that_waits_for_a_slot_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_SLOT_RETRY_S", NEVER_S)

    async def scenario(line: Line) -> None:
        line.renderer.fates["a"] = [NoFreeSlot(NO_SLOT)]
        (a,) = await line.enqueue("a", style="noir")
        await until(lambda: a.job.progress.wait_reason == NO_SLOT)
        await line.front.jobs.cancel("a")
        await ended(a)
        assert a.job.state == CANCELLED
        await ended(*await line.enqueue("b"))
        assert line.renderer.rendered == ["a", "b"]

    with_line(tmp_path, scenario)


def test_a_job_that_is_cancelled_while_it_finds_no_slot_ends(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.renderer.gate.clear()
        line.renderer.fates["a"] = [NoFreeSlot(NO_SLOT)]
        (a,) = await line.enqueue("a", style="noir")
        await until(lambda: a.job.state == PATH_TO_SUCCESS[1])
        a.stop_requested = True
        line.renderer.gate.set()
        await ended(a)
        assert a.job.state == CANCELLED

    with_line(tmp_path, scenario)
