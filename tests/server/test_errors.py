"""What a client reads when a request is refused, over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry

from cinecat.server.errors import RequestError, ShuttingDown, Violation, invalid, unknown_job
from cinecat.server.metrics import Metrics
from cinecat.server.services.errors import ErrorInterceptor
from cinecat.v1 import generation_pb2, generation_pb2_grpc, job_pb2

WRONG = Violation("clip.steps", "0 is not between 1 and 200")
MISSING = Violation("clip.styles[0].name", "no style 'nior'", missing=True)


class Refusing(generation_pb2_grpc.GenerationServicer):
    """Fails every call in the same way, a streamed one after its first event."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def GetJob(self, request: generation_pb2.GetJobRequest, context: object) -> job_pb2.Job:  # noqa: N802
        raise self._error

    async def Watch(  # noqa: N802
        self, request: generation_pb2.WatchRequest, context: object
    ) -> AsyncIterator[job_pb2.JobEvent]:
        yield job_pb2.JobEvent(sequence=1)
        raise self._error


Call = Callable[[Any], Awaitable[None]]


async def get_job(stub: Any) -> None:
    await stub.GetJob(generation_pb2.GetJobRequest(job_id="a"))


async def watch(stub: Any) -> None:
    async for _ in stub.Watch(generation_pb2.WatchRequest(job_id="a")):
        pass


def refused(error: Exception, call: Call = get_job) -> tuple[grpc.aio.AioRpcError, CollectorRegistry]:
    """What a client gets, and the metrics of the server."""
    registry = CollectorRegistry()

    async def answered() -> grpc.aio.AioRpcError:
        server = grpc.aio.server(interceptors=[ErrorInterceptor(Metrics(registry))])
        generation_pb2_grpc.add_GenerationServicer_to_server(Refusing(error), server)  # type: ignore[abstract]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = generation_pb2_grpc.GenerationStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as answer:
                    await call(stub)
                return answer.value
        finally:
            await server.stop(None)

    return asyncio.run(answered()), registry


def fields(answer: grpc.aio.AioRpcError) -> list[tuple[str, str]]:
    """The field violations that came with an answer."""
    status = rpc_status.from_call(answer)
    details = error_details_pb2.BadRequest()
    assert status is not None
    assert status.details[0].Unpack(details)
    return [(violation.field, violation.description) for violation in details.field_violations]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (invalid([WRONG]), grpc.StatusCode.INVALID_ARGUMENT),
        (invalid([WRONG, MISSING]), grpc.StatusCode.INVALID_ARGUMENT),
        (invalid([MISSING]), grpc.StatusCode.NOT_FOUND),
        (unknown_job("a"), grpc.StatusCode.NOT_FOUND),
        (RequestError(grpc.StatusCode.OUT_OF_RANGE, "offset: 9", [WRONG]), grpc.StatusCode.OUT_OF_RANGE),
    ],
)
@pytest.mark.parametrize(("call", "method"), [(get_job, "GetJob"), (watch, "Watch")])
def test_a_refusal_has_its_status_and_names_the_fields(
    error: RequestError, code: grpc.StatusCode, call: Call, method: str
) -> None:
    answer, registry = refused(error, call)
    assert answer.code() is code
    assert answer.details() == error.message
    assert fields(answer) == [(violation.field, violation.description) for violation in error.violations]
    labels = {"method": method, "code": code.name}
    assert registry.get_sample_value("cinecat_requests_refused_total", labels) == 1


def test_a_refusal_that_blames_no_field_has_no_details() -> None:
    answer, _ = refused(ShuttingDown("the server is shutting down"))
    assert (answer.code(), answer.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
    status = rpc_status.from_call(answer)
    assert status is None or not status.details


@pytest.mark.parametrize("call", [get_job, watch])
def test_the_unexpected_is_internal_and_tells_nothing_of_the_server(call: Call) -> None:
    answer, _ = refused(RuntimeError("/secret/path"), call)
    assert answer.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in f"{answer.details()}"


@pytest.mark.parametrize("letter", ["x", "é", "猫"])
def test_ever_so_many_violations_still_arrive(letter: str) -> None:
    many = invalid([Violation(f"clip.artifact_formats[{index}]", letter * 80) for index in range(5000)])
    answer, _ = refused(many)
    assert answer.code() is grpc.StatusCode.INVALID_ARGUMENT
    arrived = fields(answer)
    assert arrived[0] == ("clip.artifact_formats[0]", letter * 80)
    assert 5 < len(arrived) < 100


def test_one_long_description_is_cut() -> None:
    answer, _ = refused(invalid([Violation("clip.prompt", "猫" * 50_000)]))
    ((field, description),) = fields(answer)
    assert field == "clip.prompt"
    assert description.startswith("猫猫")
    assert description.endswith("…")


def test_an_unknown_job_is_not_echoed_in_full() -> None:
    assert len(unknown_job("x" * 10_000).message) < 200
