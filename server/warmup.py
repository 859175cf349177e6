"""The warm-up: one small clip through the real path, kept out of database, artifacts, metrics and ETAs."""

from __future__ import annotations

import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import structlog
from prometheus_client import CollectorRegistry
from safetensors.numpy import save_file

from cinecat.engines.errors import ModelError
from cinecat.engines.messages import ModelInfo, ResidentStyle
from cinecat.plugins.registry import StyleRegistry
from cinecat.server.artifacts import ArtifactStore
from cinecat.server.checkpoints import Checkpoints
from cinecat.server.core import Core
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.core_process import succeeded
from cinecat.server.costs import Costs
from cinecat.server.inputs import JobInputs
from cinecat.server.jobs import Jobs
from cinecat.server.metrics import Metrics
from cinecat.server.patience import Patience
from cinecat.server.render import CheckpointRule, Renderer
from cinecat.server.replica import Replica
from cinecat.server.store import JobStore
from cinecat.server.styles import StyleCatalogue
from cinecat.v1 import clip_pb2, job_pb2, models_pb2

_FRAMES = 5
_STEPS = 2

log = structlog.get_logger(__name__)


async def warm_up(core: Core, info: ModelInfo, model: models_pb2.Model) -> tuple[ResidentStyle, ...]:
    """Renders a clip of the smallest size, with guidance and a style made for the purpose.

    Returns:
        What is left in the style slots.

    Raises:
        ModelError: the clip failed; requests would too.
    """
    started = time.perf_counter()
    clip = clip_pb2.ClipSpec()
    clip.CopyFrom(model.defaults)
    clip.width = clip.height = model.limits.min_size
    clip.frames, clip.steps, clip.guidance_scale, clip.seed, clip.prompt = _FRAMES, _STEPS, 2.0, 0, "warm-up"
    with (
        tempfile.TemporaryDirectory(prefix="cinecat-warmup-") as scratch,
        structlog.contextvars.bound_contextvars(warm_up=True),
    ):
        folder = Path(scratch)
        style = _write_style(folder / "styles" / "warm-up", info)
        clip.styles.add(name=style, version="1.0.0", strength=1.0)
        catalogue = StyleCatalogue(StyleRegistry([folder / "styles"]), info)
        metrics = Metrics(CollectorRegistry())
        inputs = JobInputs(folder / "inputs")
        artifacts = ArtifactStore(str(folder / "artifacts"))
        checkpoints = Checkpoints(folder / "checkpoints")
        jobs = Jobs(JobStore(folder / "jobs.sqlite"), inputs, checkpoints, 0.0, metrics)
        rule = CheckpointRule(steps=_STEPS, seconds=0.0)
        renderer = Renderer(model, jobs, catalogue, inputs, artifacts, checkpoints, rule, metrics, Costs(), Patience())
        replica = Replica(core, CoreGauges(metrics), catalogue.activity)
        # The first preview fits a map to the VAE.
        previews = job_pb2.Previews(every_steps=1)
        job = job_pb2.Job(job_id=uuid.uuid4().hex, clip=clip, detached=True, previews=previews)
        live, _ = await jobs.accept(job, np.full((clip.height, clip.width, 3), 127, dtype=np.uint8), "")
        assert live is not None
        try:
            rendering = renderer.take(live)
            rendering.replica = replica
            await rendering.begin()
            while rendering.next is not None:
                stepped = await renderer.step([rendering])
                rendering.stepped(succeeded(stepped.requests[0]), stepped.seconds)
                await rendering.save_if_due()
            while not rendering.decoded:
                await rendering.decode()
            await rendering.leave_core()
            await rendering.finish()
        except Exception as error:
            raise ModelError(f"the warm-up failed: {error}") from error
        finally:
            await jobs.close()
    log.info("warm", seconds=round(time.perf_counter() - started, 2))
    return replica.resident


def _write_style(folder: Path, info: ModelInfo) -> str:
    """A style of rank 1 that changes nothing, since none that is installed needs to fit the model. Returns its name."""
    target, (in_features, out_features) = next(iter(info.style_targets.items()))
    folder.mkdir(parents=True)
    factors = {
        f"transformer.{target}.lora_A.weight": np.ones((1, in_features), dtype=np.float32),
        f"transformer.{target}.lora_B.weight": np.zeros((out_features, 1), dtype=np.float32),
    }
    save_file(factors, folder / "weights.safetensors")
    (folder / "style.toml").write_text(
        'name = "warm-up"\nversion = "1.0.0"\ntitle = "Warm-up"\n'
        f'base_model = "{info.family}"\nweights = "weights.safetensors"\n'
    )
    return folder.name
