"""What the commands print: results on stdout, everything else on stderr."""

import dataclasses
import json
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime

import grpc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cinecat.clip import Clip, Job
from cinecat.errors import (
    CinecatError,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    RequestTooLarge,
    ServerTimeout,
    ServerUnavailable,
)

# A table in a pipe is read by programs such as grep: one line per row, however long.
_PIPE_WIDTH = 400
_NOTHING: tuple[object, ...] = (None, "", (), [], {})
_CONTROL = ("Cc", "Cs")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Interrupted(JobCancelled):
    """The user pressed Ctrl-C."""


def plain(text: object) -> str:
    """`text` without control characters, which could drive the terminal when they come from a server."""
    return "".join(
        _REPLACEMENT if unicodedata.category(char) in _CONTROL and char != "\n" else char for char in str(text)
    )


def say(text: object) -> None:
    """A line for people, on stderr."""
    print(plain(text), file=sys.stderr)


def show(text: object) -> None:
    """A line of the result, on stdout."""
    print(plain(text))


def show_json(value: object) -> None:
    print(json.dumps(value, default=_jsonable))


def show_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(plain(cell).replace("\n", " ")) for cell in row))
    with console.capture() as captured:
        console.print(table)
    # The last column is padded too, which is noise in a pipe.
    for line in captured.get().splitlines():
        print(line.rstrip())


def show_fields(fields: Mapping[str, object]) -> None:
    """A table of the fields that hold something."""
    show_table(("FIELD", "VALUE"), [(name, _phrase(value)) for name, value in fields.items() if value not in _NOTHING])


def clip_json(clip: Clip, output: object = None) -> dict[str, object]:
    """A finished clip as scripts read it; `output` is where it was saved."""
    value = dataclasses.asdict(clip)
    for name in ("data", "path", "job_id"):
        del value[name]
    return {
        "job_id": clip.job_id,
        "status": "succeeded",
        "output": None if output is None else str(output),
        **value,
        "style": clip.style,
    }


def job_json(job: Job) -> dict[str, object]:
    """A job as scripts read it, with its clip's fields once there is one."""
    value: dict[str, object] = {
        "job_id": job.job_id,
        "status": str(job.state),
        "request_id": job.request_id,
        "detached": job.detached,
        "priority": job.priority,
        "previews": dataclasses.asdict(job.previews),
        "step": job.step,
        "total_steps": job.total_steps,
        "queue_position": job.queue_position,
        "eta_seconds": job.eta_seconds,
        "wait_reason": job.wait_reason,
        "create_time": job.create_time,
        "start_time": job.start_time,
        "end_time": job.end_time,
        "notes": job.notes,
        "trace_id": job.trace_id,
    }
    value |= dataclasses.asdict(job.settings) | {"style": job.settings.style}
    if job.clip is not None:
        value |= clip_json(job.clip)
    if job.error is not None:
        value["error"] = _error_body(job.error)
    return value


def error_json(error: CinecatError) -> dict[str, object]:
    status = "failed" if isinstance(error, JobFailed) else "cancelled" if isinstance(error, JobCancelled) else "error"
    job = {"job_id": error.job_id} if error.job_id else {}
    return {"status": status, **job, "error": _error_body(error)}


def exit_code(error: CinecatError) -> int:
    """The exit code for `error`; `main` lists them."""
    if isinstance(error, Interrupted):
        return 130
    if isinstance(error, JobCancelled):
        return 4
    if isinstance(error, ServerUnavailable | ServerTimeout):
        return 3
    if isinstance(error, InvalidRequest | RequestTooLarge) or error.violations:
        return 2
    return 1


def usage_error(message: str) -> CinecatError:
    return InvalidRequest(message, code=grpc.StatusCode.INVALID_ARGUMENT)


def _error_body(error: CinecatError) -> dict[str, object]:
    violations = [dataclasses.asdict(violation) for violation in error.violations]
    return {"code": error.code.name, "message": error.message, "violations": violations}


def _phrase(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_phrase(part)}" for name, part in value.items() if part not in _NOTHING)
    if isinstance(value, list | tuple):
        return "; ".join(map(_phrase, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _jsonable(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
