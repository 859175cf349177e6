"""Waiting for what fails for a while: a database that is away, an engine core that does not start."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable

import structlog
from sqlalchemy.exc import SQLAlchemyError

_PAUSES_S = (0.0, 1.0, 5.0, 15.0, 60.0)

log = structlog.get_logger(__name__)


class NotStored(Exception):
    """A transition could not be stored before the server stopped; the next start finds the job as it was."""


class Patience:
    """Tries again and again, until the server drains.

    Attributes:
        drain: set once the server is about to stop.
    """

    def __init__(self) -> None:
        self.drain = asyncio.Event()

    async def until_stored(self, job_id: str, transition: Callable[[], Awaitable[None]]) -> None:
        """Stores a transition, so that no job hangs or fails because of a full disk or a database that fails over.

        Raises:
            NotStored: the drain came first.
            ValueError: there is no such transition; another one came first.
        """
        for attempt in itertools.count():
            try:
                await transition()
            except (OSError, SQLAlchemyError) as error:
                log.error("a transition could not be stored", job_id=job_id, attempt=attempt, exc_info=error)
            else:
                return
            if await self.drained_while_waiting(attempt + 1):
                raise NotStored

    async def drained_while_waiting(self, attempt: int) -> bool:
        """Waits before a further attempt, the longer the more there were; whether the drain came meanwhile."""
        seconds = _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.drain.wait(), seconds)
        return self.drain.is_set()
