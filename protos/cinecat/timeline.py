"""Where the time of one job went, from its events and its result."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby

from cinecat.clip import Job, moment
from cinecat.states import JobState
from cinecat.v1 import job_pb2

HISTORY_S = 2.0
"""How long the events of a job that still runs are listened to for those that lie in the past."""

_ENCODERS = ("text_encode", "image_encode", "vae_encode")
_COMPUTED = {JobState.DENOISING: "denoise", JobState.DECODING: "vae_decode", JobState.ENCODING: "mux"}


@dataclass(frozen=True)
class Moment:
    """A job as it was at `time`, in UTC."""

    time: datetime
    state: JobState
    step: int = 0
    frames_decoded: int = 0
    wait_reason: str = ""


@dataclass(frozen=True)
class Span:
    """Seconds from `start_s` after acceptance on. `part_of` names the state that a stage belongs to; it is empty where
    this is a state.
    """

    name: str
    start_s: float
    seconds: float
    note: str = ""
    part_of: str = ""


@dataclass(frozen=True)
class Timeline:
    """The states of a job end to end, in `total_s` seconds up to its end or until now, and stages within them."""

    total_s: float
    spans: tuple[Span, ...]


def moments_from(events: Iterable[job_pb2.JobEvent]) -> tuple[Moment, ...]:
    """The moments that events tell of, in their order; those without a time are left out."""
    found = []
    for event in events:
        time, progress = moment(event, "time"), event.job.progress
        if time is not None:
            state = JobState.from_proto(event.job.state)
            found.append(Moment(time, state, progress.step, progress.frames_decoded, progress.wait_reason))
    return tuple(found)


def timeline(job: Job, history: Sequence[Moment]) -> Timeline:
    """Lays out what a job went through. Clocks that were set back meanwhile make a state short, none negative."""
    if not history:
        return Timeline(0.0, ())
    origin = job.create_time or history[0].time
    offsets: list[float] = []
    for each in history:
        offsets.append(max(0.0, (each.time - origin).total_seconds(), *offsets[-1:]))
    # The first state began with the job.
    offsets[0] = 0.0
    total = offsets[-1]
    groups = [list(group) for _, group in groupby(range(len(history)), lambda index: history[index].state)]
    spans: list[Span] = []
    for number, group in enumerate(groups):
        first, last = history[group[0]], history[group[-1]]
        if first.state.is_final:
            break
        start = offsets[group[0]]
        following = history[groups[number + 1][0]] if number + 1 < len(groups) else last
        end = offsets[groups[number + 1][0]] if number + 1 < len(groups) else total
        note = _note([history[index] for index in group], following, again=number > 0)
        spans.append(Span(str(first.state), start, end - start, note))
    return Timeline(total, tuple(_with_stages(job, spans)))


def _note(moments: Sequence[Moment], following: Moment, *, again: bool) -> str:
    state, step = moments[0].state, moments[0].step
    if state is JobState.QUEUED:
        reasons = [each.wait_reason for each in moments if each.wait_reason]
        return reasons[-1] if reasons else "again: the engine core or the server had stopped" if again else ""
    if state is JobState.DENOISING and following.step > step:
        return f"steps {step + 1} to {following.step}"
    if state is JobState.CONDITIONING and following.step and following.state is not JobState.QUEUED:
        return f"goes on from step {following.step}"
    return ""


def _with_stages(job: Job, states: Sequence[Span]) -> list[Span]:
    """Adds what is known of the stages once a job has succeeded: those before the first step one after another, in the
    state that has room for them; of the others, what was computed, as a note.
    """
    if job.clip is None:
        return list(states)
    timings, cached = job.clip.timings, job.clip.cached
    encoders = [name for name in _ENCODERS if name in timings]
    needed = sum(timings[name] for name in encoders)
    encoding = [number for number, span in enumerate(states) if span.name == JobState.CONDITIONING]
    home = next((number for number in encoding if states[number].seconds >= needed), encoding[-1] if encoding else None)
    last = {span.name: number for number, span in enumerate(states)}
    spans: list[Span] = []
    for number, span in enumerate(states):
        stage = next((stage for state, stage in _COMPUTED.items() if state == span.name), "")
        if stage in timings and last[span.name] == number:
            computed = f"{timings[stage]:.3f} s of {stage}"
            if stage == "denoise" and timings.get("plan"):
                computed += f", {timings['plan']:.3f} s of plan"
            span = Span(span.name, span.start_s, span.seconds, "; ".join(filter(None, (span.note, computed))))
        spans.append(span)
        if number == home:
            start, end = span.start_s, span.start_s + span.seconds
            for name in encoders:
                seconds = min(timings[name], max(0.0, end - start))
                spans.append(Span(name, start, seconds, "cached" if name in cached else "", span.name))
                start += seconds
    return spans
