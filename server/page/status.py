"""What the page shows: the server's state as JSON, with jobs, styles and models in the wire contract's own form."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from prometheus_client import Counter, Histogram

from cinecat.server.artifacts import ArtifactStore
from cinecat.server.fleet import Fleet
from cinecat.server.jobs import Jobs
from cinecat.server.lifecycle import FINAL_STATES
from cinecat.server.live_job import LiveJob
from cinecat.server.metrics import PRIORITIES, Metrics, priority_name
from cinecat.server.page.keys import Viewer
from cinecat.server.services.generation import GenerationService
from cinecat.server.services.styles import StylesService
from cinecat.server.store import JobFilter
from cinecat.v1 import job_pb2 as pb
from cinecat.v1 import styles_pb2

_RECENT = 12
_UNFINISHED = 50
_STYLES = 100
_FRESH_S = 0.5


@dataclass(frozen=True)
class Served:
    """What the page shows and asks of a server that has loaded its models."""

    jobs: Jobs
    generation: GenerationService
    styles: StylesService
    fleet: Fleet
    artifacts: ArtifactStore
    metrics: Metrics


class Statuses:
    """Gathered once for all of a tenant who ask at the same time, and for those without a key at most twice a second,
    however many they are and however often they ask: the store works for jobs first.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._kept: dict[str, tuple[float, asyncio.Future[dict[str, Any]]]] = {}

    async def of(self, viewer: Viewer) -> dict[str, Any]:
        """Everything that a viewer may know."""
        now = asyncio.get_running_loop().time()
        asked_at, asked = self._kept.get(viewer.tenant, (0.0, None))
        if asked is None or (asked.done() and (viewer.may_act or now - asked_at > _FRESH_S)):
            asked = asyncio.ensure_future(status(self._served, viewer))
            self._kept[viewer.tenant] = now, asked
        return await asyncio.shield(asked)  # who asked first may leave first


async def status(served: Served, viewer: Viewer) -> dict[str, Any]:
    """Everything that a viewer may know: numbers of all, jobs of their own tenant."""
    unfinished = served.jobs.unfinished
    own = sorted((live for live in unfinished if live.tenant == viewer.tenant), key=_order)
    wanted = JobFilter(states=sorted(FINAL_STATES), tenant=viewer.tenant)
    recent, styles, throughput = await asyncio.gather(
        served.jobs.page(_RECENT, None, wanted),
        served.styles.page(styles_pb2.ListStylesRequest(page_size=_STYLES)),
        asyncio.to_thread(_throughput, served.metrics),
    )
    queued = [priority_name(live.known) for live in unfinished if live.known.state == pb.JOB_STATE_QUEUED]
    return {
        "models": [as_json(model) for model in served.fleet.models],
        "queue": {priority: queued.count(priority) for priority in PRIORITIES},
        "running": len(unfinished) - len(queued),
        "jobs": [_unfinished(live) for live in own[:_UNFINISHED]],
        "others": len(unfinished) - len(own),
        "recent": [as_json(job) for job in recent],
        "styles": [as_json(style) for style in styles.styles],
        "throughput": throughput,
    }


def as_json(message: Message) -> dict[str, Any]:
    """proto3's JSON mapping, with the names of the .proto files."""
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found


def _order(live: LiveJob) -> tuple[bool, int]:
    job = live.known
    return job.state == pb.JOB_STATE_QUEUED, job.progress.queue_position


def _unfinished(live: LiveJob) -> dict[str, Any]:
    found: dict[str, Any] = {"job": as_json(live.known)}
    if (picture := live.picture) is not None:
        found["picture"] = base64.b64encode(picture.webp).decode()
    return found


def _throughput(metrics: Metrics) -> Mapping[str, Mapping[str, float]]:
    """Totals of each path since the start, with the seconds of its steps."""
    found: dict[str, dict[str, float]] = {}
    totals: dict[str, Counter | Histogram] = {
        "tokens": metrics.tokens,
        "tokens_uniform": metrics.tokens_uniform,
        "frames": metrics.frames,
        "megapixels": metrics.megapixels,
        "step_seconds": metrics.step_seconds,
    }
    for name, metric in totals.items():
        for tokenization, value in _sums(metric):
            figures = found.setdefault(tokenization, dict.fromkeys(totals, 0.0))
            figures[name] += value
    return found


def _sums(metric: Counter | Histogram) -> Iterator[tuple[str, float]]:
    for family in metric.collect():
        for sample in family.samples:
            if sample.name.endswith(("_total", "_sum")):
                yield sample.labels["tokenization"], sample.value
