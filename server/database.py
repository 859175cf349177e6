"""Where jobs are kept: a SQLite file, or PostgreSQL by URL. One server at a time either way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

POSTGRESQL = "postgresql+psycopg"

# Of the session-level advisory lock; PostgreSQL keeps those of each database apart.
_LOCK_KEY = int.from_bytes(b"cinecat\0")

# The session of a server that was killed a moment ago may still be ending.
_LOCK_TIMEOUT_S = 3

# So that PostgreSQL lets go within a minute of the lock of a server whose machine or network is gone.
_SESSION = "SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3"

# Callers of ListJobs and GetJob whose queries run at once; the others wait their turn.
_READERS = 4

_SCHEME = re.compile(r"[A-Za-z0-9+.-]{1,40}")


class DatabaseError(OSError):
    """The job database cannot be used; the message says why, and never holds a password."""


class DatabaseInUse(DatabaseError):
    """Another server uses the database, or has used it since this one opened it."""


def check_url(url: str) -> URL:
    """The parts of a PostgreSQL URL. Raises ValueError for any other, and shows nothing of it but the scheme."""
    allowed = f"allowed: empty, for a SQLite file in data_dir, or {POSTGRESQL}://USER@HOST/DATABASE"
    scheme, separator, _ = url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        raise ValueError(f"is not a URL; {allowed}")
    if scheme != POSTGRESQL:
        raise ValueError(f"has the scheme {scheme}; {allowed}")
    try:
        return make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(f"cannot be read as a URL; {allowed}") from None


def masked(url: str) -> str:
    """A URL that `check_url` takes, with *** for its passwords."""
    parts = make_url(url)
    query = {key: "***" if "password" in key.lower() else value for key, value in parts.query.items()}
    return parts.set(query=query).render_as_string(hide_password=True)


def reason(error: Exception) -> str:
    """Why the database could not be used, without the statement, whose parameters hold prompts."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return f"{cause}".strip() or type(cause).__name__


class SoleWriter:
    """Lets a PostgreSQL session be used only while it is the one that may write.

    The engine that writes has a single connection, which takes the lock as it opens and holds it until it closes. So
    nothing is ever written in a session without it, and a connection that replaces a lost one has to win it anew.

    Attributes:
        name: what the database calls its writer once it is open. A session that finds another name there comes too
            late: a second server has worked on the jobs meanwhile, and what this one remembers of them is not true.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def check(self, connection: Any, _record: object) -> None:
        """Raises DatabaseInUse, and closes the new DBAPI connection then."""
        from psycopg.errors import LockNotAvailable

        try:
            with connection.cursor() as cursor:
                cursor.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_S}s'")
                cursor.execute(f"SELECT pg_advisory_lock({_LOCK_KEY})")
                cursor.execute(_SESSION)
                if self.name is not None and self._found(cursor) != self.name:
                    raise DatabaseInUse(
                        "database_url: another server has used this database since the connection was lost; "
                        "stop this server"
                    )
            connection.commit()
        except LockNotAvailable:
            connection.close()
            raise DatabaseInUse("database_url: another server uses this database; give each its own") from None
        except BaseException:
            connection.close()
            raise

    @staticmethod
    def _found(cursor: Any) -> object:
        cursor.execute("SELECT writer FROM database_identity")
        row = cursor.fetchone()
        return row and row[0]


def sqlite_engine(path: Path) -> Engine:
    """Creates the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(URL.create("sqlite", database=str(path)), hide_parameters=True)
    event.listen(engine, "connect", _configure)
    return engine


def sqlite_migration_engine(path: Path) -> Engine:
    """An engine whose transactions hold the write lock from their beginning and take back DDL too.

    It leaves foreign keys unchecked, as SQLite asks of whoever makes a table anew.
    """
    engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool, hide_parameters=True)
    event.listen(engine, "connect", _leave_transactions_alone)
    event.listen(engine, "begin", _begin_immediate)
    return engine


def postgresql_engines(url: str, writer: SoleWriter) -> tuple[Engine, Engine]:
    """An engine whose one session writes, and one that reads and never keeps the writer waiting.

    A pool hands a free connection to whoever asks first, not to whoever waits longest: one session for both would let
    a caller who lists jobs in a loop hold up every other's. Connects to nothing yet.

    Raises:
        DatabaseError: psycopg is missing.
    """
    try:
        writing = _postgresql_engine(url, pool_size=1)
        reading = _postgresql_engine(url, pool_size=_READERS)
    except ImportError as error:
        raise DatabaseError(
            f"database_url: {POSTGRESQL} needs psycopg ({error}); install the extra: pip install 'cinecat[postgres]'"
        ) from error
    event.listen(writing, "connect", writer.check)
    return writing, reading.execution_options(postgresql_readonly=True)


def _postgresql_engine(url: str, pool_size: int) -> Engine:
    # A session that was lost is noticed before its next use; what was under way in it has raised.
    return create_engine(
        check_url(url),
        pool_size=pool_size,
        max_overflow=0,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={
            "connect_timeout": 10,
            "application_name": "cinecat",
            "client_encoding": "utf8",
            # A server that vanished without a word is noticed within half a minute.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 25_000,
        },
    )


def explained(setting: str, error: Exception) -> DatabaseError:
    """An error while the database is opened, in terms of the setting that names it."""
    if isinstance(error, DatabaseError):
        return error
    return DatabaseError(f"{setting}: the job database cannot be opened: {reason(error)}")


def _configure(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # An accepted job is on the disk, not in a cache, before its caller hears of it.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _leave_transactions_alone(connection: Any, _record: object) -> None:
    # Python's sqlite3 begins no transaction for DDL by itself.
    connection.isolation_level = None


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
