"""Shows the events of a job while it runs, on stderr: a bar on a terminal, a line per state elsewhere."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cinecat import events
from cinecat.cli.output import say
from cinecat.states import JobState


class ProgressDisplay:
    """Give it every event; use it as a context manager. `quiet` leaves out the lines where there is no terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._shown = (JobState.UNKNOWN, "")
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("connecting", total=None, detail="")

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: events.Event) -> None:
        if self._bar is not None:
            self._move(self._bar, event)
        elif _stage(event) != self._shown and not self._quiet:
            say(_line(event))
        self._shown = _stage(event)

    def _move(self, bar: Progress, event: events.Event) -> None:
        if not isinstance(event, events.Progress):
            return
        done, total = _counts(event)
        bar.update(self._task, description=str(event.state), completed=done, total=total or None, detail=_detail(event))


def _stage(event: events.Event) -> tuple[JobState, str]:
    """What is told in a line of its own when it changes."""
    return event.state, event.wait_reason if isinstance(event, events.Progress) else ""


def _counts(event: events.Progress) -> tuple[int, int]:
    if event.state is JobState.DENOISING:
        return event.step, event.total_steps
    if event.state in (JobState.DECODING, JobState.ENCODING):
        return event.frames_decoded, event.total_frames
    return 0, 0


def _detail(event: events.Progress) -> str:
    done, total = _counts(event)
    unit = "step" if event.state is JobState.DENOISING else "frame"
    parts = [f"{unit} {done}/{total}"] if total else []
    if event.state is JobState.QUEUED and event.queue_position:
        parts.append(f"{event.queue_position} ahead")
    if event.wait_reason:
        parts.append(event.wait_reason)
    if event.eta_seconds is not None:
        minutes, seconds = divmod(round(event.eta_seconds), 60)
        parts.append(f"ETA {minutes}:{seconds:02d}")
    return ", ".join(parts)


def _line(event: events.Event) -> str:
    detail = _detail(event) if isinstance(event, events.Progress) else ""
    return f"job {event.job_id}: {event.state}" + (f" ({detail})" if detail else "")
