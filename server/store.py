"""The job database: one SQLAlchemy layer over SQLite in WAL mode, and one writer.

Every method blocks; the server calls them all from one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, ForeignKey, Index, create_engine, event, select, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from cinecat.server.lifecycle import FINAL_STATES
from cinecat.v1 import job_pb2

_SCHEMA_VERSION = 1


class _Base(DeclarativeBase):
    pass


class _JobRow(_Base):
    """A job as of its last transition. `document` is the serialised Job."""

    __tablename__ = "jobs"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[int]
    created_us: Mapped[int]
    request_id: Mapped[str | None] = mapped_column(unique=True)
    request_hash: Mapped[str]
    attempts: Mapped[int]
    document: Mapped[bytes]

    __table_args__ = (Index("jobs_newest_first", "created_us", "job_id"), Index("jobs_by_state", "state"))


class _EventRow(_Base):
    """A transition. `document` is the serialised JobEvent."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    document: Mapped[bytes]


@dataclass(frozen=True)
class StoredJob:
    """A job with what only the server needs.

    Attributes:
        request_hash: of everything the caller asked for, to tell a retry from a second request with the same key.
        attempts: how often the engine core has started on it.
    """

    job: job_pb2.Job
    request_hash: str
    attempts: int
    tenant: str = ""


class JobStore:
    """Jobs and their transitions on disk."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the database file. Raises OSError or SQLAlchemyError when that cannot be done."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine = create_engine(URL.create("sqlite", database=str(path)))
        event.listen(self._engine, "connect", _configure)
        with self._engine.begin() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found not in (0, _SCHEMA_VERSION):
                raise OSError(f"{path} has schema version {found}, this server reads {_SCHEMA_VERSION}")
            _Base.metadata.create_all(connection)
            if not found:
                connection.exec_driver_sql(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        self._session = sessionmaker(self._engine, expire_on_commit=False)

    def close(self) -> None:
        self._engine.dispose()

    def insert(self, stored: StoredJob, first: job_pb2.JobEvent) -> StoredJob | None:
        """Persists a new job and its first event.

        Returns:
            None, or the job that already has this request id; nothing is written then.
        """
        job = stored.job
        row = _JobRow(
            job_id=job.job_id,
            state=job.state,
            created_us=job.create_time.ToMicroseconds(),
            request_id=job.request_id or None,
            request_hash=stored.request_hash,
            attempts=stored.attempts,
            document=job.SerializeToString(),
        )
        try:
            with self._session.begin() as session:
                session.add(row)
                session.flush()
                session.add(_event_row(first))
        except IntegrityError:
            existing = self.by_request_id(stored.tenant, job.request_id)
            if existing is None:
                raise
            return existing
        return None

    def record(self, transition: job_pb2.JobEvent, attempts: int) -> None:
        """Persists a transition and the job as it is after it, together."""
        job = transition.job
        with self._session.begin() as session:
            row = session.get_one(_JobRow, job.job_id)
            row.state, row.attempts, row.document = job.state, attempts, job.SerializeToString()
            session.add(_event_row(transition))

    def get(self, job_id: str) -> StoredJob | None:
        with self._session() as session:
            return _stored(session.get(_JobRow, job_id))

    def set_attempts(self, job_id: str, attempts: int) -> None:
        """Persists how often the core has started on a job, between two of its transitions."""
        with self._session.begin() as session:
            session.get_one(_JobRow, job_id).attempts = attempts

    def by_request_id(self, tenant: str, request_id: str) -> StoredJob | None:
        with self._session() as session:
            return _stored(session.scalar(select(_JobRow).where(_JobRow.request_id == request_id)))

    def events(self, job_id: str, after_sequence: int = 0) -> list[job_pb2.JobEvent]:
        """Transitions of a job in order."""
        query = (
            select(_EventRow.document)
            .where(_EventRow.job_id == job_id, _EventRow.sequence > after_sequence)
            .order_by(_EventRow.sequence)
        )
        with self._session() as session:
            return [job_pb2.JobEvent.FromString(document) for document in session.scalars(query)]

    def page(self, size: int, before: tuple[int, str] | None, states: Sequence[int]) -> list[job_pb2.Job]:
        """Up to `size` jobs, newest first, older than the job at `before` (creation in microseconds, job id)."""
        query = select(_JobRow.document).order_by(_JobRow.created_us.desc(), _JobRow.job_id.desc()).limit(size)
        if before is not None:
            query = query.where(tuple_(_JobRow.created_us, _JobRow.job_id) < before)
        if states:
            query = query.where(_JobRow.state.in_(states))
        with self._session() as session:
            return [job_pb2.Job.FromString(document) for document in session.scalars(query)]

    def unfinished(self) -> list[StoredJob]:
        """Jobs in no final state, oldest first."""
        query = select(_JobRow).where(_JobRow.state.not_in(FINAL_STATES)).order_by(_JobRow.created_us, _JobRow.job_id)
        with self._session() as session:
            return [_from_row(row) for row in session.scalars(query)]


def _configure(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # An accepted job is on the disk, not in a cache, before its caller hears of it.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _event_row(job_event: job_pb2.JobEvent) -> _EventRow:
    return _EventRow(job_id=job_event.job.job_id, sequence=job_event.sequence, document=job_event.SerializeToString())


def _stored(row: _JobRow | None) -> StoredJob | None:
    return None if row is None else _from_row(row)


def _from_row(row: _JobRow) -> StoredJob:
    return StoredJob(job_pb2.Job.FromString(row.document), row.request_hash, row.attempts)
