"""What the front refuses or cannot do, in the terms of gRPC; `services.errors` translates it to the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc


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
