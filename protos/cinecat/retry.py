"""When and how fast to try again, and the options of a channel that does so for unary calls."""

import json
import random
import time

import grpc

from cinecat.errors import CinecatError, from_rpc
from cinecat.request import MAX_MESSAGE_BYTES

DEFAULT_ADDRESS = "localhost:50051"
_FIRST_DELAY_S = 0.2
_MAX_DELAY_S = 5.0
_CONNECT_ATTEMPTS = 4

# What may be repeated: the reads change nothing, CancelJob and WarmStyle end in the same state, and Submit carries a
# request id. Streams resume from where they broke off, which gRPC cannot know; they are left to `Backoff`. An upload
# would have to be held in memory.
_REPEATABLE = {
    "Generation": ("Submit", "GetJob", "ListJobs", "CancelJob"),
    "Styles": ("ListStyles", "GetStyle", "WarmStyle"),
    "Models": ("ListModels",),
}
_UNARY_METHODS = [
    {"service": f"cinecat.v1.{service}", "method": method}
    for service, methods in _REPEATABLE.items()
    for method in methods
]

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Without room for the whole message a Submit with an image would never be repeated.
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
    # A dead connection is noticed even while a step of minutes sends nothing.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that restarts is found again within seconds, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    {
                        "name": _UNARY_METHODS,
                        "retryPolicy": {
                            "maxAttempts": _CONNECT_ATTEMPTS,
                            "initialBackoff": f"{_FIRST_DELAY_S}s",
                            "maxBackoff": f"{_MAX_DELAY_S}s",
                            "backoffMultiplier": 2,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    }
                ]
            }
        ),
    ),
]


class Backoff:
    """Delays between attempts to go on with a broken stream: exponential, jittered, reset by progress.

    Before anything was received it gives up after a few attempts; from then on, `patience_s` seconds after the last
    progress.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._attempts = 0
        self._last_progress: float | None = None

    def progressed(self) -> None:
        self._attempts = 0
        self._last_progress = time.monotonic()

    def delay_after(self, error: grpc.RpcError, *, job_id: str = "") -> float:
        """Seconds to wait before the next attempt. Raises the translated `error` when there should be none."""
        problem = from_rpc(error, job_id=job_id)
        if problem.code is not grpc.StatusCode.UNAVAILABLE:
            raise problem from error
        return self._next_delay(problem)

    def delay_after_end(self, problem: CinecatError) -> float:
        """As `delay_after`, for a stream that ended in good order but too early."""
        return self._next_delay(problem)

    def _next_delay(self, problem: CinecatError) -> float:
        self._attempts += 1
        delay = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(self._attempts - 1, 8)) * random.uniform(0.5, 1.0)
        if self._last_progress is None:
            if self._attempts >= _CONNECT_ATTEMPTS:
                raise problem
        elif time.monotonic() + delay > self._last_progress + self._patience_s:
            raise problem
        return delay
