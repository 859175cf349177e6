"""What styles have been used for since the server started."""

from __future__ import annotations

import threading
import time
from collections import Counter

from cinecat.engines.messages import ResidentStyle


class StyleActivity:
    """What the styles have been used for since the server started, by fingerprint. Safe to use from several threads.

    Attributes:
        resident: what was in the core's slots when it last told; set to () when a core is gone.
    """

    def __init__(self) -> None:
        self.resident: tuple[ResidentStyle, ...] = ()
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

    def slots(self, fingerprint: str) -> tuple[ResidentStyle, ...]:
        """The slots that a style is in, alone or stacked."""
        return tuple(resident for resident in self.resident if fingerprint in resident.fingerprints)
