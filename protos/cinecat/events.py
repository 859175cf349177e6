"""What a watcher of a job sees, in order: `Progress` any number of times, then one `Finished`."""

from dataclasses import dataclass
from datetime import datetime

from cinecat.clip import Clip, clip_from_proto, eta_seconds, job_error, moment
from cinecat.previews import Preview, preview_from_proto
from cinecat.states import JobState
from cinecat.v1 import job_pb2


@dataclass(frozen=True, kw_only=True)
class Event:
    """A moment in a job's life. `sequence` grows from event to event; numbers may be skipped. `time` is in UTC."""

    sequence: int
    job_id: str
    state: JobState
    time: datetime | None


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """The job is under way: denoising steps and decoded frames, done and in total; jobs ahead of it (0 once it runs);
    the seconds until the clip can be fetched, None while the server cannot tell; and why it waits when it is not for
    the jobs ahead of it, else "". `preview` holds the pictures that are new, where the request asked for some: an
    estimate may be skipped like any progress; each decoded frame comes, in order, and may come again after a restart of
    the server.
    """

    step: int
    total_steps: int
    frames_decoded: int
    total_frames: int
    queue_position: int
    eta_seconds: float | None
    wait_reason: str = ""
    preview: Preview | None = None


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """The job has succeeded and `clip` is what it made. Always the last event."""

    clip: Clip


def event_from_proto(message: job_pb2.JobEvent) -> Progress | Finished:
    """The event in `message`. Raises JobFailed or JobCancelled when that is what the message says."""
    job = message.job
    state = JobState.from_proto(job.state)
    time = moment(message, "time")
    if state is JobState.SUCCEEDED:
        clip = clip_from_proto(job)
        return Finished(sequence=message.sequence, job_id=job.job_id, state=state, time=time, clip=clip)
    if state.is_final:
        raise job_error(job)
    return Progress(
        sequence=message.sequence,
        job_id=job.job_id,
        state=state,
        time=time,
        step=job.progress.step,
        total_steps=job.progress.total_steps,
        frames_decoded=job.progress.frames_decoded,
        total_frames=job.progress.total_frames,
        queue_position=job.progress.queue_position,
        eta_seconds=eta_seconds(job.progress),
        wait_reason=job.progress.wait_reason,
        preview=preview_from_proto(message),
    )
