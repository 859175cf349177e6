"""The page's HTTP server, inside the front's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn

from cinecat.server.page.app import Page
from cinecat.server.settings import SettingsError

_OPEN_STREAMS_S = 1


class _Server(uvicorn.Server):
    """Leaves signals to the front."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _is_no_cut_off(record: logging.LogRecord) -> bool:
    """That a download was cut off because the server stops is no fault to be shown with its traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


@contextlib.asynccontextmanager
async def listening(page: Page, host: str, port: int) -> AsyncIterator[int]:
    """Serves until the end of the block, and yields the port.

    Raises:
        SettingsError: host and port cannot be listened on.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen()  # else two servers that start together could both have the port
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise SettingsError(f"metrics_port: {host}:{port} cannot be listened on: {error.strerror}") from error
    logging.getLogger("uvicorn.error").addFilter(_is_no_cut_off)
    config = uvicorn.Config(
        page.app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_OPEN_STREAMS_S,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait([serving])
        listener.close()
