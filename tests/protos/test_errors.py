"""How a gRPC error becomes an exception of this package."""

import grpc
import pytest

from cinecat import errors
from cinecat.errors import FieldViolation, from_rpc
from tests.protos.scripted_server import Break, bad_request


class FakeCall(grpc.RpcError):
    """An ended call, with the part of its face that both kinds of channel share."""

    def __init__(self, ending: Break) -> None:
        self._ending = ending

    def code(self) -> grpc.StatusCode:
        return self._ending.code

    def details(self) -> str:
        return self._ending.details

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return (("other", "x"), ("grpc-status-details-bin", self._ending.trailer))


@pytest.mark.parametrize(
    ("code", "kind", "retryable"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest, False),
        (grpc.StatusCode.OUT_OF_RANGE, errors.InvalidRequest, False),
        (grpc.StatusCode.NOT_FOUND, errors.NotFound, False),
        (grpc.StatusCode.ALREADY_EXISTS, errors.AlreadyExists, False),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.WrongState, False),
        (grpc.StatusCode.PERMISSION_DENIED, errors.AccessDenied, False),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ServerBusy, True),
        (grpc.StatusCode.UNAVAILABLE, errors.ServerUnavailable, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.ServerTimeout, True),
        (grpc.StatusCode.INTERNAL, errors.ServerError, False),
        (grpc.StatusCode.ABORTED, errors.Conflict, True),
        (grpc.StatusCode.CANCELLED, errors.CinecatError, False),
    ],
)
def test_each_status_has_its_exception(code: grpc.StatusCode, kind: type[errors.CinecatError], retryable: bool) -> None:
    error = from_rpc(FakeCall(Break(code, "why")), job_id="job-1")
    assert type(error) is kind
    assert (error.code, error.retryable, error.job_id, str(error)) == (code, retryable, "job-1", "why")


def test_an_oversized_message_is_not_a_busy_server() -> None:
    details = "SERVER: Received message larger than max (200 vs. 100)"
    error = from_rpc(FakeCall(Break(grpc.StatusCode.RESOURCE_EXHAUSTED, details)))
    assert type(error) is errors.RequestTooLarge


def test_violations_become_the_message() -> None:
    ending = bad_request(grpc.StatusCode.INVALID_ARGUMENT, ("clip.seed", "is -1"), ("clip.steps", "is 0"))
    error = from_rpc(FakeCall(ending))
    assert error.violations == (FieldViolation("clip.seed", "is -1"), FieldViolation("clip.steps", "is 0"))
    assert str(error) == "clip.seed: is -1; clip.steps: is 0"


def test_a_trailer_that_does_not_parse_costs_only_the_fields() -> None:
    error = from_rpc(FakeCall(Break(grpc.StatusCode.INVALID_ARGUMENT, "why", b"\xff\xff")))
    assert (type(error), str(error), error.violations) == (errors.InvalidRequest, "why", ())


def test_an_error_without_a_status_is_kept() -> None:
    assert str(from_rpc(grpc.RpcError("channel closed"))) == "channel closed"
