"""A server in simulated time: policy and shares as the scheduler uses them, and an engine core that is a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cinecat.engines.messages import StepShape
from cinecat.server.policy import (
    STRETCH,
    Advance,
    Begin,
    DecodeChunk,
    Evict,
    Phase,
    Policy,
    Snapshot,
    Task,
)
from cinecat.server.shares import Shares

CONDITION_S = 0.2
CHUNK_S = 0.1


@dataclass
class SimulatedJob:
    """A job, and what became of it. Times are seconds."""

    job_id: str
    arrival: float
    interactive: bool = True
    tenant: str = ""
    steps: int = 4
    step_seconds: float = 0.1
    chunks: int = 1
    state_bytes: int = 1
    wears_style: bool = False
    phase: Phase = Phase.WAITING
    work: float = field(init=False)
    shape: StepShape = field(init=False)
    steps_left: int = field(init=False)
    chunks_left: int = field(init=False)
    since_begin: int = 0
    began: float | None = None
    ended: float | None = None
    evictions: int = 0

    def __post_init__(self) -> None:
        self.steps_left, self.chunks_left = self.steps, self.chunks
        self.work = CONDITION_S + self.steps * self.step_seconds + self.chunks * CHUNK_S
        self.shape = StepShape("clock", round(self.step_seconds * 1000))

    def task(self) -> Task:
        return Task(
            self.job_id,
            self.tenant,
            self.interactive,
            deadline=self.arrival + STRETCH * self.work,
            arrival=self.arrival,
            phase=self.phase,
            shape=self.shape if self.steps_left else None,
            state_bytes=self.state_bytes,
            wears_style=self.wears_style,
            evictable=self.since_begin > 0,
        )


@dataclass(frozen=True)
class Quantum:
    """What the core did from `start` for `seconds`."""

    start: float
    seconds: float
    decision: Begin | Advance | DecodeChunk | Evict


@dataclass
class Simulation:
    """Runs jobs to their end.

    Attributes:
        row_share: seconds of a forward are step_seconds x (1 + row_share x (rows - 1)); 1 is no gain from batching.
        idle_with_work: times when nothing was done though jobs were there.
    """

    policy: Policy
    jobs: Sequence[SimulatedJob]
    row_share: float = 1.0
    state_bytes: int = 0
    slots: int = 100
    most_together: int = 8
    now: float = 0.0
    quanta: list[Quantum] = field(default_factory=list)
    shares: Shares = field(default_factory=Shares)
    _measured: dict[tuple[StepShape, int], float] = field(default_factory=dict)

    def run(self, until: float = 1e9) -> None:
        by_id = {job.job_id: job for job in self.jobs}
        while self.now < until:
            present = [job for job in self.jobs if job.arrival <= self.now and job.ended is None]
            if not present:
                coming = [job.arrival for job in self.jobs if job.ended is None]
                if not coming:
                    return
                self.now = min(coming)
                continue
            self.shares.tenants({job.tenant for job in present})
            decision = self.policy(self._snapshot(present))
            assert decision is not None, "jobs are there and nothing is done"
            ids = decision.job_ids if isinstance(decision, Advance) else (decision.job_id,)
            chosen = [by_id[job_id] for job_id in ids]
            seconds = self._do(decision, chosen)
            self.quanta.append(Quantum(self.now, seconds, decision))
            self.now += seconds
            both = len({job.interactive for job in present}) == 2
            self.shares.spent(chosen[0].interactive, seconds, both)
            for job in chosen:
                self.shares.charge(job.tenant, seconds / len(chosen))
                if not job.chunks_left:
                    job.ended, job.phase = self.now, Phase.WAITING

    def resident(self) -> list[SimulatedJob]:
        return [job for job in self.jobs if job.phase is not Phase.WAITING and job.ended is None]

    def _snapshot(self, present: Sequence[SimulatedJob]) -> Snapshot:
        return Snapshot(
            tasks=[job.task() for job in present],
            tenant_seconds=self.shares.tenant_seconds,
            batch_is_due=self.shares.batch_is_due,
            state_bytes=self.state_bytes,
            slots_full=sum(job.wears_style for job in self.resident()) >= self.slots,
            most_together=self.most_together,
            step_seconds=lambda shape, rows: self._measured.get((shape, rows)),
        )

    def _do(self, decision: Begin | Advance | DecodeChunk | Evict, jobs: Sequence[SimulatedJob]) -> float:
        job = jobs[0]
        match decision:
            case Begin():
                assert job.phase is Phase.WAITING
                job.phase = Phase.DENOISING if job.steps_left else Phase.DECODING
                job.began = self.now if job.began is None else job.began
                job.since_begin = 0
                held = sum(each.state_bytes for each in self.resident())
                assert not self.state_bytes or held <= self.state_bytes or len(self.resident()) == 1
                assert sum(each.wears_style for each in self.resident()) <= self.slots
                return CONDITION_S
            case Advance():
                assert len({each.shape for each in jobs}) == 1
                assert len({each.interactive for each in jobs}) == 1
                for each in jobs:
                    assert each.phase is Phase.DENOISING
                    each.steps_left -= 1
                    each.since_begin += 1
                    if not each.steps_left:
                        each.phase = Phase.DECODING
                seconds = job.step_seconds * (1 + self.row_share * (len(jobs) - 1))
                self._measured[job.shape, len(jobs)] = seconds
                return seconds
            case DecodeChunk():
                assert job.phase is Phase.DECODING
                job.chunks_left -= 1
                job.since_begin += 1
                return CHUNK_S
            case Evict():
                assert job.since_begin > 0
                job.phase, job.evictions, job.chunks_left = Phase.WAITING, job.evictions + 1, job.chunks
                return 0.01
