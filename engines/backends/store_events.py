"""What happens in a store of engines, to be counted or told."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum

log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """What can happen in a store."""

    HIT = "hit"
    MISS = "miss"
    CHECKING = "checking"  # checksums of files that were not seen before
    WAITING = "waiting"  # for another process that builds the same
    BUILT = "built"
    DAMAGED = "damaged"  # found and not used; removed where that was possible
    EVICTED = "evicted"


@dataclass(frozen=True)
class StoreEvent:
    """What happened.

    Attributes:
        digest: of the engine's key.
        detail: for people: the engine, or what is wrong with it.
        seconds: what the build took; 0 otherwise.
        size_bytes: of the engine; 0 where there is none.
    """

    outcome: Outcome
    digest: str
    detail: str
    seconds: float = 0.0
    size_bytes: int = 0


def log_event(event: StoreEvent) -> None:
    """Tells the log, where nobody else wants to be told."""
    level = logging.WARNING if event.outcome is Outcome.DAMAGED else logging.INFO
    log.log(level, "engine %s %s: %s", event.digest[:12], event.outcome, event.detail)
