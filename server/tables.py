"""The tables of the job database. `migrations` leads there, revision by revision; a test compares the two."""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class JobRow(Base):
    """A job as of its last transition.

    Attributes:
        created_us, ended_us: microseconds since 1970; `ended_us` is None until the job has ended.
        request_id: None where the caller gave none.
        artifact_bytes: of all its artifacts.
        document: the serialised Job.
    """

    __tablename__ = "jobs"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(server_default="")
    state: Mapped[int]
    created_us: Mapped[int] = mapped_column(BigInteger)
    ended_us: Mapped[int | None] = mapped_column(BigInteger)
    request_id: Mapped[str | None]
    request_hash: Mapped[str]
    attempts: Mapped[int]
    artifact_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    document: Mapped[bytes]

    __table_args__ = (
        UniqueConstraint("tenant", "request_id", name="jobs_request_once_per_tenant"),
        Index("jobs_newest_first", "created_us", "job_id"),
        Index("jobs_by_state", "state"),
        Index("jobs_by_end", "ended_us", "job_id"),
    )


class EventRow(Base):
    """A transition. `document` is the serialised JobEvent."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    document: Mapped[bytes]


class JobStyleRow(Base):
    """A style that the clip of a job wears."""

    __tablename__ = "job_styles"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)

    __table_args__ = (Index("job_styles_by_name", "name", "job_id"),)


class IdentityRow(Base):
    """The one row that tells a database from others.

    Attributes:
        identity: drawn when the table was made.
        writer: the name of the last server that opened the database; on PostgreSQL only.
    """

    __tablename__ = "database_identity"

    identity: Mapped[str] = mapped_column(primary_key=True)
    writer: Mapped[str | None]
