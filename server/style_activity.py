"""What styles have been used for since the server started."""

from __future__ import annotations

import threading
import time
from collections import Counter

from cinecat.engines.messages import ResidentStyle


class StyleActivity:
    """What the styles have been used for since the server started, by fingerprint, and which slots hold them. Safe to
    use from several threads.
    """

    def __init__(self) -> None:
        self._resident: dict[object, tuple[ResidentStyle, ...]] = {}
        self._lock = threading.Lock()
        self._uses: Counter[str] = Counter()
        self._last_use_ns: dict[str, int] = {}

    def used(self, fingerprint: str) -> None:
        """A job with the style has begun."""
        with self._lock:
            self._uses[fingerprint] += 1
            self._last_use_ns[fingerprint] = time.time_ns()

    def uses(self, fingerprint: str) -> tuple[int, int]:
        """How many jobs have begun with a style, and when the last of them did, in nanoseconds since 1970."""
        with self._lock:
            return self._uses[fingerprint], self._last_use_ns.get(fingerprint, 0)

    def hold(self, core: object, resident: tuple[ResidentStyle, ...]) -> None:
        """Says what is in the slots of a core; nothing, once it is gone."""
        with self._lock:
            if resident:
                self._resident[core] = resident
            else:
                self._resident.pop(core, None)

    def slots(self, fingerprint: str) -> tuple[ResidentStyle, ...]:
        """The slots that a style is in, alone or stacked, of all cores."""
        with self._lock:
            return tuple(each for held in self._resident.values() for each in held if fingerprint in each.fingerprints)
