"""The server: everything put together, started, and stopped again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import platform
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import structlog
from filelock import FileLock, Timeout
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from cinecat.engines.messages import CoreConfig
from cinecat.plugins.formats.registry import installed_formats
from cinecat.plugins.installed import InstalledStyles
from cinecat.plugins.registry import BUNDLED, StyleRegistry
from cinecat.plugins.sources import FolderSource, Origin, PackageSource
from cinecat.server.artifacts import ArtifactError, ArtifactStore
from cinecat.server.backlog import Backlog, Limits
from cinecat.server.checkpoints import Checkpoints
from cinecat.server.core_process import CoreProcess
from cinecat.server.costs import Costs
from cinecat.server.database import DatabaseError
from cinecat.server.inputs import JobInputs
from cinecat.server.jobs import Jobs
from cinecat.server.metrics import Metrics
from cinecat.server.models import describe_model
from cinecat.server.page.app import Page
from cinecat.server.page.keys import keys_of
from cinecat.server.page.serving import listening
from cinecat.server.page.status import Served
from cinecat.server.patience import Patience
from cinecat.server.policy import POLICIES
from cinecat.server.profiles import Profiles, open_profiles
from cinecat.server.render import CheckpointRule, Renderer
from cinecat.server.retention import Retention
from cinecat.server.scheduler import Scheduler
from cinecat.server.services.errors import ErrorInterceptor
from cinecat.server.services.generation import GenerationService
from cinecat.server.services.models import ModelsService
from cinecat.server.services.styles import StylesService
from cinecat.server.settings import Settings, SettingsError, clip_size
from cinecat.server.store import JobStore
from cinecat.server.style_installer import StyleInstaller
from cinecat.server.styles import StyleCatalogue
from cinecat.server.tracing import open_tracer
from cinecat.server.warmup import warm_up
from cinecat.v1 import generation_pb2, generation_pb2_grpc, models_pb2, models_pb2_grpc, styles_pb2, styles_pb2_grpc

SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in ((generation_pb2, "Generation"), (styles_pb2, "Styles"), (models_pb2, "Models"))
)

# Room in a message beside the image.
_MESSAGE_MARGIN_BYTES = 1 << 20

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class RunningServer:
    """A ready server: where it listens, and the task that works its queue off, which ends only by an error."""

    address: str
    metrics_port: int
    worker: asyncio.Task[None]


async def serve(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT, then drains and returns. A second signal ends the drain.

    Raises:
        ModelError, CoreDied, SettingsError, OSError: the server cannot start.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    ready = asyncio.Event()
    serving = asyncio.create_task(_serve_until(stop, hurry, ready, settings))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not ready.is_set():
        serving.cancel()  # still loading: there is nothing to drain
    with contextlib.suppress(asyncio.CancelledError):
        await serving


async def _serve_until(stop: asyncio.Event, hurry: asyncio.Event, ready: asyncio.Event, settings: Settings) -> None:
    if settings.ready_file is not None:
        settings.ready_file.unlink(missing_ok=True)  # a former server's
    async with running(settings, hurry) as server:
        ready.set()
        if settings.ready_file is not None:
            await asyncio.to_thread(_write_ready_file, settings.ready_file, server)
        metrics_url = f"http://{settings.metrics_host}:{server.metrics_port}/metrics"
        log.info("ready", address=server.address, metrics=metrics_url)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([stopping, server.worker], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if server.worker.done():
            server.worker.result()  # a server that takes jobs and works on none must not live on


@contextlib.asynccontextmanager
async def running(settings: Settings, hurry: asyncio.Event) -> AsyncIterator[RunningServer]:
    """A warm server that takes jobs, and drains at the end of the block; `hurry` cuts the drain short.

    What can be wrong with the settings is found before the model is loaded.
    """
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.build_info.labels(version("cinecat"), platform.python_version(), version("torch")).set(1)
    async with contextlib.AsyncExitStack() as stack:
        _check_is_free(settings.address)
        keys, drawn = keys_of(settings.page_keys, settings.metrics_host)
        page = Page(registry, keys, settings.metrics_host)
        metrics_port = await stack.enter_async_context(listening(page, settings.metrics_host, settings.metrics_port))
        address = f"http://{settings.metrics_host}:{metrics_port}/"
        log.info("status page", url=f"{address}?key={drawn}" if drawn else address)
        folder = settings.data_dir.expanduser()
        stack.enter_context(_sole_use_of(folder))
        store = await asyncio.to_thread(_open_store, settings, folder)
        inputs = JobInputs(folder / "inputs")
        installed = await asyncio.to_thread(_open_installed, folder / "styles")
        checkpoints = await asyncio.to_thread(_open_checkpoints, folder / "checkpoints")
        tracer = open_tracer(settings.trace_endpoint)
        stack.push_async_callback(asyncio.to_thread, tracer.close)
        jobs = Jobs(store, inputs, checkpoints, settings.grace_seconds, metrics, tracer.ended)
        stack.push_async_callback(jobs.close)
        artifacts = await asyncio.to_thread(_open_artifacts, settings.artifact_url or str(folder / "artifacts"))
        stack.callback(artifacts.close)
        await asyncio.to_thread(_check_owner, artifacts, await jobs.ask_store(lambda opened: opened.identity))

        core = CoreProcess(_core_config(settings), metrics)
        stack.push_async_callback(core.stop)
        info = await core.start()
        model = describe_model(info, settings)
        metrics.loaded(model)
        resident = await warm_up(core, info, model)

        catalogue = StyleCatalogue(_registry(settings, installed), info)
        catalogue.activity.resident = resident
        metrics.style_slots_resident.set(len(resident))
        installer = StyleInstaller(installed, catalogue, settings.max_style_mib * 2**20)
        costs = Costs()
        server, health_servicer = _grpc_server(settings, metrics)

        async def on_core_state(alive: bool) -> None:
            if not alive:
                catalogue.activity.resident = ()
                metrics.style_slots_resident.set(0)
            await _set_health(health_servicer, alive)
            metrics.ready.set(alive)
            page.ready = alive

        profile_dir = await asyncio.to_thread(open_profiles, settings.profile_dir)
        patience = Patience()
        rule = CheckpointRule(settings.checkpoint_steps, settings.checkpoint_seconds)
        renderer = Renderer(
            core, model, jobs, catalogue, inputs, artifacts, checkpoints, rule, metrics, costs, patience, profile_dir
        )
        limits = Limits(settings.max_queue, settings.max_batch, info.state_bytes)
        backlog = Backlog(jobs, costs, limits, metrics)
        policy = POLICIES[settings.scheduling]
        scheduler = Scheduler(jobs, renderer, core, backlog, policy, metrics, patience, on_core_state)
        for live in await jobs.restore():
            scheduler.enqueue(live)
        retention = Retention(jobs, artifacts, settings.retain_days, settings.retain_gib, metrics)
        keeper = asyncio.create_task(retention.run())
        stack.push_async_callback(_cancelled, keeper)
        generation = GenerationService(jobs, scheduler, model, catalogue, artifacts, Profiles(jobs, profile_dir))
        generation_pb2_grpc.add_GenerationServicer_to_server(generation, server)
        styles = StylesService(catalogue, installer, inputs, core, metrics)
        styles_pb2_grpc.add_StylesServicer_to_server(styles, server)
        models_pb2_grpc.add_ModelsServicer_to_server(ModelsService(model), server)
        page.served = Served(jobs, generation, styles, model, artifacts, metrics)
        port = _bind(server, settings.address)
        await server.start()
        worker = asyncio.create_task(scheduler.run())
        try:
            await on_core_state(True)
            yield RunningServer(f"{settings.address.rpartition(':')[0]}:{port}", metrics_port, worker)
        finally:
            log.info("shutting down", drain_seconds=settings.drain_seconds)
            await on_core_state(False)
            await scheduler.drain(worker, settings.drain_seconds, hurry)
            jobs.stop_watching()
            page.served = None
            await server.stop(grace=5.0)
            log.info("stopped")


def _check_is_free(address: str) -> None:
    """Raises SettingsError for an address that cannot be listened on, which gRPC says only when the model is loaded."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        raise SettingsError(f"address: {address} cannot be listened on: {error.strerror}") from error


@contextlib.contextmanager
def _sole_use_of(folder: Path) -> Iterator[None]:
    """Two servers on one database would both run its jobs. The lock goes with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "server.lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SettingsError(f"data_dir: {folder} is in use by another server; give each its own") from error
    except OSError as error:
        raise SettingsError(f"data_dir: {folder} cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _open_artifacts(url: str) -> ArtifactStore:
    try:
        artifacts = ArtifactStore(url)
        artifacts.clear_scratch()
    except (ArtifactError, OSError) as error:
        raise SettingsError(f"artifact_url: {error}") from error
    return artifacts


def _open_checkpoints(folder: Path) -> Checkpoints:
    try:
        return Checkpoints(folder)
    except OSError as error:
        raise SettingsError(f"data_dir: {folder} cannot hold checkpoints: {error}") from error


def _open_installed(folder: Path) -> InstalledStyles:
    try:
        installed = InstalledStyles(folder)
        installed.clear_leftovers()
    except OSError as error:
        raise SettingsError(f"data_dir: {folder} cannot hold uploaded styles: {error}") from error
    return installed


def _registry(settings: Settings, installed: InstalledStyles) -> StyleRegistry:
    for problem in installed_formats().problems:
        log.warning("adapter format not usable", entry_point=problem.entry_point, reason=problem.reason)
    folders = [FolderSource(path.expanduser()) for path in settings.styles_dirs]
    for folder in folders:
        if not folder.root.is_dir():
            log.warning("styles folder is not there; it is watched", folder=str(folder.root))
    return StyleRegistry([FolderSource(BUNDLED, Origin.BUNDLED), *folders, installed.source, PackageSource()])


def _open_store(settings: Settings, folder: Path) -> JobStore:
    try:
        return JobStore(settings.database_url or folder / "jobs.sqlite")
    except DatabaseError as error:
        raise SettingsError(f"{error}") from error


def _check_owner(artifacts: ArtifactStore, identity: str) -> None:
    """Each server takes files that its database does not know for orphans, so two must not share a folder."""
    try:
        owner = artifacts.owner()
    except ArtifactError as error:
        raise SettingsError(f"artifact_url: {error}") from error
    if owner not in ("", identity):
        raise SettingsError(
            "artifact_url: the clips there belong to another job database; name another folder, or delete the file "
            "'owner' in it to keep them beside this database's"
        )


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _core_config(settings: Settings) -> CoreConfig:
    return CoreConfig(
        model=settings.model,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        style_slots=settings.style_slots,
        max_rank=settings.max_rank,
        cache_bytes=settings.cache_mib * 2**20,
        style_cache_bytes=settings.style_cache_mib * 2**20,
        model_variant="" if settings.model_variant is None else str(settings.model_variant.expanduser()),
        engine=settings.engine,
        missing_engine=settings.missing_engine,
        engine_sizes=tuple(map(clip_size, settings.engine_sizes)),
        engine_options=settings.engine_options,
        engine_cache_dir=str(settings.engine_cache_dir.expanduser()),
        engine_cache_bytes=round(settings.engine_cache_gib * 2**30),
        offload=settings.offload,
        storage_dtype=settings.storage_dtype,
        shard=settings.shard,
        shard_weights=settings.shard_weights,
        rank_timeout_seconds=settings.rank_timeout_seconds,
        log_format=settings.log_format,
        log_level=settings.log_level,
    )


def _grpc_server(settings: Settings, metrics: Metrics) -> tuple[grpc.aio.Server, Any]:
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(metrics)],
        options=[
            ("grpc.max_receive_message_length", settings.max_image_mib * 2**20 + _MESSAGE_MARGIN_BYTES),
            ("grpc.max_metadata_size", 16 * 1024),
            ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
            # A client that vanishes without a word is noticed within a minute, so that its grace period begins.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ],
    )
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server, servicer


async def _set_health(servicer: Any, serving: bool) -> None:
    status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
    for service in ("", *SERVICES):
        await servicer.set(service, status)


def _bind(server: grpc.aio.Server, address: str) -> int:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise SettingsError(f"address: {address} cannot be listened on: {error}") from error
    if port == 0:
        raise SettingsError(f"address: {address} cannot be listened on; is another server using the port?")
    return port


def _write_ready_file(path: Path, server: RunningServer) -> None:
    staging = path.with_suffix(".tmp")
    staging.write_text(json.dumps({"address": server.address, "metrics_port": server.metrics_port}))
    staging.rename(path)
