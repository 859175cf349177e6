"""Who had how much of a model's engine cores: tenants, and the two classes of jobs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection

BATCH_SHARE = 0.1
"""Of the time, to batch jobs, while interactive ones want all of it."""

_LOAD_SECONDS = 300.0
_LOAD_ARRIVALS = 3
"""The interactive load is that of jobs which came in the last minutes; fewer say nothing of those to come."""


class Shares:
    """Seconds of engine cores, as the policy weighs them.

    Attributes:
        tenant_seconds: of the tenants that have jobs. One that comes, or comes back, starts with the least that another
            has: nobody saves up a claim by not asking.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._arrivals: deque[tuple[float, float]] = deque()  # of interactive jobs: when, and their work in seconds
        self.tenant_seconds: dict[str, float] = {}
        self._owed = 0.0  # seconds to batch jobs
        self._batch_quantum = 0.0  # seconds of the last one

    @property
    def batch_is_due(self) -> bool:
        """Batch jobs are owed as much as they take at once."""
        return self._owed > self._batch_quantum

    def tenants(self, active: Collection[str]) -> None:
        """Says who has jobs now."""
        known = [self.tenant_seconds[tenant] for tenant in active if tenant in self.tenant_seconds]
        least = min(known, default=0.0)
        self.tenant_seconds = {tenant: self.tenant_seconds.get(tenant, least) for tenant in active}

    def charge(self, tenant: str, seconds: float) -> None:
        """Counts a tenant's part of a quantum."""
        self.tenant_seconds[tenant] = self.tenant_seconds.get(tenant, 0.0) + seconds

    def interactive_load(self, replicas: int = 1) -> float:
        """Share of the time of so many replicas that interactive jobs asked for lately, 0 to 0.9."""
        now = self._clock()
        while self._arrivals and now - self._arrivals[0][0] > _LOAD_SECONDS:
            self._arrivals.popleft()
        if len(self._arrivals) < _LOAD_ARRIVALS:
            return 0.0
        window = max(1.0, min(_LOAD_SECONDS, now - self._began))
        return min(1.0 - BATCH_SHARE, sum(work for _, work in self._arrivals) / (window * replicas))

    def arrived(self, work: float) -> None:
        """Counts an interactive job and its work, in seconds."""
        self._arrivals.append((self._clock(), work))

    def spent(self, interactive: bool, seconds: float, both_want: bool) -> None:
        """Counts a quantum.

        Args:
            interactive: the class of its jobs.
            both_want: there are jobs of both classes.
        """
        if not interactive:
            self._batch_quantum = seconds
            self._owed = max(0.0, self._owed - seconds)
        elif both_want:
            self._owed += seconds * BATCH_SHARE / (1.0 - BATCH_SHARE)
        if not both_want:
            self._owed = 0.0
