"""The job database keeps what it was told, in order, also for the next server and beside a reader."""

from __future__ import annotations

import multiprocessing
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

from cinecat.server.database import DatabaseError, DatabaseInUse
from cinecat.server.lifecycle import FINAL_STATES, TRANSITIONS
from cinecat.server.store import EndedJob, JobFilter, JobStore, StoredJob
from cinecat.v1 import job_pb2 as pb
from tests.server.postgresql import Cluster
from tests.server.samples import new_job

ROOT = Path(__file__).parents[2]

END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cinecat'"
STATES = [state for state in pb.JobState.values() if state != pb.JOB_STATE_UNSPECIFIED]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """An empty one."""
    if request.param == "sqlite":
        return tmp_path / "jobs.sqlite"
    running: Cluster = request.getfixturevalue("postgresql")
    return running.new_database()


@pytest.fixture
def store(database: Path | str) -> Iterator[JobStore]:
    opened = JobStore(database)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(tmp_path / "jobs.sqlite")
    yield opened
    opened.close()


def job_of(
    job_id: str,
    state: pb.JobState.ValueType = pb.JOB_STATE_QUEUED,
    created_us: int = 1,
    request_id: str = "",
    styles: Sequence[str] = (),
) -> pb.Job:
    job = new_job(job_id, request_id=request_id)
    job.state = state
    job.create_time.FromMicroseconds(created_us)
    for style in styles:
        job.clip.styles.add(name=style)
    return job


def ended_job(job_id: str, ended_us: int, artifact_bytes: int = 0) -> pb.Job:
    job = job_of(job_id, pb.JOB_STATE_SUCCEEDED)
    job.end_time.FromMicroseconds(ended_us)
    if artifact_bytes:
        job.result.artifacts.add(name="clip.mp4", size_bytes=artifact_bytes)
    return job


def insert(store: JobStore, job: pb.Job, request_hash: str = "hash", tenant: str = "") -> StoredJob | None:
    return store.insert(StoredJob(job, request_hash, 0, tenant), pb.JobEvent(sequence=1, job=job))


def ids(jobs: Sequence[pb.Job]) -> list[str]:
    return [job.job_id for job in jobs]


def all_pages(store: JobStore, size: int, wanted: JobFilter) -> list[list[str]]:
    pages = []
    before = None
    while page := store.page(size, before, wanted):
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


def test_transitions_survive_reopening(database: Path | str) -> None:
    first = JobStore(database)
    insert(first, job_of("a"))
    running = job_of("a", pb.JOB_STATE_CONDITIONING)
    first.record(pb.JobEvent(sequence=7, job=running), attempts=1)
    first.close()
    second = JobStore(database)
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


def test_a_request_id_is_unique_within_its_tenant_only(store: JobStore) -> None:
    assert insert(store, job_of("a", request_id="r"), tenant="one") is None
    assert insert(store, job_of("b", request_id="r"), tenant="two") is None
    existing = insert(store, job_of("c", request_id="r"), tenant="two")
    assert existing is not None
    assert (existing.job.job_id, existing.tenant) == ("b", "two")
    assert store.by_request_id("", "r") is None
    assert store.by_request_id("one", "r") == store.get("a") == StoredJob(job_of("a", request_id="r"), "hash", 0, "one")


def test_an_id_that_no_job_can_have_is_not_there(store: JobStore) -> None:
    assert store.get("\0") is None


def test_jobs_are_found_by_the_styles_that_they_name(store: JobStore) -> None:
    insert(store, job_of("a", styles=["noir", "amber"]))
    insert(store, job_of("b", styles=["noir", "noir"]))
    insert(store, job_of("c"))
    assert ids(store.page(9, None, JobFilter(style="noir"))) == ["b", "a"]
    assert ids(store.page(9, None, JobFilter(style="amber"))) == ["a"]
    assert ids(store.page(9, None, JobFilter(style="no'ir"))) == []


def test_numbers_beyond_32_bits_are_kept(store: JobStore) -> None:
    job = job_of("a", created_us=2**52)
    insert(store, job)
    store.record(pb.JobEvent(sequence=2**40, job=ended_job("a", 2**52, 2**41)), attempts=1)
    assert [event.sequence for event in store.events("a", 2**39)] == [2**40]
    assert store.artifact_bytes() == 2**41
    assert store.ended(2**53, 9) == [EndedJob("a", 2**52, 2**41)]


def test_ended_jobs_come_in_the_order_of_their_ends(store: JobStore) -> None:
    for name, ended_us, size in (("late", 30, 5), ("empty", 10, 0), ("early", 20, 7)):
        insert(store, ended_job(name, ended_us, size))
    insert(store, job_of("running", pb.JOB_STATE_DENOISING))
    assert [job.job_id for job in store.ended(31, 9)] == ["empty", "early", "late"]
    assert [job.job_id for job in store.ended(30, 1)] == ["empty"]
    assert store.ended(30, 9, with_artifacts=True) == [EndedJob("early", 20, 7)]
    assert store.artifact_bytes() == 12


def test_a_deleted_job_leaves_nothing_and_others_stay(store: JobStore) -> None:
    for name in ("a", "b"):
        job = ended_job(name, 1)
        job.clip.styles.add(name="noir")
        insert(store, job)
    store.delete("a")
    store.delete("a")
    assert (store.get("a"), store.events("a")) == (None, [])
    assert ids(store.page(9, None, JobFilter(style="noir"))) == ["b"]
    assert insert(store, job_of("a")) is None


def test_an_unfinished_job_cannot_be_deleted(store: JobStore) -> None:
    insert(store, job_of("a", pb.JOB_STATE_ENCODING))
    with pytest.raises(ValueError, match="job a has not ended"):
        store.delete("a")
    assert store.states(["a", *(f"job-{number}" for number in range(1200))]) == {"a": pb.JOB_STATE_ENCODING}


@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    jobs=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(STATES), st.sets(st.sampled_from("xyz"))), max_size=9),
    size=st.integers(1, 5),
    states=st.lists(st.sampled_from(STATES), unique=True, max_size=3),
    style=st.sampled_from(["", "x"]),
    span=st.tuples(st.integers(0, 3) | st.none(), st.integers(1, 4) | st.none()),
)
def test_pages_hold_every_wanted_job_once_newest_first(
    store: JobStore,
    jobs: list[tuple[int, pb.JobState.ValueType, set[str]]],
    size: int,
    states: list[int],
    style: str,
    span: tuple[int | None, int | None],
) -> None:
    for known in store.states([f"job-{number}" for number in range(9)]):
        store.record(pb.JobEvent(sequence=2, job=ended_job(known, 1)), attempts=0)
        store.delete(known)
    for number, (created_us, state, styles) in enumerate(jobs):
        insert(store, job_of(f"job-{number}", state, created_us, styles=sorted(styles)))
    low, high = span
    wanted = [
        (created_us, f"job-{number}")
        for number, (created_us, state, styles) in enumerate(jobs)
        if (state in states or not states)
        and (not style or style in styles)
        and (low is None or created_us >= low)
        and (high is None or created_us < high)
    ]
    pages = all_pages(store, size, JobFilter(states, low, high, style))
    assert [job_id for page in pages for job_id in page] == [job_id for _, job_id in sorted(wanted, reverse=True)]
    assert all(len(page) == size for page in pages[:-1])


@st.composite
def legal_histories(draw: st.DrawFn) -> list[pb.JobState.ValueType]:
    states = [pb.JOB_STATE_QUEUED]
    while (following := sorted(TRANSITIONS[states[-1]])) and len(states) < 12 and draw(st.integers(0, 6)):
        states.append(draw(st.sampled_from(following)))
    return states


@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
@given(histories=st.lists(legal_histories(), min_size=1, max_size=5), size=st.integers(1, 4), random=st.randoms())
def test_legal_histories_read_back_in_order(
    store: JobStore, histories: list[list[pb.JobState.ValueType]], size: int, random: Random
) -> None:
    prefix = uuid.uuid4().hex
    names = [f"{prefix}-{number}" for number in range(len(histories))]
    told: dict[str, list[pb.JobEvent]] = {name: [] for name in names}
    turns = [name for name, states in zip(names, histories, strict=True) for _ in states]
    random.shuffle(turns)
    now_us = time.time_ns() // 1000
    for name in turns:
        states = histories[names.index(name)]
        job = job_of(name, states[len(told[name])], now_us + names.index(name))
        if job.state in FINAL_STATES:
            job.end_time.FromMicroseconds(now_us)
        event = pb.JobEvent(sequence=3 * len(told[name]) + 1, job=job)
        if told[name]:
            store.record(event, attempts=len(told[name]))
        else:
            store.insert(StoredJob(job, "hash", 0), event)
        told[name].append(event)
    for name in names:
        assert store.events(name) == told[name]
        assert store.events(name, told[name][0].sequence) == told[name][1:]
        assert store.get(name) == StoredJob(told[name][-1].job, "hash", len(told[name]) - 1)
    pages = all_pages(store, size, JobFilter(from_us=now_us))
    assert [name for page in pages for name in page] == names[::-1]
    running = {name for name in names if told[name][-1].job.state not in FINAL_STATES}
    assert {stored.job.job_id for stored in store.unfinished()} & set(names) == running
    ended = {job.job_id for job in store.ended(2**62, 10_000)}
    assert ended & set(names) == set(names) - running


def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    command = [sys.executable, "-c", "import sys; from tests.server.test_store import write_on; write_on(sys.argv[1])"]
    with subprocess.Popen([*command, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline().split() for _ in range(60)]
        writer.kill()
        acknowledged += [parts for line in writer.stdout if len(parts := line.split()) == 2 and line[-1] == "\n"]
    store = JobStore(path)
    for job_id, sequence in acknowledged:
        assert int(sequence) in {event.sequence for event in store.events(job_id)}
    store.close()


def write_on(path: str) -> None:
    """Stores transitions for ever, and says which are stored."""
    store = JobStore(Path(path))
    while True:
        name = uuid.uuid4().hex
        insert(store, job_of(name))
        print(name, 1, flush=True)
        for sequence in range(2, 9):
            store.record(pb.JobEvent(sequence=sequence, job=job_of(name, pb.JOB_STATE_DENOISING)), attempts=1)
            print(name, sequence, flush=True)


def test_a_second_server_is_refused_on_postgresql_until_the_first_is_gone(
    postgresql: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cinecat.server.database._LOCK_TIMEOUT_S", 1)
    url = postgresql.new_database()
    first = JobStore(url)
    with pytest.raises(DatabaseInUse, match="database_url: another server uses this database; give each its own"):
        JobStore(url)
    insert(first, job_of("a"))
    first.close()
    second = JobStore(url)
    assert second.get("a") is not None
    second.close()


def test_a_lost_connection_is_replaced_and_the_lock_taken_anew(
    postgresql: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cinecat.server.database._LOCK_TIMEOUT_S", 1)
    url = postgresql.new_database()
    store = JobStore(url)
    insert(store, job_of("a"))
    postgresql.execute(END_SESSIONS)
    insert(store, job_of("b"))
    assert ids(store.page(9, None, JobFilter())) == ["b", "a"]
    with pytest.raises(DatabaseInUse):
        JobStore(url)
    store.close()


def test_a_server_that_lost_the_database_to_another_writes_no_more(
    postgresql: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cinecat.server.database._LOCK_TIMEOUT_S", 1)
    url = postgresql.new_database()
    first = JobStore(url)
    insert(first, job_of("a"))
    postgresql.execute(END_SESSIONS)
    second = JobStore(url)
    with pytest.raises(DatabaseInUse, match="another server uses this database"):
        first.record(pb.JobEvent(sequence=2, job=job_of("a", pb.JOB_STATE_FAILED)), attempts=1)
    second.close()
    with pytest.raises(DatabaseInUse, match="another server has used this database since"):
        first.record(pb.JobEvent(sequence=2, job=job_of("a", pb.JOB_STATE_FAILED)), attempts=1)
    first.close()
    third = JobStore(url)
    assert [event.sequence for event in third.events("a")] == [1]
    third.close()


@pytest.mark.parametrize("url", ["postgresql+psycopg://u:secret-word@127.0.0.1:1/jobs", "no such folder"])
def test_a_database_that_cannot_be_opened_is_named_by_its_setting_without_passwords(tmp_path: Path, url: str) -> None:
    (tmp_path / "file").touch()
    setting, place = ("database_url", url) if "://" in url else ("data_dir", tmp_path / "file" / "jobs.sqlite")
    with pytest.raises(DatabaseError, match=f"^{setting}: the job database cannot be opened: ") as refused:
        JobStore(place)
    assert "secret-word" not in "".join(traceback.format_exception(refused.value))


def test_without_psycopg_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(DatabaseError, match=r"database_url: .* pip install 'cinecat\[postgres\]'"):
        JobStore("postgresql+psycopg://u@h/d")


def test_a_thread_reads_whole_jobs_without_a_pause_while_another_writes(store: JobStore) -> None:
    done = threading.Event()

    def read() -> None:
        seen = 0
        while not done.is_set():
            jobs = store.page(1000, None, JobFilter())
            assert len(jobs) >= seen
            assert all(store.events(job.job_id) for job in jobs)
            seen = len(jobs)

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        try:
            for number in range(40):
                insert(store, job_of(f"job-{number}", created_us=number))
        finally:
            done.set()
        reader.result(30)


def test_another_process_reads_while_one_writes(sqlite_store: JobStore, tmp_path: Path) -> None:
    insert(sqlite_store, job_of("a"))
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
        return [job.job_id for job in reader.page(10, None, JobFilter())]
    finally:
        reader.close()
