"""The jobs of a model that are not done, as the policy is shown them and as callers are told of them.

Its replicas share it: a waiting job is nobody's until one of them claims it, and each sees the waiting jobs and those
that it has claimed.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cinecat.engines.messages import StepShape
from cinecat.server.costs import Costs, pixel_frames
from cinecat.server.forecast import Remaining, forecast
from cinecat.server.jobs import Jobs
from cinecat.server.metrics import PRIORITIES, Metrics, priority_name
from cinecat.server.policy import STRETCH, Phase, Snapshot, Task
from cinecat.server.render import Rendering
from cinecat.server.replica import Replica
from cinecat.server.request_options import is_interactive
from cinecat.server.shares import Shares
from cinecat.v1 import clip_pb2
from cinecat.v1 import job_pb2 as pb

# An ETA is computed anew when it is so old; between, it shrinks with the clock.
_FORECAST_S = 0.25

# More than may come in at once.
_CANDIDATES = 64

# Positions of more jobs than _FEW are told so often at most.
_POSITIONS_S, _FEW = 0.2, 20

# A job that is sent out has its inputs encoded again; this many steps before that are worth it.
_STEPS_BEFORE_EVICTION = 2


@dataclass
class _Entry:
    """A job, with times in seconds since the epoch. The deadline changes with what is known of costs, for all jobs at
    once: equal jobs stay in the order of their arrival.
    """

    rendering: Rendering
    arrival: float
    wears_style: bool
    deadline: float = 0.0


class Backlog:
    """All jobs from their acceptance until they leave a core.

    Attributes:
        replicas: that work it off, with what wakes each.
        most_together: jobs in one forward.
    """

    def __init__(self, jobs: Jobs, costs: Costs, most_together: int, metrics: Metrics) -> None:
        self._jobs = jobs
        self._costs = costs
        self.most_together = most_together
        self._metrics = metrics
        self._depth = dict.fromkeys(PRIORITIES, 0)
        self.replicas: dict[Replica, asyncio.Event] = {}
        self._empty = asyncio.Event()
        self._entries: dict[str, _Entry] = {}
        self._shares = Shares()
        self._bytes_per_pixel = 0.0  # of a state, the most that was seen
        self._forecast: dict[str, float] = {}
        self._forecast_at = 0.0
        self._telling: asyncio.TimerHandle | None = None

    def __getitem__(self, job_id: str) -> Rendering:
        return self._entries[job_id].rendering

    def add(self, rendering: Rendering) -> None:
        """Takes a job on."""
        live = rendering.live
        arrival = live.job.create_time.ToMicroseconds() / 1e6
        # A clip of merged tokens wears the model's adapter, where it has one.
        merged = live.job.clip.tokenization.mode == clip_pb2.Tokenization.CAT
        wears = merged or any(style.strength for style in live.job.clip.styles)
        self._entries[live.job_id] = _Entry(rendering, arrival, wears)
        self._empty.clear()
        if is_interactive(live.job):
            self._shares.arrived(self._costs.whole(live.job.clip, rendering.expected_tokens()) or 0.0)
        for entry in self._present():
            clip = entry.rendering.live.job.clip
            work = self._costs.whole(clip, entry.rendering.expected_tokens()) or 0.0
            entry.deadline = entry.arrival + STRETCH * work
        self.tell_positions()
        self.wake()

    def wake(self) -> None:
        """Lets every idle replica look for work: there is more of it, or another replica is no longer idle."""
        for woken in self.replicas.values():
            woken.set()

    def claim(self, rendering: Rendering, replica: Replica) -> None:
        """Makes a waiting job a replica's."""
        rendering.replica = replica

    def give_back(self, rendering: Rendering) -> None:
        """Lets a job that is queued again wait for any replica."""
        rendering.replica = None
        self.tell_positions()
        self.wake()

    def remove(self, rendering: Rendering) -> None:
        """Forgets a job that is done, or whose files are all that is left to do."""
        if self._forget(rendering.live.job_id):
            self.tell_positions()

    def _forget(self, job_id: str) -> bool:
        known = self._entries.pop(job_id, None) is not None
        if not self._entries:
            self._empty.set()
        return known

    async def until_empty(self) -> None:
        """Until all of its jobs have ended, or only their files are left to do."""
        while self._present():
            await self._empty.wait()

    def found_no_slot(self, rendering: Rendering) -> None:
        """Notes that a job needs a style slot."""
        if (entry := self._entries.get(rendering.live.job_id)) is not None:
            entry.wears_style = True

    @property
    def unfinished(self) -> list[Rendering]:
        """All of them."""
        return [entry.rendering for entry in self._entries.values()]

    def claimed_by(self, replica: Replica) -> list[Rendering]:
        """Jobs that a replica has."""
        return [each.rendering for each in self._entries.values() if each.rendering.replica is replica]

    @property
    def waiting(self) -> int:
        """How many jobs wait to come in."""
        return sum(entry.rendering.replica is None for entry in self._present())

    def snapshot(self, replica: Replica, resident_only: bool) -> Snapshot:
        """What the policy decides from for a replica; with `resident_only`, nobody comes in.

        Of many that wait, those that may be next: of each class and tenant the most urgent ones.
        """
        present = self._present()
        self._shares.tenants({entry.rendering.live.tenant for entry in present})
        entries = [entry for entry in present if entry.rendering.replica is replica]
        if not resident_only:
            empty = not entries
            rivals = [each for each in self.replicas if each is not replica and each.idle and each.works]
            queues: defaultdict[tuple[bool, str], list[_Entry]] = defaultdict(list)
            for entry in present:
                if entry.rendering.replica is None and not (rivals and _better_off(entry, replica, empty, rivals)):
                    live = entry.rendering.live
                    queues[is_interactive(live.job), live.tenant].append(entry)
            for queue in queues.values():
                entries += heapq.nsmallest(_CANDIDATES, queue, key=lambda entry: (entry.deadline, entry.arrival))
        return Snapshot(
            tasks=[self._task(entry) for entry in entries],
            tenant_seconds=self._shares.tenant_seconds,
            batch_is_due=self._shares.batch_is_due,
            state_bytes=replica.state_bytes,
            slots_full=replica.slots_full,
            most_together=self.most_together,
            step_seconds=self._costs.step_seconds,
        )

    @contextmanager
    def charged(self, kind: str, renderings: Sequence[Rendering]) -> Iterator[None]:
        """Counts the time that a quantum of a kind takes to the tenants and the class of its jobs."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._metrics.quantum_seconds.labels(kind).observe(seconds)
            classes = {is_interactive(entry.rendering.live.job) for entry in self._present()}
            self._shares.spent(is_interactive(renderings[0].live.job), seconds, len(classes) == 2)
            for rendering in renderings:
                live = rendering.live
                self._shares.charge(live.tenant, seconds / len(renderings))
                self._metrics.charged(live.tenant, live.job.clip, seconds / len(renderings))
                self._learn_state(rendering)

    def report(self, rendering: Rendering) -> None:
        """Tells a running job's watchers how far it is and when it will be done."""
        live = rendering.live
        if live.ended:
            return
        self._tell_eta(live.job, self._forecast_now())
        self._jobs.progress(live)

    def tell_positions(self) -> None:
        """Tells every waiting job its position and ETA; where there are many, a moment later."""
        if len(self._entries) <= _FEW:
            self._tell_positions()
        elif self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(_POSITIONS_S, self._tell_positions)

    def _tell_positions(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        done = self._forecast_now(renewed=True)
        entries = sorted(self._present(), key=lambda entry: _order(entry, done))
        waiting = dict.fromkeys(PRIORITIES, 0)
        for position, entry in enumerate(entries):
            live = entry.rendering.live
            if live.job.state != pb.JOB_STATE_QUEUED:
                continue
            waiting[priority_name(live.job)] += 1
            live.job.progress.queue_position = position
            self._tell_eta(live.job, done)
            self._jobs.progress(live)
        for priority, jobs in waiting.items():
            self._metrics.queue_depth.labels(priority).inc(jobs - self._depth[priority])
        self._depth = waiting

    def _present(self) -> list[_Entry]:
        """Jobs that were cancelled in the queue are gone from it, for good once that is stored."""
        for job_id in [job_id for job_id, entry in self._entries.items() if entry.rendering.live.end_is_stored]:
            self._forget(job_id)
        return [entry for entry in self._entries.values() if not entry.rendering.live.ended]

    def _task(self, entry: _Entry) -> Task:
        rendering, live = entry.rendering, entry.rendering.live
        job = live.job
        return Task(
            job_id=job.job_id,
            tenant=live.tenant,
            interactive=is_interactive(job),
            deadline=entry.deadline,
            arrival=entry.arrival,
            phase=rendering.phase,
            shape=rendering.next or self._first_shape(rendering),
            rows=rendering.rows,
            steps_left=sum(tokens > 0 for tokens in rendering.expected_tokens()[job.progress.step :]),
            begin_seconds=self._costs.seconds("condition", pixel_frames(job.clip)) or 0.0,
            state_bytes=rendering.state_bytes or round(self._bytes_per_pixel * pixel_frames(job.clip)),
            wears_style=entry.wears_style,
            alone=rendering.alone or live.profile_steps > 0,
            evictable=rendering.can_be_saved and rendering.steps_in_core >= _STEPS_BEFORE_EVICTION,
        )

    def _first_shape(self, rendering: Rendering) -> StepShape | None:
        """Of a job that waits, as it will most likely be."""
        if rendering.phase is not Phase.WAITING:
            return None
        return StepShape(rendering.engine, rendering.expected_tokens()[0])

    def _learn_state(self, rendering: Rendering) -> None:
        rate = rendering.state_bytes / pixel_frames(rendering.live.job.clip)
        self._bytes_per_pixel = max(self._bytes_per_pixel, rate)

    def _forecast_now(self, renewed: bool = False) -> dict[str, float]:
        """When each job will be done, in seconds since the epoch; without those that nothing is known of."""
        now = time.time()
        if renewed or now - self._forecast_at >= _FORECAST_S:
            known = []
            for entry in self._present():
                live = entry.rendering.live
                seconds = self._costs.remaining(live.job, entry.rendering.expected_tokens())
                if seconds is not None:
                    known.append(Remaining(live.job_id, live.tenant, is_interactive(live.job), entry.deadline, seconds))
            replicas = max(1, sum(replica.works for replica in self.replicas))
            ahead = forecast(known, self._shares.interactive_load(replicas), replicas)
            self._forecast = {job_id: now + seconds for job_id, seconds in ahead.items()}
            self._forecast_at = now
        return self._forecast

    def _tell_eta(self, job: pb.Job, done: dict[str, float]) -> None:
        if job.job_id in done:
            job.progress.eta.FromNanoseconds(max(0, int((done[job.job_id] - time.time()) * 1e9)))


def _better_off(entry: _Entry, replica: Replica, empty: bool, rivals: Sequence[Replica]) -> bool:
    """Whether a waiting job suits another replica better that is idle, and so is about to take it: whoever is no longer
    idle wakes those that left it a job.
    """
    styles = entry.rendering.styles
    ours = empty, *replica.suits(styles)
    return any((True, *each.suits(styles)) > ours for each in rivals if not (each.slots_full and entry.wears_style))


def _order(entry: _Entry, done: dict[str, float]) -> tuple[bool, float, float]:
    """Those that a replica has first, then as they will be done."""
    return entry.rendering.replica is None, done.get(entry.rendering.live.job_id, entry.deadline), entry.arrival
