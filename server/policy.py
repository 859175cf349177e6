"""What the engine core does next: a pure function of the jobs that there are.

Interactive jobs come before batch jobs, which keep a small share of the time (`shares.Shares`). Within a class the
tenant that had least is next, and of its jobs the one whose deadline is earliest. So nobody waits for ever: every class
has its share, every tenant in it an equal one, and what arrives later has a later deadline in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from cinecat.engines.messages import StepShape

WORTHWHILE = 0.97
"""Rows go together where one of them takes at most so much of its time alone: less is noise."""

STRETCH = 4.0
"""A deadline is so many times a job's own work after its arrival, so that of two that arrive together the shorter one
is first, and a long one that has waited is not overtaken for ever."""


class Phase(Enum):
    """How far a job is; between its phases it can be left alone for any time."""

    WAITING = "waiting"
    DENOISING = "denoising"
    DECODING = "decoding"


@dataclass(frozen=True, slots=True)
class Task:
    """A job that has something to do.

    Attributes:
        deadline: seconds, on any clock that all tasks share.
        arrival: as the deadline.
        shape: of the coming step; of a waiting job, the one that is expected. None where there is none.
        rows: of a forward that are its.
        steps_left: that run the model, until it is denoised.
        begin_seconds: that letting it in will take; 0 where that is not known.
        state_bytes: that it holds in the core, or will.
        wears_style: whether it needs a style slot.
        alone: it shares no forward with others.
        evictable: it has done enough since it came in that it may be sent out again.
    """

    job_id: str
    tenant: str
    interactive: bool
    deadline: float
    arrival: float
    phase: Phase
    shape: StepShape | None = None
    rows: int = 1
    steps_left: int = 1
    begin_seconds: float = 0.0
    state_bytes: int = 0
    wears_style: bool = False
    alone: bool = False
    evictable: bool = False

    @property
    def resident(self) -> bool:
        return self.phase is not Phase.WAITING


@dataclass(frozen=True)
class Snapshot:
    """What there is to decide from.

    Attributes:
        tasks: in any order.
        tenant_seconds: that each tenant had; 0 for one that is not named.
        batch_is_due: the batch jobs had less than their share.
        state_bytes: that all resident tasks may hold; 0 is no bound. One task is let in whatever it holds.
        slots_full: a job found no free style slot, and none has become free since.
        most_together: jobs in one forward at most.
        step_seconds: of a forward of a shape with so many rows; None until it was measured often enough.
    """

    tasks: Sequence[Task]
    tenant_seconds: Mapping[str, float]
    batch_is_due: bool
    state_bytes: int
    slots_full: bool
    most_together: int
    step_seconds: Callable[[StepShape, int], float | None]


@dataclass(frozen=True)
class Begin:
    """Let a waiting job in: encode its inputs, or take up its checkpoint."""

    job_id: str


@dataclass(frozen=True)
class Advance:
    """One step of these jobs, together."""

    job_ids: tuple[str, ...]


@dataclass(frozen=True)
class DecodeChunk:
    """The next frames of a job."""

    job_id: str


@dataclass(frozen=True)
class Evict:
    """Save a job and send it back to the queue, so that another can come in."""

    job_id: str


Decision: TypeAlias = Begin | Advance | DecodeChunk | Evict
Policy: TypeAlias = Callable[[Snapshot], Decision | None]


def by_step(snapshot: Snapshot) -> Decision | None:
    """The next quantum; None where there is nothing to do.

    A waiting job that outranks all others but finds no room sends out jobs of the class below. Where that does not
    help, no other job comes in before it, and room comes from those that end.
    """
    ranked = sorted(snapshot.tasks, key=lambda task: _rank(task, snapshot))
    resident = [task for task in ranked if task.resident]
    closed_to_all = closed_to_styles = False
    for place, task in enumerate(ranked):
        if task.resident:
            invited = [] if closed_to_all or closed_to_styles else ranked[place + 1 :]
            return _quantum(task, resident, invited, snapshot)
        if closed_to_all or (closed_to_styles and task.wears_style):
            continue
        if task.wears_style and snapshot.slots_full:
            wearer = next((each for each in _victims(task, resident) if each.wears_style), None)
            if wearer is not None:
                return Evict(wearer.job_id)
            closed_to_styles = True
        elif (missing := _missing_bytes(task, resident, snapshot)) > 0:
            victims = _victims(task, resident)
            if sum(victim.state_bytes for victim in victims) >= missing:
                return Evict(victims[0].job_id)
            closed_to_all = True
        else:
            return Begin(task.job_id)
    return None


def first_come(snapshot: Snapshot) -> Decision | None:
    """Whole jobs in the order of their arrival, one at a time: what the step scheduler is measured against."""
    task = min(snapshot.tasks, key=lambda task: (not task.resident, task.arrival, task.job_id), default=None)
    if task is None:
        return None
    return _alone(task) if task.resident else Begin(task.job_id)


POLICIES: Mapping[str, Policy] = {"steps": by_step, "fcfs": first_come}


def _rank(task: Task, snapshot: Snapshot) -> tuple[bool, float, float, float, str]:
    after_the_other_class = task.interactive if snapshot.batch_is_due else not task.interactive
    seconds = snapshot.tenant_seconds.get(task.tenant, 0.0)
    return after_the_other_class, seconds, task.deadline, task.arrival, task.job_id


def _quantum(task: Task, resident: Sequence[Task], invited: Sequence[Task], snapshot: Snapshot) -> Decision:
    """What a resident job does next, in company where that is quicker."""
    if task.phase is Phase.DECODING or task.alone or task.shape is None or _is_cached(task):
        return _alone(task)
    # It costs next to nothing, and brings the other to a step that the two may share.
    for other in resident:
        if other.interactive == task.interactive and other.phase is Phase.DENOISING and _is_cached(other):
            return _alone(other)
    mates = [mate for mate in resident if _may_join(mate, task) and mate.phase is Phase.DENOISING]
    together = [task, *mates]
    if _worth_together(together, snapshot) == len(together):
        guest = next((guest for guest in invited if not guest.resident and _may_join(guest, task)), None)
        fits = guest is not None and _missing_bytes(guest, resident, snapshot) <= 0
        if guest is not None and fits and not (guest.wears_style and snapshot.slots_full):
            wider = [*together, guest]
            if _worth_together(wider, snapshot) == len(wider) and _worth_the_wait(together, guest, snapshot):
                return Begin(guest.job_id)
    count = _worth_together(together, snapshot)
    return Advance(tuple(each.job_id for each in together[:count]))


def _alone(task: Task) -> Decision:
    return DecodeChunk(task.job_id) if task.phase is Phase.DECODING else Advance((task.job_id,))


def _is_cached(task: Task) -> bool:
    """Whether its coming step runs no forward."""
    return task.shape is not None and not task.shape.tokens


def _may_join(other: Task, task: Task) -> bool:
    return (
        other is not task
        and other.interactive == task.interactive
        and other.shape == task.shape
        and not other.alone
        and other.phase is not Phase.DECODING
    )


def _worth_together(tasks: Sequence[Task], snapshot: Snapshot) -> int:
    """How many of these, from the first, go into one forward: as many as take least time each by what was measured. A
    number that was not yet is tried when the one below it was worth it.
    """
    shape = tasks[0].shape
    assert shape is not None
    rows = tasks[0].rows
    alone = snapshot.step_seconds(shape, rows)
    if alone is None:
        return 1
    best, best_rate = 1, WORTHWHILE * alone / rows
    for count, mate in enumerate(tasks[1 : snapshot.most_together], 2):
        rows += mate.rows
        if shape.most_rows and rows > shape.most_rows:
            break
        seconds = snapshot.step_seconds(shape, rows)
        if seconds is None:
            return count if best == count - 1 else best
        if seconds / rows <= best_rate:
            best, best_rate = count, seconds / rows
    return best


def _worth_the_wait(hosts: Sequence[Task], guest: Task, snapshot: Snapshot) -> bool:
    """Whether a guest gains more than all who wait meanwhile lose: each of them for its beginning, and as much as the
    forwards take longer in its company. Of batch jobs only the sum counts, which is always less.
    """
    shape, steps = hosts[0].shape, hosts[0].steps_left
    assert shape is not None
    if not guest.interactive:
        return True
    rows = sum(host.rows for host in hosts)
    alone, before = (snapshot.step_seconds(shape, count) or 0.0 for count in (guest.rows, rows))
    # One that was not measured may cost nothing, or it would never be.
    slower = (snapshot.step_seconds(shape, rows + guest.rows) or before) - before
    return steps * (alone - slower) >= len(hosts) * (guest.begin_seconds + steps * slower)


def _missing_bytes(task: Task, resident: Sequence[Task], snapshot: Snapshot) -> int:
    if not snapshot.state_bytes or not resident:
        return 0
    return sum(each.state_bytes for each in resident) + task.state_bytes - snapshot.state_bytes


def _victims(task: Task, resident: Sequence[Task]) -> list[Task]:
    """Those that may be sent out for a task, the least urgent first."""
    if not task.interactive:
        return []
    return [each for each in reversed(resident) if each.evictable and not each.interactive]
