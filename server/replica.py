"""One engine core of a model, and what is known of it."""

from __future__ import annotations

from collections.abc import Set
from typing import Literal, TypeAlias

from cinecat.engines.messages import ResidentStyle
from cinecat.server.cards import Seat
from cinecat.server.core import Core
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.style_activity import StyleActivity

State: TypeAlias = Literal["loading", "ready", "restarting", "draining"]


class Replica:
    """What a job is bound to from its beginning until it leaves the core.

    Attributes:
        seat: where its core was started.
        state: what it is about.
        state_bytes: that jobs in its core may hold together; 0 is no bound.
        idle: nothing is in its core, it found nothing to do, and it waits to be woken.
        slots_full: a job found no style slot free, and no job has left the core since.
    """

    def __init__(self, core: Core, gauges: CoreGauges, activity: StyleActivity, seat: Seat | None = None) -> None:
        """`activity` is told what is in its style slots."""
        self.core = core
        self.gauges = gauges
        self.seat = seat or Seat("auto")
        self.state: State = "loading"
        self.state_bytes = 0
        self.idle = False
        self.slots_full = False
        self._activity = activity
        self._resident: tuple[ResidentStyle, ...] = ()

    @property
    def resident(self) -> tuple[ResidentStyle, ...]:
        """What is in its style slots."""
        return self._resident

    @resident.setter
    def resident(self, resident: tuple[ResidentStyle, ...]) -> None:
        self._resident = resident
        self._activity.hold(self, resident)

    @property
    def works(self) -> bool:
        """Whether it takes jobs."""
        return self.state == "ready" and not self.core.died.is_set()

    def suits(self, styles: Set[str]) -> tuple[bool, bool]:
        """How well it suits a job that wears the styles with these fingerprints: the greater, the better. First that
        they are in a slot, then that its engine is built.
        """
        dressed = not styles or any(styles == set(held.fingerprints) for held in self._resident)
        return dressed, not self.gauges.building

    def lost(self) -> None:
        """Its core died, and what it held is gone."""
        self.resident = ()
        self.slots_full = False
        self.gauges.slots(0)

    def leave(self) -> None:
        """Its core was stopped for good."""
        self.resident = ()
        self.gauges.gone()
