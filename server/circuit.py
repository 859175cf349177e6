"""Requests that killed the engine core are not taken again for a while, whoever repeats them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import grpc

from cinecat.server.errors import RequestError

OPEN_SECONDS = 600.0
_MOST = 1000


class Circuit:
    """By the hash of what was asked for. A restart forgets it: a new version may well serve the request."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def open(self, request_hash: str, job_id: str) -> None:
        """Refuses a request from now on."""
        self._open[request_hash] = self._clock() + OPEN_SECONDS, job_id
        self._open.move_to_end(request_hash)
        while len(self._open) > _MOST:
            self._open.popitem(last=False)

    def check(self, request_hash: str) -> None:
        """Raises RequestError for a request that is refused."""
        until, job_id = self._open.get(request_hash, (0.0, ""))
        left = until - self._clock()
        if left > 0:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"clip: the same request killed the engine core again and again (job {job_id}); change it, or try "
                f"again in {left:.0f} s",
            )
        self._open.pop(request_hash, None)
