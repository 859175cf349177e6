"""Ended jobs go for their age or for the room they take, oldest first; nothing else goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cinecat.server.artifacts import ArtifactError, ArtifactFormat, ArtifactStore, WrittenArtifact
from cinecat.server.errors import RequestError
from cinecat.server.retention import Retention
from cinecat.server.settings import SettingsError
from cinecat.server.storage import check_owner
from cinecat.server.store import EndedJob, JobStore, StoredJob
from cinecat.v1 import job_pb2 as pb
from tests.server.samples import PATH_TO_SUCCESS, Front, front, move, new_job, until

DAY_S = 86_400.0
NOW_S = 1_800_000_000.0
KIB = 2**10 / 2**30  # in GiB


@dataclass
class Setting:
    """A front with files, at a time that stands still until it is set."""

    front: Front
    artifacts: ArtifactStore
    now_s: float = NOW_S

    def retention(self, days: float = 0.0, gib: float = 0.0) -> Retention:
        return Retention(self.front.jobs, self.artifacts, days, gib, self.front.metrics, lambda: self.now_s)

    async def ended(
        self, number: int, age_s: float, size: int = 1024, state: pb.JobState.ValueType = pb.JOB_STATE_SUCCEEDED
    ) -> str:
        """A job that ended that long ago; with a clip of `size` bytes."""
        job = new_job(f"{number:032x}")
        job.state = state
        job.end_time.FromMicroseconds(round((self.now_s - age_s) * 1e6))
        if size:
            self.write(job.job_id, size)
            job.result.artifacts.add(name="clip.mp4", size_bytes=size)
        stored = StoredJob(job, "hash", 1)
        await self.front.jobs.ask_store(lambda store: store.insert(stored, pb.JobEvent(sequence=1, job=job)))
        return job.job_id

    def write(self, job_id: str, size: int = 1) -> None:
        path = self.artifacts.scratch_path(job_id, ArtifactFormat.MP4_H264)
        path.write_bytes(bytes(size))
        self.artifacts.publish(job_id, WrittenArtifact(path, ArtifactFormat.MP4_H264))

    async def known(self) -> list[str]:
        return [job.job_id for job in await self.front.jobs.ask_store(lambda store: store.ended(2**62, 100))]

    def removed(self, reason: str) -> float:
        return self.front.registry.get_sample_value("cinecat_jobs_removed_total", {"reason": reason}) or 0.0


@asynccontextmanager
async def setting(folder: Path) -> AsyncIterator[Setting]:
    async with front(folder) as running:
        yield Setting(running, ArtifactStore(str(folder / "artifacts")))


def test_jobs_past_their_days_go_with_their_files(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with setting(tmp_path) as s:
            old = await s.ended(1, 2 * DAY_S + 1)
            failed = await s.ended(2, 2 * DAY_S + 1, size=0, state=pb.JOB_STATE_FAILED)
            young = await s.ended(3, 2 * DAY_S - 1)
            await s.retention(days=2).round()
            assert await s.known() == s.artifacts.job_ids() == [young]
            assert s.removed("age") == 2
            for gone in (old, failed):
                with pytest.raises(RequestError, match="no job"):
                    await s.front.jobs.get(gone)
            s.now_s += 2
            await s.retention(days=2).round()
            assert await s.known() == s.artifacts.job_ids() == []

    asyncio.run(scenario())


def test_by_default_everything_stays(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with setting(tmp_path) as s:
            kept = await s.ended(1, 1000 * DAY_S)
            await s.retention().round()
            assert await s.known() == s.artifacts.job_ids() == [kept]

    asyncio.run(scenario())


def test_the_oldest_clips_go_until_the_rest_has_room(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with setting(tmp_path) as s:
            ages = {number: (9 - number) * DAY_S for number in range(1, 5)}
            clips = [await s.ended(number, age) for number, age in ages.items()]
            without_files = await s.ended(9, 20 * DAY_S, size=0, state=pb.JOB_STATE_CANCELLED)
            await s.retention(gib=2.5 * KIB).round()
            assert await s.known() == [without_files, *clips[2:]]
            assert s.artifacts.job_ids() == clips[2:]
            assert s.removed("size") == 2

    asyncio.run(scenario())


def test_a_clip_of_the_last_minutes_stays_however_little_room_there_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with setting(tmp_path) as s:
            fresh = await s.ended(1, 599)
            await s.retention(gib=KIB / 2).round()
            assert await s.known() == [fresh]
            s.now_s += 2
            await s.retention(gib=KIB / 2).round()
            assert await s.known() == []

    asyncio.run(scenario())


def test_no_unfinished_job_is_removed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with setting(tmp_path) as s:
            live = await s.front.accept(new_job(f"{1:032x}"))
            await move(s.front.jobs, live, *PATH_TO_SUCCESS[:-1])
            s.write(live.job_id)
            s.now_s = 4e9
            retention = s.retention(days=1, gib=KIB / 1024)
            await retention.remove_orphans()
            await retention.round()
            assert (await s.front.jobs.get(live.job_id)).state == pb.JOB_STATE_ENCODING
            assert s.artifacts.job_ids() == [live.job_id]

    asyncio.run(scenario())


def test_a_job_goes_only_when_its_download_has_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with setting(tmp_path) as s:
            first, second = await s.ended(1, 3 * DAY_S), await s.ended(2, 2 * DAY_S)
            retention = s.retention(days=1)
            with s.artifacts.being_read(first), s.artifacts.being_read(first):
                await retention.round()
                assert await s.known() == [first]
            assert second not in s.artifacts.job_ids()
            await retention.round()
            assert await s.known() == []

    asyncio.run(scenario())


def test_a_removal_that_was_cut_short_is_finished_by_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with setting(tmp_path) as s:
            job_id = await s.ended(1, 3 * DAY_S)
            with monkeypatch.context() as patch:
                patch.setattr(JobStore, "delete", raise_disk_full)
                with pytest.raises(OSError, match="disk full"):
                    await s.retention(days=1).round()
            assert (await s.known(), s.artifacts.job_ids()) == ([job_id], [])
            await s.retention(days=1).round()
            assert await s.known() == []

    asyncio.run(scenario())


def test_files_that_cannot_be_removed_keep_their_job_and_hold_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with setting(tmp_path) as s:
            stuck, other = await s.ended(1, 3 * DAY_S), await s.ended(2, 2 * DAY_S)
            delete = s.artifacts.delete_job

            def fail_on_first(job_id: str) -> None:
                if job_id == stuck:
                    raise ArtifactError("cannot")
                delete(job_id)

            monkeypatch.setattr(s.artifacts, "delete_job", fail_on_first)
            await s.retention(days=1).round()
            assert await s.known() == s.artifacts.job_ids() == [stuck]
            assert other != stuck

    asyncio.run(scenario())


def test_files_of_unknown_failed_and_cancelled_jobs_are_orphans(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with setting(tmp_path) as s:
            await s.retention().remove_orphans()  # which claims the folder
            good = await s.ended(1, DAY_S)
            await s.ended(2, DAY_S, state=pb.JOB_STATE_FAILED)
            await s.ended(3, DAY_S, state=pb.JOB_STATE_CANCELLED)
            s.write(f"{4:032x}")
            (tmp_path / "artifacts" / "jobs" / "notes").mkdir()
            await s.retention().remove_orphans()
            assert s.artifacts.job_ids() == [good]
            assert (tmp_path / "artifacts" / "jobs" / "notes").exists()
            assert len(await s.known()) == 3
            assert s.removed("orphan") == 3

    asyncio.run(scenario())


def test_files_of_another_database_are_no_orphans(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with setting(tmp_path) as s:
            s.write(f"{4:032x}")  # there before this database was
            await s.retention().remove_orphans()
            assert s.artifacts.owner() == ""
            s.artifacts.claim("another")
            await s.retention().remove_orphans()
            assert s.artifacts.job_ids() == [f"{4:032x}"]

    asyncio.run(scenario())


def test_a_server_does_not_start_over_the_clips_of_another_database(tmp_path: Path) -> None:
    artifacts = ArtifactStore(str(tmp_path / "artifacts"))
    check_owner(artifacts, "mine")
    artifacts.claim("mine")
    check_owner(artifacts, "mine")
    with pytest.raises(SettingsError, match="artifact_url: the clips there belong to another job database"):
        check_owner(artifacts, "other")


def test_what_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with setting(tmp_path) as s:
            await s.ended(1, 3 * DAY_S)
            monkeypatch.setattr("cinecat.server.retention._ROUND_S", 0.01)
            ended, calls = JobStore.ended, []

            def fail_once(store: JobStore, before_us: int, limit: int) -> list[EndedJob]:
                calls.append(before_us)
                return ended(store, before_us, limit) if len(calls) > 1 else raise_disk_full()

            monkeypatch.setattr(JobStore, "ended", fail_once)
            running = asyncio.create_task(s.retention(days=1).run())
            await until(lambda: s.removed("age") > 0)
            running.cancel()

    asyncio.run(scenario())


def raise_disk_full(*_: object) -> list[EndedJob]:
    raise OSError("disk full")
