"""The page's HTTP server has its port or says why not, and stops although somebody reads on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from cinecat.server.page.app import Page
from cinecat.server.page.keys import Keys
from cinecat.server.page.serving import listening
from cinecat.server.settings import SettingsError


@pytest.fixture
def page() -> Page:
    return Page(CollectorRegistry(), Keys({}), "127.0.0.1")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


async def endless(request: Request) -> Response:
    async def zeros() -> AsyncIterator[bytes]:
        while True:
            yield bytes(65536)

    return StreamingResponse(zeros())


def test_a_port_that_is_taken_is_refused_by_the_name_of_its_setting(page: Page, taken: int) -> None:
    async def scenario() -> None:
        async with listening(page, "127.0.0.1", taken):
            pass

    with pytest.raises(SettingsError, match=f"metrics_port: 127.0.0.1:{taken} cannot be listened on: Address already"):
        asyncio.run(scenario())


def test_whoever_asks_at_the_very_start_is_answered_that_the_model_is_being_loaded(page: Page) -> None:
    async def scenario() -> bytes:
        async with listening(page, "127.0.0.1", 0) as port:
            with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as early:
                early.sendall(b"GET /api/status HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                return await asyncio.to_thread(lambda: early.makefile("rb").read())

    assert b'{"ready":false,' in asyncio.run(scenario())


def test_a_download_that_nobody_reads_does_not_hold_up_the_end(page: Page, caplog: pytest.LogCaptureFixture) -> None:
    page.app = Starlette(routes=[Route("/", endless)])

    async def scenario() -> float:
        async with listening(page, "127.0.0.1", 0) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            stopping = time.perf_counter()
        writer.close()
        return time.perf_counter() - stopping

    with caplog.at_level(logging.ERROR):
        assert asyncio.run(scenario()) < 10
    assert [record for record in caplog.records if record.exc_info] == []
