"""Databases of every age come to the schema of this server, whole or not at all; newer ones are refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from cinecat.server.database import DatabaseError
from cinecat.server.store import EndedJob, JobFilter, JobStore, StoredJob
from cinecat.server.tables import Base
from cinecat.v1 import job_pb2 as pb
from tests.server.postgresql import Cluster
from tests.server.samples import new_job

# As the servers wrote it that had no migrations.
EARLIEST = """
CREATE TABLE jobs (
	job_id VARCHAR NOT NULL,
	state INTEGER NOT NULL,
	created_us INTEGER NOT NULL,
	request_id VARCHAR,
	request_hash VARCHAR NOT NULL,
	attempts INTEGER NOT NULL,
	document BLOB NOT NULL,
	PRIMARY KEY (job_id),
	UNIQUE (request_id)
);
CREATE INDEX jobs_newest_first ON jobs (created_us, job_id);
CREATE INDEX jobs_by_state ON jobs (state);
CREATE TABLE events (
	job_id VARCHAR NOT NULL,
	sequence INTEGER NOT NULL,
	document BLOB NOT NULL,
	PRIMARY KEY (job_id, sequence),
	FOREIGN KEY(job_id) REFERENCES jobs (job_id)
);
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
"""


def ended(job_id: str) -> pb.Job:
    job = new_job(job_id, request_id=f"key-{job_id}")
    job.state = pb.JOB_STATE_SUCCEEDED
    job.create_time.FromMicroseconds(5)
    job.end_time.FromMicroseconds(9)
    job.result.artifacts.add(name="clip.mp4", size_bytes=2**33)
    job.clip.styles.add(name="noir")
    return job


def queued(job_id: str) -> pb.Job:
    job = new_job(job_id)
    job.state = pb.JOB_STATE_QUEUED
    job.create_time.FromMicroseconds(7)
    return job


def earliest(path: Path, *jobs: pb.Job) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(EARLIEST)
    for job in jobs:
        row = (job.job_id, job.state, job.create_time.ToMicroseconds(), job.request_id or None, "hash", 2)
        connection.execute("insert into jobs values (?, ?, ?, ?, ?, ?, ?)", (*row, job.SerializeToString()))
        for sequence in (1, 2):
            event = pb.JobEvent(sequence=sequence, job=job)
            connection.execute("insert into events values (?, ?, ?)", (job.job_id, sequence, event.SerializeToString()))
    connection.commit()
    connection.close()


def schema(path: Path) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    rows = connection.execute("select type, name, sql from sqlite_master order by 1, 2").fetchall()
    version = connection.execute("pragma user_version").fetchall()
    connection.close()
    return [*rows, *version]


def test_the_earliest_database_is_taken_over_with_all_that_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    earliest(path, ended("a"), queued("b"))
    for _ in range(2):  # by the next start too
        store = JobStore(path)
        assert store.get("a") == store.by_request_id("", "key-a") == StoredJob(ended("a"), "hash", 2)
        assert store.unfinished() == [StoredJob(queued("b"), "hash", 2)]
        assert [event.sequence for event in store.events("a")] == [1, 2]
        assert store.page(9, None, JobFilter(style="noir")) == [ended("a")]
        assert store.ended(10, 9) == [EndedJob("a", 9, 2**33)]
        store.close()


def test_taken_over_and_new_databases_are_alike(tmp_path: Path) -> None:
    earliest(tmp_path / "old.sqlite")
    for name in ("old", "new"):
        JobStore(tmp_path / f"{name}.sqlite").close()
    assert schema(tmp_path / "old.sqlite") == schema(tmp_path / "new.sqlite")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_migrations_lead_to_the_tables(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place: Path | str = tmp_path / "jobs.sqlite"
    if kind == "postgresql":
        running: Cluster = request.getfixturevalue("postgresql")
        place = running.new_database()
    store = JobStore(place)
    with store._engines[0].connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    store.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    earliest(path, ended("a"))
    connection = sqlite3.connect(path)
    connection.execute("update jobs set document = x'ff'")
    connection.commit()
    connection.close()
    before = schema(path)
    with pytest.raises(DatabaseError, match="data_dir"):
        JobStore(path)
    assert schema(path) == before


@pytest.mark.parametrize("mark", ["pragma user_version = 7", "update alembic_version set version_num = '9999'"])
def test_a_newer_database_is_refused_in_one_sentence(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "jobs.sqlite"
    if "user_version" in mark:
        earliest(path)
    else:
        JobStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute(mark)
    connection.commit()
    connection.close()
    before = schema(path)
    with pytest.raises(DatabaseError, match=r"was written by a newer server .*; run that one, or"):
        JobStore(path)
    assert schema(path) == before


def test_identities_differ_and_last(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b", "a"):
        store = JobStore(tmp_path / f"{name}.sqlite")
        found.append(store.identity)
        store.close()
    assert found[0] == found[2] != found[1]
