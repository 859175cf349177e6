"""Options that several commands share, and the connection they open."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from cinecat.client import Client
from cinecat.errors import ServerUnavailable
from cinecat.retry import DEFAULT_ADDRESS

Server = Annotated[
    str, typer.Option("--server", envvar="CINECAT_SERVER", metavar="HOST:PORT", help="The server to talk to.")
]
Tenant = Annotated[
    str,
    typer.Option(
        "--tenant", envvar="CINECAT_TENANT", metavar="NAME", help="On whose behalf; tenants get equal shares."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]

__all__ = ["DEFAULT_ADDRESS", "JobId", "Json", "Server", "Tenant", "connect"]


@contextmanager
def connect(server: str, tenant: str = "") -> Iterator[Client]:
    """A client for `server`. Raises ServerUnavailable with what to do when there is no server."""
    with Client(server, tenant=tenant or None) as client:
        try:
            yield client
        except ServerUnavailable as error:
            if error.job_id:
                lost = f"lost the server at {server} during job {error.job_id}: {error.message}"
                raise ServerUnavailable(lost, job_id=error.job_id) from error
            if error.connected:
                raise
            raise ServerUnavailable(f"no server at {server}; start one with: cinecat serve") from error
