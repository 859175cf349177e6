"""A throw-away PostgreSQL server on a Unix socket, for the tests of the job database."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

_SETTINGS = ("fsync=off", "full_page_writes=off", "listen_addresses=", "max_connections=20")


@dataclass(frozen=True)
class Cluster:
    folder: Path
    _names: Iterator[int] = field(default_factory=itertools.count)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://cinecat:secret-word@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """The URL of an empty one."""
        name = f"jobs_{next(self._names)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, statement: str) -> None:
        """As a session of its own, outside a transaction."""
        with psycopg.connect(f"host={self.folder} user=cinecat dbname=postgres", autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Skips the test where PostgreSQL's server is not installed."""
    programs = _programs()
    user = _user()
    # Not pytest's folder, which only its owner may enter, and a path short enough for a socket.
    folder = Path(tempfile.mkdtemp(prefix="cinecat-pg-"))
    try:
        if user:
            shutil.chown(folder, user)
        data = folder / "data"
        rights: dict[str, Any] = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
        initdb = ("initdb", "--pgdata", data, "--username", "cinecat", "--auth", "trust", "--locale", "C", "--no-sync")
        subprocess.run([programs / initdb[0], *initdb[1:]], check=True, capture_output=True, cwd=folder, **rights)
        options = [part for setting in _SETTINGS for part in ("-c", setting)]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, "-k", folder, *options], stderr=log, cwd=folder, **rights
            )
        try:
            found = Cluster(folder)
            for _ in range(200):
                with suppress(psycopg.OperationalError):
                    found.execute("SELECT 1")
                    break
                with suppress(subprocess.TimeoutExpired):
                    server.wait(0.1)
                    raise AssertionError((folder / "log").read_text())
            yield found
        finally:
            server.send_signal(signal.SIGQUIT)  # at once; nothing there is kept
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    """Debian keeps them out of the search path."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders or not (folders[-1] / "initdb").exists():
        pytest.skip("PostgreSQL's server (initdb, postgres) is not installed")
    return folders[-1]


def _user() -> str:
    """Whom the server runs as; it refuses root. Empty for whoever runs the tests."""
    if os.getuid() != 0:
        return ""
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            pwd.getpwnam(name)
            return name
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
