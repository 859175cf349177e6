"""The server: everything put together, started, and stopped again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import platform
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from cinecat.server import endpoint, storage
from cinecat.server.circuit import Circuit
from cinecat.server.fleet import Fleet
from cinecat.server.inputs import JobInputs
from cinecat.server.jobs import Jobs
from cinecat.server.loading import Loader
from cinecat.server.metrics import Metrics
from cinecat.server.page.app import Page
from cinecat.server.page.keys import keys_of
from cinecat.server.page.serving import listening
from cinecat.server.page.status import Served
from cinecat.server.patience import Patience
from cinecat.server.profiles import Profiles, open_profiles
from cinecat.server.retention import Retention
from cinecat.server.services.generation import GenerationService
from cinecat.server.services.models import ModelsService
from cinecat.server.services.styles import StylesService
from cinecat.server.settings import Settings, SettingsError
from cinecat.server.staffing import Staffing
from cinecat.server.style_activity import StyleActivity
from cinecat.server.style_installer import StyleInstaller
from cinecat.server.style_models import StyleModels
from cinecat.server.tracing import open_tracer
from cinecat.v1 import generation_pb2_grpc, models_pb2_grpc, styles_pb2_grpc

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class RunningServer:
    """A ready server.

    Attributes:
        address: of the gRPC services.
        broken: done, with an error, when it works off its queue no more.
        reload: makes it what other settings say, as far as they can change while it runs.
    """

    address: str
    metrics_port: int
    broken: asyncio.Future[None]
    reload: Callable[[Settings], Awaitable[None]]


async def serve(settings: Settings, read_again: Callable[[], Settings]) -> None:
    """Runs until SIGTERM or SIGINT, then drains and returns. A second signal ends the drain. SIGHUP reads the settings
    again and makes of the running server what they say.

    Args:
        read_again: the settings as they are then. Raises SettingsError.

    Raises:
        ModelError, CoreDied, SettingsError, OSError: the server cannot start.
    """
    stop, hurry, changed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGHUP, changed.set)
    ready = asyncio.Event()
    reloading = partial(_reload, changed, read_again)
    serving = asyncio.create_task(_serve_until(stop, hurry, ready, settings, reloading))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not ready.is_set():
        serving.cancel()  # still loading: there is nothing to drain
    with contextlib.suppress(asyncio.CancelledError):
        await serving


async def _serve_until(
    stop: asyncio.Event,
    hurry: asyncio.Event,
    ready: asyncio.Event,
    settings: Settings,
    reloading: Callable[[RunningServer], Coroutine[Any, Any, None]],
) -> None:
    if settings.ready_file is not None:
        settings.ready_file.unlink(missing_ok=True)  # a former server's
    async with running(settings, hurry) as server:
        ready.set()
        if settings.ready_file is not None:
            await asyncio.to_thread(_write_ready_file, settings.ready_file, server)
        metrics_url = f"http://{settings.metrics_host}:{server.metrics_port}/metrics"
        log.info("ready", address=server.address, metrics=metrics_url)
        stopping: asyncio.Future[Any] = asyncio.create_task(stop.wait())
        reloads = asyncio.create_task(reloading(server))
        await asyncio.wait([stopping, server.broken], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await _cancelled(reloads)
        if server.broken.done():
            server.broken.result()  # a server that takes jobs and works on none must not live on


async def _reload(changed: asyncio.Event, read_again: Callable[[], Settings], server: RunningServer) -> None:
    while True:
        await changed.wait()
        changed.clear()
        try:
            await server.reload(await asyncio.to_thread(read_again))
        except SettingsError as error:
            log.error("settings cannot be used; the server stays as it is", error=f"{error}")
        except Exception as error:
            log.error("settings could not be carried out in full", exc_info=error)


@contextlib.asynccontextmanager
async def running(settings: Settings, hurry: asyncio.Event) -> AsyncIterator[RunningServer]:
    """A warm server that takes jobs, and drains at the end of the block; `hurry` cuts the drain short.

    What can be wrong with the settings is found before a model is loaded.
    """
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.build_info.labels(version("cinecat"), platform.python_version(), version("torch")).set(1)
    async with contextlib.AsyncExitStack() as stack:
        endpoint.check_is_free(settings.address)
        keys, drawn = keys_of(settings.page_keys, settings.metrics_host)
        page = Page(registry, keys, settings.metrics_host)
        metrics_port = await stack.enter_async_context(listening(page, settings.metrics_host, settings.metrics_port))
        address = f"http://{settings.metrics_host}:{metrics_port}/"
        log.info("status page", url=f"{address}?key={drawn}" if drawn else address)
        folder = settings.data_dir.expanduser()
        stack.enter_context(storage.sole_use_of(folder))
        store = await asyncio.to_thread(storage.open_store, settings, folder)
        inputs = JobInputs(folder / "inputs")
        installed = await asyncio.to_thread(storage.open_installed, folder / "styles")
        checkpoints = await asyncio.to_thread(storage.open_checkpoints, folder / "checkpoints")
        tracer = open_tracer(settings.trace_endpoint)
        stack.push_async_callback(asyncio.to_thread, tracer.close)
        jobs = Jobs(store, inputs, checkpoints, settings.grace_seconds, metrics, tracer.ended)
        stack.push_async_callback(jobs.close)
        artifacts = await asyncio.to_thread(storage.open_artifacts, settings.artifact_url or str(folder / "artifacts"))
        stack.callback(artifacts.close)
        await asyncio.to_thread(storage.check_owner, artifacts, await jobs.ask_store(lambda opened: opened.identity))
        profile_dir = await asyncio.to_thread(open_profiles, settings.profile_dir)

        serving = False
        server, health_servicer = endpoint.grpc_server(settings, metrics)
        patience, circuit = Patience(), Circuit()
        fleet = Fleet(jobs, patience, circuit, settings.max_queue, metrics)
        stack.push_async_callback(fleet.stop)

        telling = asyncio.Lock()

        async def tell_readiness() -> None:
            async with telling:  # of replicas that change at once, the last says how it is
                ready = serving and fleet.works
                await endpoint.set_health(health_servicer, ready)
                metrics.ready.set(ready)
                page.ready = ready

        loader = Loader(
            fleet,
            jobs,
            inputs,
            artifacts,
            checkpoints,
            storage.open_registry(settings, installed),
            StyleActivity(),
            metrics,
            patience,
            circuit,
            profile_dir,
            tell_readiness,
        )
        staffing = Staffing(fleet, loader)
        await staffing.start(settings)
        for live in await jobs.restore():
            fleet.enqueue(live)
        retention = Retention(jobs, artifacts, settings.retain_days, settings.retain_gib, metrics)
        keeper = asyncio.create_task(retention.run())
        stack.push_async_callback(_cancelled, keeper)
        generation = GenerationService(jobs, fleet, artifacts, Profiles(jobs, profile_dir))
        generation_pb2_grpc.add_GenerationServicer_to_server(generation, server)
        catalogue = StyleModels(fleet.catalogues)
        installer = StyleInstaller(installed, catalogue, settings.max_style_mib * 2**20)
        styles = StylesService(catalogue, installer, inputs, fleet.replicas)
        styles_pb2_grpc.add_StylesServicer_to_server(styles, server)
        models_pb2_grpc.add_ModelsServicer_to_server(ModelsService(fleet), server)
        page.served = Served(jobs, generation, styles, fleet, artifacts, metrics)
        port = endpoint.bind(server, settings.address)
        await server.start()
        try:
            serving = True
            await tell_readiness()
            host = settings.address.rpartition(":")[0]
            yield RunningServer(f"{host}:{port}", metrics_port, fleet.broken, staffing.reconcile)
        finally:
            log.info("shutting down", drain_seconds=settings.drain_seconds)
            serving = False
            await tell_readiness()
            await staffing.close()
            await fleet.drain(settings.drain_seconds, hurry)
            jobs.stop_watching()
            page.served = None
            await server.stop(grace=5.0)
            log.info("stopped")


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _write_ready_file(path: Path, server: RunningServer) -> None:
    staging = path.with_suffix(".tmp")
    staging.write_text(json.dumps({"address": server.address, "metrics_port": server.metrics_port}))
    staging.rename(path)
