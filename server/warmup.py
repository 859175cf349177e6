"""The warm-up: one small clip through the real path, kept out of database, artifacts, metrics and ETAs."""

from __future__ import annotations

import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import structlog
from prometheus_client import CollectorRegistry

from cinecat.engines.errors import ModelError
from cinecat.server.artifacts import ArtifactStore
from cinecat.server.core_process import CoreProcess
from cinecat.server.costs import Costs
from cinecat.server.inputs import JobInputs
from cinecat.server.jobs import Jobs
from cinecat.server.metrics import Metrics
from cinecat.server.render import Renderer
from cinecat.server.store import JobStore
from cinecat.server.styles import StyleCatalogue
from cinecat.v1 import clip_pb2, job_pb2, models_pb2

_FRAMES = 5
_STEPS = 2

log = structlog.get_logger(__name__)


async def warm_up(core: CoreProcess, model: models_pb2.Model, catalogue: StyleCatalogue) -> None:
    """Renders a clip of the smallest size with guidance and, where one fits, a style.

    Raises:
        ModelError: the clip failed; requests would too.
    """
    started = time.perf_counter()
    clip = clip_pb2.ClipSpec()
    clip.CopyFrom(model.defaults)
    clip.width = clip.height = model.limits.min_size
    clip.frames, clip.steps, clip.guidance_scale, clip.seed, clip.prompt = _FRAMES, _STEPS, 2.0, 0, "warm-up"
    style = next((style for style in catalogue.styles() if not catalogue.incompatibility(style)), None)
    if style is not None:
        clip.styles.add(name=style.manifest.name, version=style.manifest.version, strength=1.0)
    with (
        tempfile.TemporaryDirectory(prefix="cinecat-warmup-") as scratch,
        structlog.contextvars.bound_contextvars(warm_up=True),
    ):
        folder = Path(scratch)
        metrics = Metrics(CollectorRegistry())
        inputs = JobInputs(folder / "inputs")
        artifacts = ArtifactStore(str(folder / "artifacts"))
        jobs = Jobs(JobStore(folder / "jobs.sqlite"), inputs, 0.0, metrics)
        renderer = Renderer(core, model.engine, jobs, catalogue, inputs, artifacts, metrics, Costs())
        job = job_pb2.Job(job_id=uuid.uuid4().hex, clip=clip, detached=True)
        live, _ = await jobs.accept(job, np.full((clip.height, clip.width, 3), 127, dtype=np.uint8), "")
        assert live is not None
        try:
            rendered = await renderer.render(live)
            await rendered.finish()
        except Exception as error:
            raise ModelError(f"the warm-up failed: {error}") from error
        finally:
            await jobs.close()
    log.info("warm", seconds=round(time.perf_counter() - started, 2), style=style.manifest.name if style else None)
