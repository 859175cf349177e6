"""When jobs will be done: the policy's rules, run ahead as flows instead of quanta."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cinecat.server.shares import BATCH_SHARE


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is still to be done for a job.

    Attributes:
        deadline: as in `policy.Task`.
        seconds: of the engine core.
    """

    job_id: str
    tenant: str
    interactive: bool
    deadline: float
    seconds: float


def forecast(jobs: Sequence[Remaining], interactive_load: float = 0.0, replicas: int = 1) -> dict[str, float]:
    """Seconds until each job is done.

    Interactive jobs are worked on first and leave batch jobs their share; within a class the tenants' jobs flow side by
    side, each tenant's in the order of their deadlines.

    Args:
        interactive_load: share of the time, 0 to below 1, that interactive jobs which are not there yet will take.
        replicas: that work side by side; each job is on one of them at a time.
    """
    together = _flow([replace(job, seconds=job.seconds / replicas) for job in jobs], interactive_load)
    return {job.job_id: max(job.seconds, together[job.job_id]) for job in jobs}


def _flow(jobs: Sequence[Remaining], interactive_load: float) -> dict[str, float]:
    batch = _by_service([job for job in jobs if not job.interactive])
    interactive = _by_service([job for job in jobs if job.interactive])
    slowed = 1.0 / (1.0 - BATCH_SHARE) if batch else 1.0
    busy = slowed * max(interactive.values(), default=0.0)
    done = {job_id: slowed * service for job_id, service in interactive.items()}
    meanwhile = BATCH_SHARE * busy
    for job_id, service in batch.items():
        left = service - meanwhile
        done[job_id] = service / BATCH_SHARE if left <= 0 else busy + left / (1.0 - interactive_load)
    return done


def _by_service(jobs: Sequence[Remaining]) -> dict[str, float]:
    """Seconds of service to their class after which each job is done."""
    queues: defaultdict[str, list[tuple[float, str, float]]] = defaultdict(list)
    for job in sorted(jobs, key=lambda job: (job.deadline, job.job_id), reverse=True):
        queues[job.tenant].append((job.deadline, job.job_id, job.seconds))
    done: dict[str, float] = {}
    served = 0.0
    left = {tenant: queue[-1][2] for tenant, queue in queues.items()}
    while left:
        # Until the first of the tenants' heads is done, each gets an equal part.
        step = min(left.values())
        served += step * len(left)
        for tenant in list(left):
            left[tenant] -= step
            if left[tenant] <= 0:
                _, job_id, _ = queues[tenant].pop()
                done[job_id] = served
                if queues[tenant]:
                    left[tenant] = queues[tenant][-1][2]
                else:
                    del left[tenant]
    return done
