"""The job database: one SQLAlchemy layer over SQLite in WAL mode or PostgreSQL, and one writer.

Every method blocks; the server calls them all from one thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, delete, func, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker

from cinecat.server.database import (
    SoleWriter,
    explained,
    postgresql_engines,
    sqlite_engine,
    sqlite_migration_engine,
)
from cinecat.server.lifecycle import FINAL_STATES
from cinecat.server.migrations import is_current, migrate
from cinecat.server.tables import EventRow, IdentityRow, JobRow, JobStyleRow
from cinecat.v1 import job_pb2

# Below what any database takes as parameters of one statement.
_IDS_AT_ONCE = 500


@dataclass(frozen=True)
class StoredJob:
    """A job with what only the server needs.

    Attributes:
        request_hash: of everything the caller asked for, to tell a retry from a second request with the same key.
        attempts: how often the engine core has started on it since it last got on.
        tenant: whose job it is; request ids of one tenant do not meet those of another.
    """

    job: job_pb2.Job
    request_hash: str
    attempts: int
    tenant: str = ""

    @property
    def ended_us(self) -> int | None:
        """When it ended, in microseconds since 1970; None before that."""
        return self.job.end_time.ToMicroseconds() if self.job.state in FINAL_STATES else None


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list; what is left out lets all of them through.

    Attributes:
        states: one of these.
        from_us, before_us: created in this half-open span, in microseconds since 1970.
        style: the clip wears a style of this name, at any strength.
        tenant: whose they are; None is everybody's, and an empty one is nobody's.
    """

    states: Sequence[int] = ()
    from_us: int | None = None
    before_us: int | None = None
    style: str = ""
    tenant: str | None = None


@dataclass(frozen=True)
class EndedJob:
    """What retention asks of a job that has ended. `artifact_bytes` counts all of its artifacts."""

    job_id: str
    ended_us: int
    artifact_bytes: int


class JobStore:
    """Jobs and their transitions in a database."""

    def __init__(self, database: Path | str) -> None:
        """Opens a database, or creates it, and brings its schema up to this server's; all of that or nothing.

        Args:
            database: a SQLite file, or a URL that `database.check_url` takes. A SQLite file is not locked against
                other servers; the lock of the server's data_dir does that.

        Raises:
            DatabaseError: that cannot be done.
        """
        setting = "data_dir" if isinstance(database, Path) else "database_url"
        try:
            opened = _open_sqlite(database) if isinstance(database, Path) else _open_postgresql(database)
        except Exception as error:
            raise explained(setting, error) from None
        self._engines = opened
        writing, reading = opened
        self._writing = sessionmaker(writing, expire_on_commit=False)
        self._reading = sessionmaker(reading, expire_on_commit=False)

    def close(self) -> None:
        for engine in self._engines:
            engine.dispose()

    @property
    def identity(self) -> str:
        """What tells this database from all others, drawn when it was made."""
        with self._reading() as session:
            return session.scalars(select(IdentityRow.identity)).one()

    def insert(self, stored: StoredJob, first: job_pb2.JobEvent) -> StoredJob | None:
        """Persists a new job and its first event.

        Returns:
            None, or the job of its tenant that already has this request id; nothing is written then.
        """
        job = stored.job
        row = JobRow(
            job_id=job.job_id,
            tenant=stored.tenant,
            state=job.state,
            created_us=job.create_time.ToMicroseconds(),
            ended_us=stored.ended_us,
            request_id=job.request_id or None,
            request_hash=stored.request_hash,
            attempts=stored.attempts,
            artifact_bytes=_artifact_bytes(job),
            document=job.SerializeToString(),
        )
        try:
            with self._writing.begin() as session:
                session.add(row)
                session.flush()
                session.add(_event_row(first))
                session.add_all(JobStyleRow(job_id=job.job_id, name=name) for name in _style_names(job))
        except IntegrityError:
            existing = self.by_request_id(stored.tenant, job.request_id)
            if existing is None:
                raise
            return existing
        return None

    def record(self, transition: job_pb2.JobEvent, attempts: int) -> None:
        """Persists a transition and the job as it is after it, together."""
        job = transition.job
        with self._writing.begin() as session:
            row = session.get_one(JobRow, job.job_id)
            row.state, row.attempts, row.document = job.state, attempts, job.SerializeToString()
            row.ended_us, row.artifact_bytes = StoredJob(job, "", 0).ended_us, _artifact_bytes(job)
            session.add(_event_row(transition))

    def set_attempts(self, job_id: str, attempts: int) -> None:
        """Persists how often the core has started on a job, between two of its transitions."""
        with self._writing.begin() as session:
            session.get_one(JobRow, job_id).attempts = attempts

    def get(self, job_id: str) -> StoredJob | None:
        if "\0" in job_id:  # which PostgreSQL cannot compare with
            return None
        with self._reading() as session:
            return _stored(session.get(JobRow, job_id))

    def by_request_id(self, tenant: str, request_id: str) -> StoredJob | None:
        query = select(JobRow).where(JobRow.tenant == tenant, JobRow.request_id == request_id)
        with self._reading() as session:
            return _stored(session.scalar(query))

    def events(self, job_id: str, after_sequence: int = 0) -> list[job_pb2.JobEvent]:
        """Transitions of a job in order."""
        query = (
            select(EventRow.document)
            .where(EventRow.job_id == job_id, EventRow.sequence > after_sequence)
            .order_by(EventRow.sequence)
        )
        with self._reading() as session:
            return [job_pb2.JobEvent.FromString(document) for document in session.scalars(query)]

    def page(self, size: int, before: tuple[int, str] | None, wanted: JobFilter) -> list[job_pb2.Job]:
        """Up to `size` jobs, newest first, older than the job at `before` (creation in microseconds, job id)."""
        query = select(JobRow.document).order_by(JobRow.created_us.desc(), JobRow.job_id.desc()).limit(size)
        if before is not None:
            query = query.where(tuple_(JobRow.created_us, JobRow.job_id) < before)
        if wanted.states:
            query = query.where(JobRow.state.in_(wanted.states))
        if wanted.from_us is not None:
            query = query.where(JobRow.created_us >= wanted.from_us)
        if wanted.before_us is not None:
            query = query.where(JobRow.created_us < wanted.before_us)
        if wanted.tenant is not None:
            query = query.where(JobRow.tenant == wanted.tenant)
        if wanted.style:
            worn = select(JobStyleRow.job_id).where(JobStyleRow.name == wanted.style)
            query = query.where(JobRow.job_id.in_(worn))
        with self._reading() as session:
            return [job_pb2.Job.FromString(document) for document in session.scalars(query)]

    def unfinished(self) -> list[StoredJob]:
        """Jobs in no final state, oldest first."""
        query = select(JobRow).where(JobRow.state.not_in(FINAL_STATES)).order_by(JobRow.created_us, JobRow.job_id)
        with self._reading() as session:
            return [_from_row(row) for row in session.scalars(query)]

    def ended(self, before_us: int, limit: int, *, with_artifacts: bool = False) -> list[EndedJob]:
        """Up to `limit` jobs that ended before a moment, those that ended first before the others.

        Args:
            before_us: microseconds since 1970.
            with_artifacts: only those whose artifacts take room.
        """
        query = select(JobRow.job_id, JobRow.ended_us, JobRow.artifact_bytes).where(JobRow.ended_us < before_us)
        if with_artifacts:
            query = query.where(JobRow.artifact_bytes > 0)
        with self._reading() as session:
            rows = session.execute(query.order_by(JobRow.ended_us, JobRow.job_id).limit(limit))
            return [EndedJob(job_id, ended_us or 0, size) for job_id, ended_us, size in rows]

    def artifact_bytes(self) -> int:
        """Of all jobs together."""
        with self._reading() as session:
            return int(session.scalar(select(func.sum(JobRow.artifact_bytes))) or 0)

    def states(self, job_ids: Sequence[str]) -> dict[str, int]:
        """The states of those jobs that there are."""
        found: dict[str, int] = {}
        with self._reading() as session:
            for start in range(0, len(job_ids), _IDS_AT_ONCE):
                some = job_ids[start : start + _IDS_AT_ONCE]
                rows = session.execute(select(JobRow.job_id, JobRow.state).where(JobRow.job_id.in_(some)))
                found.update((job_id, state) for job_id, state in rows)
        return found

    def delete(self, job_id: str) -> None:
        """Forgets a job that has ended, with its events. Raises ValueError for one that has not."""
        with self._writing.begin() as session:
            row = session.get(JobRow, job_id)
            if row is None:
                return
            if row.ended_us is None:
                raise ValueError(f"job {job_id} has not ended")
            session.execute(delete(EventRow).where(EventRow.job_id == job_id))
            session.execute(delete(JobStyleRow).where(JobStyleRow.job_id == job_id))
            session.delete(row)


def _open_sqlite(path: Path) -> tuple[Engine, Engine]:
    engine = sqlite_engine(path)
    try:
        with engine.connect() as connection:
            current = is_current(connection)
        if not current:
            migrations = sqlite_migration_engine(path)
            with migrations.begin() as connection:
                migrate(connection)
    except BaseException:
        engine.dispose()
        raise
    return engine, engine


def _open_postgresql(url: str) -> tuple[Engine, Engine]:
    writer = SoleWriter()
    engine, reading = postgresql_engines(url, writer)
    name = secrets.token_hex(8)
    try:
        with engine.begin() as connection:
            migrate(connection)
            connection.execute(update(IdentityRow).values(writer=name))
    except BaseException:
        engine.dispose()
        raise
    writer.name = name
    return engine, reading


def _artifact_bytes(job: job_pb2.Job) -> int:
    return sum(artifact.size_bytes for artifact in job.result.artifacts)


def _style_names(job: job_pb2.Job) -> list[str]:
    return sorted({style.name for style in job.clip.styles})


def _event_row(job_event: job_pb2.JobEvent) -> EventRow:
    return EventRow(job_id=job_event.job.job_id, sequence=job_event.sequence, document=job_event.SerializeToString())


def _stored(row: JobRow | None) -> StoredJob | None:
    return None if row is None else _from_row(row)


def _from_row(row: JobRow) -> StoredJob:
    return StoredJob(job_pb2.Job.FromString(row.document), row.request_hash, row.attempts, row.tenant)
