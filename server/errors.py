"""What the front refuses or cannot do, in the terms of gRPC; `services.errors` translates it to the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from cinecat.engines.errors import CoreDied, EngineError, EngineFault, NoFreeSlot, OutOfMemory
from cinecat.plugins.registry import UnknownStyle
from cinecat.server.artifacts import ArtifactError, ArtifactNotFoundError
from cinecat.server.styles import StyleChanged


@dataclass(frozen=True)
class Violation:
    """A field of the request that cannot be served.

    Attributes:
        field: path in the request, e.g. "clip.styles[0].name".
        description: what is wrong and what is allowed.
        missing: the field is well formed and names something that does not exist.
    """

    field: str
    description: str
    missing: bool = False


class RequestError(Exception):
    """A request that is answered with an error status."""

    def __init__(self, code: grpc.StatusCode, message: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.violations = tuple(violations)


def invalid(violations: Sequence[Violation]) -> RequestError:
    """INVALID_ARGUMENT, or NOT_FOUND when all that is wrong is that something named does not exist."""
    missing = all(violation.missing for violation in violations)
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    code = grpc.StatusCode.NOT_FOUND if missing else grpc.StatusCode.INVALID_ARGUMENT
    return RequestError(code, message, violations)


def unknown_job(job_id: str) -> RequestError:
    return invalid([Violation("job_id", f"no job {job_id[:64]!r}; ListJobs names those there are", missing=True)])


class ShuttingDown(RequestError):
    """The server is going away; accepted jobs are kept."""

    def __init__(self, message: str) -> None:
        super().__init__(grpc.StatusCode.UNAVAILABLE, message)


# The first that fits, so the special before the general.
_STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (UnknownStyle, grpc.StatusCode.NOT_FOUND),
    (StyleChanged, grpc.StatusCode.FAILED_PRECONDITION),
    (ArtifactNotFoundError, grpc.StatusCode.NOT_FOUND),
    (ArtifactError, grpc.StatusCode.UNAVAILABLE),
    (OutOfMemory, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NoFreeSlot, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (CoreDied, grpc.StatusCode.UNAVAILABLE),
    (EngineFault, grpc.StatusCode.INTERNAL),
    (EngineError, grpc.StatusCode.FAILED_PRECONDITION),
)


def status_of(error: Exception) -> grpc.StatusCode:
    """The status of an error, for RPCs and for failed jobs alike."""
    if isinstance(error, RequestError):
        return error.code
    return next((code for kind, code in _STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def explain(error: Exception) -> str:
    """What a caller is told: the error's own words, or, where they may hold internals, that the log has them."""
    if status_of(error) is grpc.StatusCode.INTERNAL and not isinstance(error, EngineFault):
        return "the server failed on this request; its log says why"
    return f"{error}" or type(error).__name__
