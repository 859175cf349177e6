"""The job database keeps what it was told, in order, also for the next server and beside a reader."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

from cinecat.server.lifecycle import FINAL_STATES
from cinecat.server.store import JobStore, StoredJob
from cinecat.v1 import job_pb2 as pb
from tests.server.samples import new_job

STATES = [state for state in pb.JobState.values() if state != pb.JOB_STATE_UNSPECIFIED]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(tmp_path / "jobs.sqlite")
    yield opened
    opened.close()


def job_of(
    job_id: str, state: pb.JobState.ValueType = pb.JOB_STATE_QUEUED, created_us: int = 1, request_id: str = ""
) -> pb.Job:
    job = new_job(job_id, request_id=request_id)
    job.state = state
    job.create_time.FromMicroseconds(created_us)
    return job


def insert(store: JobStore, job: pb.Job, request_hash: str = "hash") -> StoredJob | None:
    return store.insert(StoredJob(job, request_hash, 0), pb.JobEvent(sequence=1, job=job))


def all_pages(store: JobStore, size: int, states: list[int]) -> list[list[str]]:
    pages = []
    before = None
    while page := store.page(size, before, states):
        pages.append([job.job_id for job in page])
        before = (page[-1].create_time.ToMicroseconds(), page[-1].job_id)
    return pages


def test_a_job_comes_back_as_it_was_inserted(store: JobStore) -> None:
    job = job_of("a", request_id="r")
    assert insert(store, job) is None
    assert store.get("a") == store.by_request_id("", "r") == StoredJob(job, "hash", 0)
    assert store.events("a") == [pb.JobEvent(sequence=1, job=job)]


def test_what_was_never_inserted_is_not_there(store: JobStore) -> None:
    assert store.get("a") is None
    assert store.by_request_id("", "") is None
    assert store.events("a") == []


def test_a_second_job_with_a_request_id_is_not_written(store: JobStore) -> None:
    insert(store, job_of("a", request_id="r"), "first")
    existing = insert(store, job_of("b", request_id="r"), "second")
    assert existing is not None
    assert (existing.job.job_id, existing.request_hash) == ("a", "first")
    assert store.get("b") is None
    assert store.events("b") == []


def test_jobs_without_a_request_id_do_not_collide(store: JobStore) -> None:
    assert insert(store, job_of("a")) is None
    assert insert(store, job_of("b")) is None


def test_a_job_id_cannot_be_taken_twice(store: JobStore) -> None:
    insert(store, job_of("a"))
    with pytest.raises(IntegrityError):
        insert(store, job_of("a"))


def test_transitions_survive_reopening(tmp_path: Path) -> None:
    first = JobStore(tmp_path / "jobs.sqlite")
    insert(first, job_of("a"))
    running = job_of("a", pb.JOB_STATE_CONDITIONING)
    first.record(pb.JobEvent(sequence=7, job=running), attempts=1)
    first.close()
    second = JobStore(tmp_path / "jobs.sqlite")
    assert second.get("a") == StoredJob(running, "hash", 1)
    assert [event.sequence for event in second.events("a")] == [1, 7]
    assert [event.sequence for event in second.events("a", 1)] == [7]
    second.close()


def test_a_transition_that_cannot_be_written_changes_nothing(store: JobStore) -> None:
    insert(store, job_of("a"))
    with pytest.raises(IntegrityError):
        store.record(pb.JobEvent(sequence=1, job=job_of("a", pb.JOB_STATE_FAILED)), attempts=5)
    kept = store.get("a")
    assert kept is not None
    assert (kept.job.state, kept.attempts) == (pb.JOB_STATE_QUEUED, 0)


def test_unfinished_jobs_come_oldest_first(store: JobStore) -> None:
    insert(store, job_of("newest", pb.JOB_STATE_DENOISING, created_us=9))
    insert(store, job_of("b-tied", created_us=5))
    insert(store, job_of("a-tied", created_us=5))
    for state in FINAL_STATES:
        insert(store, job_of(f"ended-{state}", state, created_us=1))
    assert [stored.job.job_id for stored in store.unfinished()] == ["a-tied", "b-tied", "newest"]


@pytest.mark.parametrize("name", ["what?", "50%20", "a#b", "with space", "ünïcode"])
def test_any_folder_can_hold_the_database(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "jobs.sqlite"
    opened = JobStore(path)
    insert(opened, job_of("a"))
    opened.close()
    assert path.exists()


@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    jobs=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(STATES)), max_size=9),
    size=st.integers(1, 5),
    states=st.lists(st.sampled_from(STATES), unique=True, max_size=3),
)
def test_pages_hold_every_job_once_newest_first(
    tmp_path_factory: pytest.TempPathFactory,
    jobs: list[tuple[int, pb.JobState.ValueType]],
    size: int,
    states: list[int],
) -> None:
    store = JobStore(tmp_path_factory.mktemp("store") / "jobs.sqlite")
    for number, (created_us, state) in enumerate(jobs):
        insert(store, job_of(f"job-{number}", state, created_us))
    wanted = [
        (created_us, f"job-{number}")
        for number, (created_us, state) in enumerate(jobs)
        if state in states or not states
    ]
    pages = all_pages(store, size, states)
    assert [job_id for page in pages for job_id in page] == [job_id for _, job_id in sorted(wanted, reverse=True)]
    assert all(len(page) == size for page in pages[:-1])
    store.close()


def test_a_thread_reads_whole_jobs_while_another_writes(store: JobStore) -> None:
    failures: list[str] = []
    done = threading.Event()

    def read() -> None:
        seen = 0
        while not done.is_set():
            jobs = store.page(1000, None, [])
            if len(jobs) < seen or any(not store.events(job.job_id) for job in jobs):
                failures.append(f"{len(jobs)} after {seen}")
            seen = len(jobs)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(40):
        insert(store, job_of(f"job-{number}", created_us=number))
    done.set()
    reader.join(30)
    assert not reader.is_alive()
    assert not failures


def test_another_process_reads_while_one_writes(store: JobStore, tmp_path: Path) -> None:
    insert(store, job_of("a"))
    path = tmp_path / "jobs.sqlite"
    writer = sqlite3.connect(path)
    writer.execute("update jobs set job_id = job_id")  # opens a transaction, which stays open while the other reads
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(job_ids, (path,)) == ["a"]
    writer.rollback()
    writer.close()


def job_ids(path: Path) -> list[str]:
    reader = JobStore(path)
    try:
        return [job.job_id for job in reader.page(10, None, [])]
    finally:
        reader.close()
