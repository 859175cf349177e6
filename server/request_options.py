"""What a request says beside its clip: how soon it is wanted, and which pictures of it."""

from __future__ import annotations

from cinecat.server.errors import Violation
from cinecat.v1 import job_pb2 as pb


def check_priority(priority: int) -> list[Violation]:
    """Refuses a number that is no Priority; unset is one, and left to the method that was called."""
    if priority in pb.Priority.values():
        return []
    names = ", ".join(name for name in pb.Priority.keys() if not name.endswith("UNSPECIFIED"))  # noqa: SIM118
    return [Violation("priority", f"{priority} is not one of {names}")]


def is_interactive(job: pb.Job) -> bool:
    """Whether somebody waits for it; what nobody said to be a batch job is one of these."""
    return job.priority != pb.PRIORITY_BATCH


def check_previews(previews: pb.Previews, steps: int) -> list[Violation]:
    """Refuses a rate that is negative, or so slow that it would never give a picture.

    Args:
        steps: of the clip, with every default filled in.
    """
    if 0 <= previews.every_steps <= steps:
        return []
    allowed = f"{previews.every_steps} is not between 0 (never) and {steps}, the steps of the clip"
    return [Violation("previews.every_steps", allowed)]
