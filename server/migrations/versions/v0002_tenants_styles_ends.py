"""Request ids are unique within a tenant; jobs are found by style, by their end and by the size of their files."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

from cinecat.server.lifecycle import FINAL_STATES
from cinecat.v1 import job_pb2

revision = "0002"
down_revision = "0001"

# What an unnamed constraint is called, here only; the first servers named none.
_NAMES = {"uq": "uq_%(table_name)s_%(column_0_name)s"}


def upgrade() -> None:
    with op.batch_alter_table("jobs", naming_convention=_NAMES) as jobs:
        jobs.add_column(sa.Column("tenant", sa.String, nullable=False, server_default=""))
        jobs.add_column(sa.Column("ended_us", sa.BigInteger))
        jobs.add_column(sa.Column("artifact_bytes", sa.BigInteger, nullable=False, server_default="0"))
        # SQLite's first servers wrote INTEGER, which is as wide there and not elsewhere.
        jobs.alter_column("created_us", existing_type=sa.Integer, existing_nullable=False, type_=sa.BigInteger)
        jobs.drop_constraint("uq_jobs_request_id", type_="unique")
        jobs.create_unique_constraint("jobs_request_once_per_tenant", ["tenant", "request_id"])
        jobs.create_index("jobs_by_end", ["ended_us", "job_id"])
    with op.batch_alter_table("events") as events:
        events.alter_column("sequence", existing_type=sa.Integer, existing_nullable=False, type_=sa.BigInteger)
    styles = op.create_table(
        "job_styles",
        sa.Column("job_id", sa.String, sa.ForeignKey("jobs.job_id"), primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
    )
    op.create_index("job_styles_by_name", "job_styles", ["name", "job_id"])
    identity = op.create_table(
        "database_identity",
        sa.Column("identity", sa.String, primary_key=True),
        sa.Column("writer", sa.String),
    )
    op.bulk_insert(identity, [{"identity": uuid.uuid4().hex}])
    _fill(styles)
    if op.get_bind().dialect.name == "sqlite":
        # A server from before migrations looks at nothing else, and refuses what it does not know.
        op.execute("PRAGMA user_version = 2")


def _fill(styles: sa.Table) -> None:
    """Writes into the new columns and tables what the documents of the jobs say."""
    connection = op.get_bind()
    jobs = sa.table(
        "jobs",
        sa.column("job_id", sa.String),
        sa.column("ended_us", sa.BigInteger),
        sa.column("artifact_bytes", sa.BigInteger),
        sa.column("document", sa.LargeBinary),
    )
    for job_id in connection.scalars(sa.select(jobs.c.job_id)).all():
        this = jobs.c.job_id == job_id
        job = job_pb2.Job.FromString(connection.execute(sa.select(jobs.c.document).where(this)).scalar_one())
        if job.state in FINAL_STATES:
            values = {
                "ended_us": job.end_time.ToMicroseconds(),
                "artifact_bytes": sum(artifact.size_bytes for artifact in job.result.artifacts),
            }
            connection.execute(sa.update(jobs).where(this).values(values))
        for name in sorted({style.name for style in job.clip.styles}):
            connection.execute(sa.insert(styles).values(job_id=job_id, name=name))
