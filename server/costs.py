"""What work costs on this machine, learnt from what it did cost; the source of every ETA, deadline and batch size."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Literal

from cinecat.engines.messages import StepShape
from cinecat.v1 import clip_pb2
from cinecat.v1 import job_pb2 as pb

Work = Literal["condition", "step", "decode"]

# Weight of the newest measurement: follows a change within a few jobs, ignores one slow step.
_NEWEST = 0.25

# The first forward of a size allocates what later ones find.
_WARM_UP = 1
_TRIALS = 3
_REMEMBERED = 9


class Costs:
    """Seconds per unit of work, as exponential averages, and of forwards, as medians of the last ones of a size.

    Units: pixel-frames for condition and decode, token-rows for a step (a guided step counts its tokens twice).
    Attention grows faster than tokens do, so an estimate for a size never seen is rough until the first step is done.
    """

    def __init__(self) -> None:
        self._seconds_per_unit: dict[Work, float] = {}
        self._forwards: dict[tuple[StepShape, int], deque[float]] = {}

    def observe(self, work: Work, units: float, seconds: float) -> None:
        rate = seconds / units
        known = self._seconds_per_unit.get(work, rate)
        self._seconds_per_unit[work] = known + _NEWEST * (rate - known)

    def observe_step(self, shape: StepShape, rows: int, seconds: float) -> None:
        """Learns from a step of one or more requests that have so many rows together. A cached step tells nothing: it
        has no tokens to cost.
        """
        if not shape.tokens:
            return
        self.observe("step", shape.tokens * rows, seconds)
        self._forwards.setdefault((shape, rows), deque(maxlen=_REMEMBERED + _WARM_UP)).append(seconds)

    def step_seconds(self, shape: StepShape, rows: int) -> float | None:
        """Of a step with so many rows; None until it was measured often enough to be judged by."""
        known = list(self._forwards.get((shape, rows), ()))[_WARM_UP:]
        return statistics.median(known) if len(known) >= _TRIALS else None

    def seconds(self, work: Work, units: float) -> float | None:
        """None until such work was measured."""
        rate = self._seconds_per_unit.get(work)
        return None if rate is None else rate * units

    def remaining(self, job: pb.Job, step_tokens: Sequence[int]) -> float | None:
        """Seconds of engine time until a job is done, by how far it is. None when there is nothing to judge by.

        Args:
            step_tokens: of every step of the clip; 0 for a cached one, which costs next to nothing.
        """
        clip, progress = job.clip, job.progress
        pixels = pixel_frames(clip)
        waits = job.state in (pb.JOB_STATE_QUEUED, pb.JOB_STATE_CONDITIONING)
        return self._sum(
            condition=pixels if waits else 0,
            step=token_rows(clip, sum(step_tokens[progress.step :])),
            decode=pixels * (1 - progress.frames_decoded / clip.frames),
        )

    def whole(self, clip: clip_pb2.ClipSpec, step_tokens: Sequence[int]) -> float | None:
        """Seconds of engine time of a clip from its beginning to its end; arguments and result as of `remaining`."""
        pixels = pixel_frames(clip)
        return self._sum(condition=pixels, step=token_rows(clip, sum(step_tokens)), decode=pixels)

    def _sum(self, **units: float) -> float | None:
        total = 0.0
        works: tuple[Work, ...] = ("condition", "step", "decode")
        for work in works:
            seconds = self.seconds(work, units[work]) if units[work] else 0.0
            if seconds is None:
                return None
            total += seconds
        return total


def pixel_frames(clip: clip_pb2.ClipSpec) -> int:
    return clip.width * clip.height * clip.frames


def rows_of(clip: clip_pb2.ClipSpec) -> int:
    """Rows of a clip's forwards: guidance takes two."""
    return 2 if clip.guidance_scale > 1.0 else 1


def token_rows(clip: clip_pb2.ClipSpec, tokens: int) -> int:
    """What a clip's forwards run through the denoiser when each has that many tokens."""
    return tokens * rows_of(clip)
