"""What the tests of the front are built from: a model, its styles, clips, jobs, and a store that can be held up."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry

from cinecat.engines.messages import ModelInfo
from cinecat.plugins.registry import BUNDLED, StyleRegistry
from cinecat.server.checkpoints import Checkpoints
from cinecat.server.inputs import JobInputs
from cinecat.server.jobs import Jobs
from cinecat.server.live_job import LiveJob
from cinecat.server.metrics import Metrics
from cinecat.server.models import describe_model
from cinecat.server.settings import Settings
from cinecat.server.store import JobStore, StoredJob
from cinecat.server.styles import StyleCatalogue
from cinecat.v1 import clip_pb2, models_pb2
from cinecat.v1 import job_pb2 as pb

_SQUARE = tuple(f"attn{n}.{linear}" for n in (1, 2) for linear in ("to_q", "to_k", "to_v", "to_out.0"))
_SIZES = {
    **dict.fromkeys((*_SQUARE, "attn2.add_k_proj", "attn2.add_v_proj"), (256, 256)),
    "ffn.net.0.proj": (256, 768),
    "ffn.net.2": (768, 256),
}
TARGETS = {f"blocks.{block}.{linear}": size for block in range(6) for linear, size in _SIZES.items()}

# From here on nothing happens by itself within a test.
NEVER_S = 3600.0


def model_info(max_rank: int = 32, targets: dict[str, tuple[int, int]] = TARGETS) -> ModelInfo:
    return ModelInfo(
        name="wan-tiny",
        family="wan2.1-i2v-tiny",
        fingerprint="0" * 16,
        device="cpu",
        dtype="float32",
        engine="torch",
        parameters=1,
        weights_bytes=4,
        size_multiple=16,
        max_frames=4093,
        max_size=16384,
        max_rank=max_rank,
        style_targets=targets,
    )


def model(**settings: int) -> models_pb2.Model:
    return describe_model(model_info(), Settings.model_validate(settings))


def catalogue(max_rank: int = 32, targets: dict[str, tuple[int, int]] = TARGETS) -> StyleCatalogue:
    return StyleCatalogue(StyleRegistry([BUNDLED]), model_info(max_rank, targets))


FRAME = np.full((64, 64, 3), 90, np.uint8)

_numbers = itertools.count()


def new_job(job_id: str = "", *, detached: bool = True, request_id: str = "") -> pb.Job:
    """A job as the Generation service hands it over."""
    clip = clip_pb2.ClipSpec(width=64, height=64, frames=5, fps=8, steps=2, guidance_scale=1, seed=1, prompt="a cat")
    clip.tokenization.mode = clip_pb2.Tokenization.UNIFORM
    progress = pb.JobProgress(total_steps=clip.steps, total_frames=clip.frames)
    name = job_id or f"job-{next(_numbers)}"
    return pb.Job(
        job_id=name,
        clip=clip,
        detached=detached,
        request_id=request_id,
        progress=progress,
        priority=pb.PRIORITY_INTERACTIVE,
    )


class ScriptedStore(JobStore):
    """A real store whose writes can be held up, or made to fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.broken = False
        self.broken_once = False

    def hold(self) -> None:
        self.reached.clear()
        self.open.clear()

    def insert(self, stored: StoredJob, first: pb.JobEvent) -> StoredJob | None:
        self._pass()
        return super().insert(stored, first)

    def record(self, transition: pb.JobEvent, attempts: int) -> None:
        self._pass()
        super().record(transition, attempts)

    def _pass(self) -> None:
        self.reached.set()
        assert self.open.wait(30)
        broken, self.broken_once = self.broken or self.broken_once, False
        if broken:
            raise OSError("disk full")


class Front:
    """Jobs over a store in a folder, with metrics of its own."""

    def __init__(self, folder: Path, grace_seconds: float) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.store = ScriptedStore(folder / "jobs.sqlite")
        self.inputs = JobInputs(folder / "inputs")
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.jobs = Jobs(self.store, self.inputs, self.checkpoints, grace_seconds, self.metrics)

    async def accept(self, job: pb.Job, tenant: str = "") -> LiveJob:
        live, _ = await self.jobs.accept(job, FRAME, f"hash of {job.job_id}", tenant=tenant)
        assert live is not None
        return live

    async def reached(self) -> None:
        """Until a write waits in a store that is held up."""
        assert await asyncio.to_thread(self.store.reached.wait, 30)


@asynccontextmanager
async def front(folder: Path, grace_seconds: float = NEVER_S) -> AsyncIterator[Front]:
    """A front that is shut down as the server does it."""
    running = Front(folder, grace_seconds)
    try:
        yield running
    finally:
        running.store.open.set()
        running.jobs.stop_watching()
        await running.jobs.close()


async def move(jobs: Jobs, live: LiveJob, *states: pb.JobState.ValueType) -> None:
    for state in states:
        await jobs.transition(live, state)


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop run until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - any condition, also one that no event tells of
            await asyncio.sleep(0.001)


PATH_TO_SUCCESS = (
    pb.JOB_STATE_CONDITIONING,
    pb.JOB_STATE_DENOISING,
    pb.JOB_STATE_DECODING,
    pb.JOB_STATE_ENCODING,
    pb.JOB_STATE_SUCCEEDED,
)
