"""Brings a job database to the schema of this server, with Alembic; the revisions are in `versions`."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

# The schema of servers that had no migrations yet: SQLite's user_version 1.
_EARLIEST = "0001"
_EARLIEST_USER_VERSION = 1


class NewerDatabase(OSError):
    """The database was written by a newer server."""


def is_current(connection: Connection) -> bool:
    """Whether the database already has this server's schema. Raises NewerDatabase."""
    script = ScriptDirectory.from_config(_config())
    found = MigrationContext.configure(connection).get_current_revision()
    if found is None:
        _check_user_version(connection)
        return False
    if found not in {revision.revision for revision in script.walk_revisions()}:
        raise _newer(f"revision {found}", f"{script.get_current_head()}")
    return found == script.get_current_head()


def migrate(connection: Connection) -> None:
    """Runs the revisions that the database lacks, in the transaction that the caller has begun.

    A database of a server without migrations is taken over as it is. Raises NewerDatabase, SQLAlchemyError.
    """
    if is_current(connection):  # another server may have been faster
        return
    config = _config()
    config.attributes["connection"] = connection
    tables = inspect(connection).get_table_names()
    if "jobs" in tables and "alembic_version" not in tables:
        command.stamp(config, _EARLIEST)
    command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    # ConfigParser reads % as the beginning of a name.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _check_user_version(connection: Connection) -> None:
    if connection.dialect.name != "sqlite":
        return
    found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if found > _EARLIEST_USER_VERSION:
        raise _newer(f"schema version {found}", _EARLIEST)


def _newer(found: str, known: str) -> NewerDatabase:
    return NewerDatabase(
        f"the job database was written by a newer server ({found}, this one knows up to {known}); run that one, or "
        "give this one a database of its own"
    )
