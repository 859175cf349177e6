"""A job while it lives: what is known of it, and what its watchers are shown."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field

import structlog

from cinecat.server.lifecycle import FINAL_STATES
from cinecat.v1 import job_pb2 as pb

# Of a job, for its trace.
_STEPS = 128

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One denoising step of a job: its number from 1 on, tokens per row, and its end in nanoseconds since 1970."""

    step: int
    tokens: int
    seconds: float
    end_ns: int


@dataclass
class LiveJob:
    """A job that is not in a final state, or whose watchers still read.

    Attributes:
        job: as of the last event; changed only through `Jobs`.
        tenant: whose it is.
        attempts: how often the engine core has started on it since it last got on.
        frames: events that show decoded frames; they are kept as long as the job runs.
        shown: the latest event that shows an estimate.
        latest: the latest event that tells of progress alone.
        steps: those that this server has seen, the last ones of very many.
        frames_shown: how many decoded frames watchers were sent.
        turn: of its transitions, which are stored one at a time.
        storing: sequence numbers of transitions that are being stored.
        waking: the coming end of its watchers' wait for progress.
        profile_steps: how many of its coming steps are to be recorded.
        profiles: files of those that were, by step.
        stop_requested: somebody cancelled it, and it has not stopped yet.
    """

    job: pb.Job
    request_hash: str
    tenant: str = ""
    attempts: int = 0
    sequence: int = 0
    transitions: list[pb.JobEvent] = field(default_factory=list)
    frames: list[pb.JobEvent] = field(default_factory=list)
    shown: pb.JobEvent | None = None
    latest: pb.JobEvent | None = None
    frames_shown: int = 0
    steps: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=_STEPS))
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    storing: list[int] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    waking: asyncio.TimerHandle | None = None
    watchers: int = 0
    grace: asyncio.TimerHandle | None = None
    profile_steps: int = 0
    profiles: dict[int, str] = field(default_factory=dict)
    stop_requested: bool = False

    def excuse(self) -> None:
        """Takes back the last attempt, which ended for no fault of the job."""
        self.attempts = max(0, self.attempts - 1)

    @property
    def log(self) -> structlog.typing.FilteringBoundLogger:
        """The log, with what tells whose lines these are."""
        names = {"request_id": self.job.request_id, "tenant": self.tenant}
        given = {name: value for name, value in names.items() if value}
        bound: structlog.typing.FilteringBoundLogger = log.bind(job_id=self.job_id, **given)
        return bound

    @property
    def job_id(self) -> str:
        return self.job.job_id

    @property
    def ended(self) -> bool:
        return self.job.state in FINAL_STATES

    @property
    def end_is_stored(self) -> bool:
        """Whether it has ended for good: until its end is stored, it may be taken back."""
        return bool(self.transitions) and self.transitions[-1].job.state in FINAL_STATES

    @property
    def known(self) -> pb.Job:
        """The job as its last event told it; `job` is ahead of that while a transition is being stored."""
        last, latest = self.transitions[-1], self.latest
        newer = latest is not None and last.sequence < latest.sequence < self._end
        return latest.job if newer and latest is not None else last.job

    @property
    def picture(self) -> pb.PreviewFrame | None:
        """The newest picture of it: of the decoded frames the last, before those the middle of the last estimate."""
        if self.frames:
            return self.frames[-1].preview.frames[-1]
        if self.shown is None:
            return None
        estimate = self.shown.preview.frames
        return estimate[len(estimate) // 2]

    @property
    def _end(self) -> float:
        """What is past this number is not known yet: a watcher who saw it would miss the transition before it."""
        return min(self.storing, default=math.inf)

    def events_after(self, sequence: int) -> list[pb.JobEvent]:
        """Everything known past `sequence` in order; the latest progress where no other event is newer, since each
        tells all.
        """
        events = [*self.transitions, *self.frames]
        if self.shown is not None:
            events.append(self.shown)
        if self.latest is not None and all(event.sequence < self.latest.sequence for event in events):
            events.append(self.latest)
        known = (event for event in events if sequence < event.sequence < self._end)
        return sorted(known, key=lambda event: event.sequence)

    def wake(self) -> None:
        """Lets all watchers look at what is new."""
        if self.waking is not None:
            self.waking.cancel()
            self.waking = None
        self.changed.set()
        self.changed = asyncio.Event()
