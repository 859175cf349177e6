"""What can go wrong, as exceptions. `from_rpc` is the only place where a gRPC error becomes one of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_STATUS_OF_NUMBER = {status.value[0]: status for status in grpc.StatusCode}


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request and what is wrong with it; `field` is its path in the request, e.g. "clip.seed"."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class CinecatError(Exception):
    """Base of all errors of this package. `code` is a gRPC status; `retryable` says whether the same call may succeed
    later; `job_id` is set once a job was involved.
    """

    default_code = grpc.StatusCode.UNKNOWN
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        violations: Iterable[FieldViolation] = (),
        job_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.violations = tuple(violations)
        self.job_id = job_id


class InvalidRequest(CinecatError):
    """A field of the request cannot be served; `violations` names every one of them."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(CinecatError):
    """The job, style, model or artifact does not exist on this server."""

    default_code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(CinecatError):
    """The request id was already used for another clip, or the version for another style."""

    default_code = grpc.StatusCode.ALREADY_EXISTS


class Conflict(CinecatError):
    """Somebody else is changing the same thing right now."""

    default_code = grpc.StatusCode.ABORTED
    retryable = True


class WrongState(CinecatError):
    """The job or style is not in a state that allows this, e.g. a download before the job has succeeded."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION


class AccessDenied(CinecatError):
    """The server does not know the caller, or does not let it do this."""

    default_code = grpc.StatusCode.PERMISSION_DENIED


class RequestTooLarge(CinecatError):
    """The message is larger than the connection carries."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class ServerBusy(CinecatError):
    """The server has no room for the request now."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class ServerUnavailable(CinecatError):
    """The server cannot be reached, or went away and did not come back in time."""

    default_code = grpc.StatusCode.UNAVAILABLE
    retryable = True

    @property
    def connected(self) -> bool:
        """False when no connection could be made at all."""
        return not any(sign in self.message for sign in ("failed to connect", "DNS resolution", "resolver"))


class ServerTimeout(CinecatError):
    """The server did not answer within the client's `timeout_s`."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED
    retryable = True


class ServerError(CinecatError):
    """The server broke its side of the contract."""

    default_code = grpc.StatusCode.INTERNAL


class JobFailed(CinecatError):
    """The job was accepted and then failed on the server."""

    default_code = grpc.StatusCode.INTERNAL


class JobCancelled(CinecatError):
    """The job was cancelled."""

    default_code = grpc.StatusCode.CANCELLED


class DownloadCorrupted(CinecatError):
    """The bytes received are not the artifact that the job wrote. Nothing was left at the output path."""

    default_code = grpc.StatusCode.DATA_LOSS
    retryable = True


_CLASS_OF_STATUS: dict[grpc.StatusCode, type[CinecatError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: WrongState,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: ServerTimeout,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.UNIMPLEMENTED: ServerError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}


def refuse(violations: Iterable[FieldViolation]) -> InvalidRequest:
    """The error for `violations`, which are named in its message."""
    found = tuple(violations)
    return InvalidRequest("; ".join(map(str, found)), violations=found)


def status_of(number: int) -> grpc.StatusCode:
    """The gRPC status of a google.rpc.Code."""
    return _STATUS_OF_NUMBER.get(number, grpc.StatusCode.UNKNOWN)


def from_rpc(error: grpc.RpcError, *, job_id: str = "") -> CinecatError:
    """The exception for an error of a call, of either kind of channel."""
    if not hasattr(error, "code"):
        return CinecatError(str(error), job_id=job_id)
    code = error.code()
    details = error.details() or code.name
    violations = _violations(error)
    message = "; ".join(map(str, violations)) or details
    kind = _CLASS_OF_STATUS.get(code, CinecatError)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        kind = RequestTooLarge if "larger than max" in details else ServerBusy
    return kind(message, code=code, violations=violations, job_id=job_id)


def _violations(error: grpc.RpcError) -> tuple[FieldViolation, ...]:
    trailer: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    for key, value in trailer:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return tuple(_decode(value))
    return ()


def _decode(trailer: bytes) -> Iterable[FieldViolation]:
    # A trailer that does not parse costs the field names, not the error itself.
    try:
        details = status_pb2.Status.FromString(trailer).details
        for detail in details:
            bad_request = error_details_pb2.BadRequest()
            if detail.Unpack(bad_request):
                yield from (FieldViolation(bad.field, bad.description) for bad in bad_request.field_violations)
    except DecodeError:
        return
