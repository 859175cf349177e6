"""One job's way through an engine core: condition, steps, decode, and its files."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from cinecat.engines.errors import CoreDied, EngineError
from cinecat.engines.messages import (
    VAE_TEMPORAL_STRIDE,
    Cat,
    Condition,
    Conditioned,
    Decode,
    Decoded,
    Release,
    Released,
    RequestStepped,
    Save,
    Saved,
    Shot,
    StageTime,
    Step,
    Stepped,
    StepShape,
)
from cinecat.engines.tokens.budget import step_tokens
from cinecat.engines.tokens.grid import Grid
from cinecat.server import previews
from cinecat.server.artifacts import ArtifactStore
from cinecat.server.checkpoints import Checkpoints
from cinecat.server.clip_files import ClipFiles, frame_dtype
from cinecat.server.core import Core
from cinecat.server.core_process import FrameBuffer
from cinecat.server.costs import Costs, pixel_frames, rows_of
from cinecat.server.inputs import JobInputs
from cinecat.server.jobs import Jobs
from cinecat.server.live_job import LiveJob, StepRecord
from cinecat.server.metrics import Metrics
from cinecat.server.models import run_steps_of, token_grid
from cinecat.server.patience import Patience
from cinecat.server.policy import Phase
from cinecat.server.profiles import next_profile, note_profile
from cinecat.server.replica import Replica
from cinecat.server.styles import StyleCatalogue
from cinecat.server.tally import Tally
from cinecat.v1 import clip_pb2, models_pb2
from cinecat.v1 import job_pb2 as pb

if TYPE_CHECKING:
    from cinecat.server.lifecycle import State

# At the end of denoising a checkpoint is worth its time when more work than this would be lost.
_WORTH_SAVING_S = 1.0


class Stopped(Exception):
    """The job was cancelled and its work has stopped."""


@dataclass
class _Seen:
    """What there was of a clip so far, of which only the first is measured."""

    estimate: bool = False
    frames: bool = False


@dataclass(frozen=True)
class CheckpointRule:
    """When a running job is saved: after so many steps, or so many seconds of them, whichever is first."""

    steps: int
    seconds: float


@dataclass(frozen=True)
class Renderer:
    """What every rendering of a model works with, whichever replica it is on."""

    model: models_pb2.Model
    jobs: Jobs
    catalogue: StyleCatalogue
    inputs: JobInputs
    artifacts: ArtifactStore
    checkpoints: Checkpoints
    rule: CheckpointRule
    metrics: Metrics
    costs: Costs
    patience: Patience
    profile_dir: Path | None = None

    def take(self, live: LiveJob) -> Rendering:
        """What takes a queued job through a core."""
        return Rendering(self, live)

    async def step(self, renderings: Sequence[Rendering]) -> Stepped:
        """One step of renderings on one replica, whose coming steps have one shape; what it answers goes to
        `Rendering.stepped`.

        Raises:
            EngineError, CoreDied: the forward failed, and no rendering has changed.
        """
        shape = renderings[0].next
        assert shape is not None
        for rendering in renderings:
            await rendering.denoising()
        wanted = frozenset(each.live.job_id for each in renderings if each.wants_preview)
        ids = tuple(each.live.job_id for each in renderings)
        path = next_profile(self.profile_dir, renderings[0].live) if len(renderings) == 1 and shape.tokens else ""
        stepped = await renderings[0].core.call(Step(ids, wanted, path), Stepped)
        if path:
            await note_profile(renderings[0].live, path)
        else:
            self.costs.observe_step(shape, sum(each.rows for each in renderings), stepped.seconds)
        self.metrics.stepped([each.live.job.clip for each in renderings], shape, stepped)
        return stepped


class Rendering:
    """One job on its way through an engine core, one call to the core at a time.

    `begin`, then `Renderer.step` while there is a `next`, `decode` until `decoded`, `leave_core` and `finish`. Between
    two of them the scheduler may do something else, or nothing ever again after `abandon`; after `suspend` it begins
    anew from the checkpoint.

    Attributes:
        replica: that has it; None while it waits for one.
        phase: how far it is.
        next: shape of the coming step; None where all are done, or it is not in the core.
        state_bytes: that it holds in the core; 0 until that was seen once.
        alone: it shares no forward: one that it shared failed, or killed the core.
        steps_in_core: since it came in.
    """

    def __init__(self, renderer: Renderer, live: LiveJob) -> None:
        self.live = live
        self.replica: Replica | None = None
        self.phase = Phase.WAITING
        self.next: StepShape | None = None
        self.rows = rows_of(live.job.clip)
        self.state_bytes = 0
        self.alone = False
        self.steps_in_core = 0
        self._renderer = renderer
        self._tally = Tally()
        self._seen = _Seen()
        self._keep_ratio = live.job.clip.tokenization.keep_ratio or 1.0  # that the core holds the clip to
        self._saved_step = self._tried_step = 0
        self._save_failed = False
        self._unsaved_seconds = 0.0
        self._files: ClipFiles | None = None
        self._buffer: FrameBuffer | None = None
        self._working: asyncio.Task[None] | None = None

    @property
    def in_core(self) -> bool:
        """Whether a core holds its state."""
        return self.phase is not Phase.WAITING

    @property
    def core(self) -> Core:
        """Of its replica."""
        assert self.replica is not None
        return self.replica.core

    @property
    def styles(self) -> frozenset[str]:
        """Fingerprints of what it wears."""
        return frozenset(style.fingerprint for style in self.live.job.clip.styles if style.strength)

    @property
    def engine(self) -> str:
        """The backend of its steps; while it waits, of those that would begin now."""
        return self._tally.engine if self.in_core else self._renderer.model.engine

    @property
    def decoded(self) -> bool:
        """All frames are."""
        return self.live.job.progress.frames_decoded == self.live.job.clip.frames

    @property
    def can_be_saved(self) -> bool:
        """Whether its checkpoints reach the disk, as far as was tried."""
        return not self._save_failed

    @property
    def wants_preview(self) -> bool:
        """Whether the coming step is one that the request wants to see."""
        every, step = self.live.job.previews.every_steps, self.live.job.progress.step + 1
        return every > 0 and step % every == 0

    def expected_tokens(self) -> tuple[int, ...]:
        """Tokens of every step, as far as can be told now."""
        clip = self.live.job.clip
        grid = token_grid(self._renderer.model, clip)
        return _step_tokens(grid, clip.steps, self._keep_ratio, run_steps_of(clip))

    async def begin(self) -> None:
        """Encodes the inputs in its replica's core, and takes up the checkpoint where there is one.

        Raises:
            Stopped: the job was cancelled.
            RequestError, UnknownStyle, EngineError, CoreDied: it failed.
        """
        self._stop_if_asked()
        r, live, clip, replica = self._renderer, self.live, self.live.job.clip, self.replica
        assert replica is not None
        if clip.model != r.model.name:
            raise EngineError(f"the job was accepted for the model {clip.model}, which this server no longer has")
        await self._move(pb.JOB_STATE_CONDITIONING)
        waited = (live.job.start_time.ToMicroseconds() - live.job.create_time.ToMicroseconds()) / 1e6
        shot = Shot(
            job_id=live.job_id,
            image=await asyncio.to_thread(r.inputs.load, live.job_id),
            prompt=clip.prompt,
            negative_prompt=clip.negative_prompt,
            frames=clip.frames,
            steps=clip.steps,
            guidance_scale=clip.guidance_scale,
            seed=clip.seed,
            styles=await asyncio.to_thread(r.catalogue.uses, clip.styles, r.inputs.weights),
            shift=clip.shift if clip.HasField("shift") else None,
            cat=_cat(clip.tokenization),
            run_steps=run_steps_of(clip),
        )
        self._stop_if_asked()
        conditioned = await replica.core.call(Condition(shot, str(r.checkpoints.path(live.job_id))), Conditioned)
        replica.resident = conditioned.resident
        for news in conditioned.news:
            replica.gauges.tell(news)
        replica.gauges.slots(len(conditioned.resident), conditioned.slots)
        replica.gauges.memory(conditioned.memory)
        if r.model.engine != conditioned.engine:
            r.model.engine = conditioned.engine
            r.metrics.loaded(r.model)
        if not self._tally.timings:
            self._tally.timings += [StageTime("queue", max(0.0, waited)), *conditioned.timings]
            for style in shot.styles:
                r.catalogue.activity.used(style.fingerprint)
        live.job.notes.extend(note for note in conditioned.notes if note not in live.job.notes)
        if not any(timing.cached for timing in conditioned.timings):
            r.costs.observe("condition", pixel_frames(clip), sum(timing.seconds for timing in conditioned.timings))
        self._take_in(conditioned)

    def _take_in(self, conditioned: Conditioned) -> None:
        tally, progress = self._tally, self.live.job.progress
        tally.engine, tally.tokens_uniform = conditioned.engine, conditioned.tokens_uniform
        tally.step_tokens = list(conditioned.step_tokens)
        progress.step = self._saved_step = self._tried_step = len(conditioned.step_tokens)
        progress.frames_decoded = 0
        self.rows, self.next, self._keep_ratio = conditioned.rows, conditioned.next, conditioned.keep_ratio
        self.state_bytes = conditioned.state_bytes + conditioned.decode_bytes
        self.steps_in_core, self._unsaved_seconds = 0, 0.0
        self.phase = Phase.DENOISING if self.next is not None else Phase.DECODING
        if progress.step:
            self._renderer.metrics.resumes.inc()
            self.live.log.info("job resumed", step=progress.step)

    async def denoising(self) -> None:
        """Says that the coming step is about to begin."""
        if self.live.job.state == pb.JOB_STATE_CONDITIONING:
            await self._move(pb.JOB_STATE_DENOISING)

    def stepped(self, done: RequestStepped, seconds: float) -> None:
        """Takes note of a step.

        Args:
            seconds: of the forward that it was part of.
        """
        tally, progress = self._tally, self.live.job.progress
        tally.step_tokens.append(done.tokens)
        uniform = tally.tokens_uniform
        self._renderer.metrics.denoised(self.live.job.clip, self.rows * done.tokens, self.rows * uniform)
        self.live.steps.append(StepRecord(done.step, done.tokens, seconds, time.time_ns()))
        tally.plan_seconds += done.plan_seconds
        tally.denoise_seconds += seconds - done.plan_seconds
        self._unsaved_seconds += seconds
        self._keep_ratio, self.next = done.keep_ratio, done.next
        self.steps_in_core += 1
        progress.step = done.step
        if self.next is None:
            self.phase = Phase.DECODING

    async def show(self, done: RequestStepped) -> None:
        """Sends the watchers the preview of a step, if it has one."""
        if (pictures := done.preview) is not None:
            await self._aside(self._show(lambda: previews.estimate(done.step, pictures)))
            if not self._seen.estimate:
                self._seen.estimate = True
                self._renderer.metrics.first_preview(self.live.job)

    async def save_if_due(self) -> None:
        """Has the state saved where the rule says so. Raises CoreDied."""
        if self._is_due():
            await self._save()

    def _is_due(self) -> bool:
        rule, steps = self._renderer.rule, self.live.job.progress.step - self._tried_step
        at_end = self.next is None and self._unsaved_seconds >= _WORTH_SAVING_S
        return steps >= rule.steps or self._unsaved_seconds >= rule.seconds or at_end

    async def _save(self) -> bool:
        """Whether that went well. A checkpoint that cannot be written is a loss after a crash, no reason to fail."""
        r, live = self._renderer, self.live
        self._tried_step, self._unsaved_seconds = live.job.progress.step, 0.0
        try:
            saved = await self.core.call(Save(live.job_id, str(r.checkpoints.path(live.job_id))), Saved)
        except CoreDied:
            raise
        except EngineError as error:
            live.log.error("no checkpoint", step=live.job.progress.step, error=f"{error}")
            self._save_failed = True
            return False
        r.metrics.checkpoint_seconds.observe(saved.seconds)
        self._saved_step, self._save_failed = self._tried_step, False
        await r.jobs.got_on(live)
        return True

    async def decode(self) -> None:
        """Decodes the next chunk of frames.

        Raises:
            Stopped: the job was cancelled.
            EngineError, CoreDied, ArtifactError: it failed.
        """
        self._stop_if_asked()
        await self.denoising()
        r, live, clip, replica = self._renderer, self.live, self.live.job.clip, self.replica
        assert replica is not None
        if live.job.state == pb.JOB_STATE_DENOISING:
            await self._move(pb.JOB_STATE_DECODING)
            self._files = await asyncio.to_thread(ClipFiles, r.artifacts, live.job_id, clip, self._tally.engine)
            self._buffer = FrameBuffer(clip.height, clip.width, VAE_TEMPORAL_STRIDE, frame_dtype(clip))
        buffer = self._buffer
        assert buffer is not None
        decoded = await replica.core.call(Decode(live.job_id, buffer.name, buffer.dtype), Decoded)
        self._tally.decode_seconds += decoded.seconds
        replica.gauges.memory(decoded.memory)
        r.metrics.communicated(decoded)
        if not self._seen.frames:
            self._seen.frames = True
            r.metrics.first_frame(live.job)
        r.costs.observe("decode", clip.width * clip.height * decoded.count, decoded.seconds)
        frames = await asyncio.to_thread(buffer.frames, decoded)
        await self._aside(self._write(decoded.first, frames))
        live.job.progress.frames_decoded = decoded.first + decoded.count

    async def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Does work while the core goes on; what was begun before is waited for."""
        if self._working is not None:
            await self._working
        self._working = asyncio.create_task(work)

    async def _write(self, first: int, frames: NDArray[Any]) -> None:
        new = frames[max(0, self.live.frames_shown - first) :]
        if self.live.job.previews.frames and len(new):
            index = first + len(frames) - len(new)
            await self._show(lambda: previews.decoded(index, new))
            self.live.frames_shown = first + len(frames)
        assert self._files is not None
        await asyncio.to_thread(self._files.write, frames)

    async def _show(self, draw: Callable[[], pb.Preview]) -> None:
        """A picture that cannot be drawn is no reason to fail the clip."""
        try:
            preview = await asyncio.to_thread(draw)
        except Exception as error:
            self.live.log.error("no preview", exc_info=error)
        else:
            self._renderer.jobs.progress(self.live, preview)

    async def suspend(self) -> bool:
        """Saves the state and leaves the core; the next `begin` goes on from there. False where it cannot be saved, and
        the job stays.

        Raises:
            Stopped: the job was cancelled.
            CoreDied: before the state was saved.
        """
        self._stop_if_asked()
        if self.live.job.progress.step > self._saved_step and not await self._save():
            return False
        await self.abandon()
        self._stop_if_asked()
        return True

    async def leave_core(self) -> None:
        """Frees the core's state of this job; where the core is gone, so is the state. Does not raise."""
        self.phase, self.next = Phase.WAITING, None
        with self._logged():
            if self._buffer is not None:
                buffer, self._buffer = self._buffer, None
                buffer.close()
        if self.replica is not None:
            with self._logged(), contextlib.suppress(EngineError):
                await self.core.call(Release(self.live.job_id), Released)

    async def abandon(self) -> None:
        """Gives up: leaves the core, and no file behind but the checkpoint. Does not raise."""
        await self.leave_core()
        if self._working is not None:
            await asyncio.wait([self._working])
            self._working.exception()  # which nobody will ask for
            self._working = None
        with self._logged():
            if self._files is not None:
                files, self._files = self._files, None
                await asyncio.to_thread(files.remove)

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        """Whatever fails while cleaning up, the rest is cleaned up, and the server goes on."""
        try:
            yield
        except Exception as error:
            self.live.log.error("clean-up failed", exc_info=error)

    async def _move(self, state: State, change: Callable[[pb.Job], object] | None = None) -> None:
        """Raises NotStored."""
        jobs, live = self._renderer.jobs, self.live
        await self._renderer.patience.until_stored(live.job_id, lambda: jobs.transition(live, state, change))

    async def finish(self) -> None:
        """Completes and publishes the files, and ends the job. Needs no core.

        Raises:
            Stopped: the job was cancelled.
            ArtifactError: a file could not be written or published.
        """
        r, live, tally = self._renderer, self.live, self._tally
        assert self._files is not None
        if self._working is not None:
            await self._working
        self._stop_if_asked()
        await self._move(pb.JOB_STATE_ENCODING)
        published = await asyncio.to_thread(self._files.publish)
        tally.complete(live.job.clip, self._files.seconds)
        result = tally.result(live.job.clip, published)
        await self._move(pb.JOB_STATE_SUCCEEDED, lambda job: job.result.CopyFrom(result))
        for timing in tally.timings:
            r.metrics.stage(timing)

    def _stop_if_asked(self) -> None:
        if self.live.stop_requested:
            raise Stopped


@lru_cache(maxsize=1024)
def _step_tokens(grid: Grid, steps: int, keep_ratio: float, run_steps: int | None) -> tuple[int, ...]:
    return step_tokens(grid, steps, keep_ratio, run_steps)


def _cat(tokenization: clip_pb2.Tokenization) -> Cat | None:
    if tokenization.mode != clip_pb2.Tokenization.CAT:
        return None
    if tokenization.WhichOneof("budget") == "keep_ratio":
        return Cat(keep_ratio=tokenization.keep_ratio)
    return Cat(target_psnr_db=tokenization.target_psnr_db)
