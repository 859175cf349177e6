"""Replicas of one model share its queue, and none of its jobs is lost, done twice or left waiting for nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cinecat.engines.errors import CoreDied, NoFreeSlot
from cinecat.engines.messages import ResidentStyle, StepShape
from cinecat.server import patience as patience_module
from cinecat.v1 import clip_pb2
from cinecat.v1 import job_pb2 as pb
from tests.server.line import Line, ended, with_line
from tests.server.samples import NEVER_S, catalogue, until
from tests.server.scripted_core import STEP_S

QUEUED = pb.JOB_STATE_QUEUED
SUCCEEDED = pb.JOB_STATE_SUCCEEDED
DENOISING = pb.JOB_STATE_DENOISING
DIED = CoreDied("exit code -9")
NOIR = catalogue().find("noir").fingerprint


def replicas(line: Line, state: str) -> float | None:
    return line.front.registry.get_sample_value("cinecat_replicas", {"model": "wan-tiny", "state": state})


def test_replicas_work_side_by_side_and_each_job_is_begun_once(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        first, second = line.cores
        first.gate.clear()
        second.gate.clear()
        jobs = await line.enqueue("a", "b", "c", "d")
        await until(lambda: [live.job.state for live in jobs[:2]] == [DENOISING] * 2)
        assert [len(begun) for begun in line.begun] == [1, 1]
        first.gate.set()
        second.gate.set()
        await ended(*jobs)
        assert sorted(first.begun + second.begun) == ["a", "b", "c", "d"]
        assert {live.job.state for live in jobs} == {SUCCEEDED}

    with_line(tmp_path, scenario, replicas=2)


def test_a_waiting_job_belongs_to_whoever_is_free_first(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        stuck, free = line.cores
        stuck.gate.clear()
        jobs = await line.enqueue("a", "b", "c", "d", "e")
        await until(lambda: sum(live.ended for live in jobs) == 4)
        assert stuck.begun + free.begun == ["a", "b", "c", "d", "e"]
        stuck.gate.set()
        await ended(*jobs)

    with_line(tmp_path, scenario, replicas=2)


def test_jobs_of_a_replica_that_dies_go_on_elsewhere_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience_module, "_PAUSES_S", (NEVER_S,))

    async def scenario(line: Line) -> None:
        first, second = line.cores
        first.gate.clear()
        (a,) = await line.enqueue("a", clip=clip_pb2.ClipSpec(steps=6))
        await until(lambda: a.job.state == DENOISING)
        first.fates["a"] = [None, None, DIED]
        first.gate.set()
        await ended(a)
        assert (a.job.state, line.begun) == (SUCCEEDED, [["a"], ["a"]])
        # From its checkpoint: two steps were saved.
        assert [second.steps["a", step] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
        assert (replicas(line, "ready"), replicas(line, "restarting")) == (1, 1)
        assert line.fleet.works
        assert line.core_states == []  # the server never ceased to serve

    with_line(tmp_path, scenario, replicas=2)


def test_a_job_that_kills_every_core_is_given_up_all_the_same(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        for core in line.cores:
            core.fates["poison"] = [DIED] * 9
        poison, good = await line.enqueue("poison", "good")
        await ended(poison, good)
        assert "the job was tried 3 times" in poison.job.error.message
        assert good.job.state == SUCCEEDED
        assert sum(core.begun.count("poison") for core in line.cores) == 3

    with_line(tmp_path, scenario, replicas=2)


def test_a_replica_that_drains_ends_its_jobs_and_takes_no_more(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        leaving, staying = line.cores
        leaving.gate.clear()
        staying.gate.clear()
        a, b, c = await line.enqueue("a", "b", "c")
        await until(lambda: a.job.state == b.job.state == DENOISING)
        retiring = asyncio.create_task(line.pool.retire(line.replicas[0], NEVER_S))
        await until(lambda: replicas(line, "draining") == 1)
        leaving.gate.set()
        await retiring
        assert (a.job.state, c.job.state) == (SUCCEEDED, QUEUED)
        assert (leaving.begun, replicas(line, "draining")) == (["a"], 0)
        assert line.pool.replicas == line.replicas[1:]
        staying.gate.set()
        await ended(b, c)
        assert staying.begun == ["b", "c"]

    with_line(tmp_path, scenario, replicas=2)


def test_what_a_replica_cannot_end_in_time_goes_on_elsewhere_from_where_it_was(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        leaving, staying = line.cores
        staying.gate.clear()
        a, b = await line.enqueue("a", "b", clip=clip_pb2.ClipSpec(steps=400))
        await until(lambda: a.job.progress.step >= 3 and b.job.state == DENOISING)
        await line.pool.retire(line.replicas[0], 0.0)
        assert a.job.state == QUEUED
        assert "its engine core is taken out of service; goes on from step" in a.job.progress.wait_reason
        assert (leaving.begun, leaving.killed.is_set()) == (["a"], False)
        staying.gate.set()
        await ended(a, b)
        assert {a.job.state, b.job.state} == {SUCCEEDED}
        assert set((leaving.steps + staying.steps).values()) == {1}

    with_line(tmp_path, scenario, replicas=2)


def test_a_replica_that_joins_takes_work_at_once(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.gate.clear()
        a, b = await line.enqueue("a", "b")
        await until(lambda: a.job.state == DENOISING)
        await line.join()
        await ended(b)
        assert a.job.state == DENOISING
        line.core.gate.set()
        await ended(a)
        assert line.begun == [["a"], ["b"]]

    with_line(tmp_path, scenario)


def test_a_job_goes_to_the_idle_replica_that_has_its_styles(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        await until(lambda: all(replica.idle for replica in line.replicas))
        line.replicas[1].resident = (ResidentStyle(1, (NOIR,), 4096),)
        for number in range(3):
            (live,) = await line.enqueue(f"{number}", style="noir", fingerprint=NOIR)
            await ended(live)
        assert line.begun == [[], ["0", "1", "2"]]

    with_line(tmp_path, scenario, replicas=2)


def test_a_job_goes_to_the_idle_replica_whose_engine_is_built(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.replicas[0].gauges.building = True
        (live,) = await line.enqueue("a")
        await ended(live)
        assert line.begun == [[], ["a"]]

    with_line(tmp_path, scenario, replicas=2)


def test_a_job_does_not_wait_for_the_replica_that_has_its_styles(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        await until(lambda: all(replica.idle for replica in line.replicas))
        line.replicas[1].resident = (ResidentStyle(1, (NOIR,), 4096),)
        line.cores[1].gate.clear()
        jobs = [(await line.enqueue(name, style="noir", fingerprint=NOIR))[0] for name in ("first", "second", "third")]
        await ended(*jobs[1:])
        assert line.begun == [["second", "third"], ["first"]]
        line.cores[1].gate.set()
        await ended(*jobs)

    with_line(tmp_path, scenario, replicas=2)


def test_a_job_that_was_left_to_a_replica_is_taken_by_another_when_that_one_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience_module, "_PAUSES_S", (NEVER_S,))

    async def scenario(line: Line) -> None:
        await until(lambda: all(replica.idle for replica in line.replicas))
        line.replicas[1].resident = (ResidentStyle(1, (NOIR,), 4096),)
        line.cores[1].on_begin["a"] = [DIED]
        (live,) = await line.enqueue("a", style="noir", fingerprint=NOIR)
        await ended(live)
        assert (live.job.state, line.begun) == (SUCCEEDED, [["a"], ["a"]])

    with_line(tmp_path, scenario, replicas=2)


def test_a_job_that_finds_no_slot_in_one_replica_is_taken_by_another(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.core.on_begin["a"] = [NoFreeSlot("no style slot is free")] * 99
        (live,) = await line.enqueue("a", style="noir")
        await ended(live)
        assert (live.job.state, line.begun) == (SUCCEEDED, [["a"], ["a"]])

    with_line(tmp_path, scenario, replicas=2)


def test_jobs_are_not_put_together_while_a_replica_is_idle(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        for core in line.cores:
            core.row_share = 0.0
        for _ in range(5):
            line.costs.observe_step(StepShape("torch", 32), 1, STEP_S)
        a, b = await line.enqueue("a", "b", clip=clip_pb2.ClipSpec(steps=30))
        await ended(a, b)
        assert line.begun == [["a"], ["b"]]

    with_line(tmp_path, scenario, replicas=2)


def test_a_cancelled_job_is_stopped_by_the_replica_that_has_it(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        for core in line.cores:
            core.gate.clear()
        a, b = await line.enqueue("a", "b")
        await until(lambda: a.job.state == b.job.state == DENOISING)
        await line.front.jobs.cancel("b")
        line.cores[0].gate.set()
        await ended(a)
        assert b.job.state == DENOISING
        line.cores[1].gate.set()
        await ended(b)
        assert (a.job.state, b.job.state) == (SUCCEEDED, pb.JOB_STATE_CANCELLED)

    with_line(tmp_path, scenario, replicas=2)


def test_tenants_share_all_replicas(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        for core in line.cores:
            core.gate.clear()
        many = [await line.add(job, "a") for job in line.jobs("m0", "m1", "m2", "m3", "m4", "m5")]
        await until(lambda: sum(map(len, line.begun)) == 2)
        (one,) = [await line.add(job, "b") for job in line.jobs("one")]
        for core in line.cores:
            core.gate.set()
        await ended(one, *many)
        assert any(begun.index("one") == 1 for begun in line.begun if "one" in begun)

    with_line(tmp_path, scenario, replicas=2)


def test_two_replicas_halve_what_is_forecast(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        for work in ("condition", "step", "decode"):
            line.costs.observe(work, 1, 0.01)
        for core in line.cores:
            core.gate.clear()
        jobs = await line.enqueue(*map(str, range(8)))
        last = jobs[-1].job.progress.eta.ToNanoseconds()
        (only,) = [line.costs.whole(live.job.clip, (32, 32)) for live in jobs[:1]]
        assert only is not None
        assert last / 1e9 == pytest.approx(8 * only / 2, rel=0.3)
        for core in line.cores:
            core.gate.set()
        await ended(*jobs)

    with_line(tmp_path, scenario, replicas=2)


def test_a_drain_of_the_server_waits_for_every_replica(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        for core in line.cores:
            core.gate.clear()
        a, b, c = await line.enqueue("a", "b", "c")
        await until(lambda: a.job.state == b.job.state == DENOISING)
        draining = asyncio.create_task(line.drain())
        line.cores[0].gate.set()
        await ended(a)
        assert not draining.done()
        line.cores[1].gate.set()
        await draining
        assert (b.job.state, c.job.state) == (SUCCEEDED, QUEUED)

    with_line(tmp_path, scenario, replicas=2)
