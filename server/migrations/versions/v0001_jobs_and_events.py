"""Jobs and their transitions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.String, primary_key=True),
        sa.Column("state", sa.Integer, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("request_id", sa.String),
        sa.Column("request_hash", sa.String, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("document", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("request_id", name="uq_jobs_request_id"),
    )
    op.create_index("jobs_newest_first", "jobs", ["created_us", "job_id"])
    op.create_index("jobs_by_state", "jobs", ["state"])
    op.create_table(
        "events",
        sa.Column("job_id", sa.String, sa.ForeignKey("jobs.job_id"), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("document", sa.LargeBinary, nullable=False),
    )
