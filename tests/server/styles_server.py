"""A server with nothing but the Styles service and a stand-in for the engine core, over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry

from cinecat.engines.errors import NoFreeSlot
from cinecat.engines.messages import ResidentStyle, Warm, Warmed
from cinecat.plugins.installed import InstalledStyles
from cinecat.plugins.registry import BUNDLED, StyleRegistry
from cinecat.plugins.sources import FolderSource, Origin, PackageSource
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.inputs import JobInputs
from cinecat.server.metrics import Metrics
from cinecat.server.replica import Replica
from cinecat.server.services.errors import ErrorInterceptor
from cinecat.server.services.styles import StylesService
from cinecat.server.style_installer import StyleInstaller
from cinecat.server.style_models import StyleModels
from cinecat.server.styles import StyleCatalogue
from cinecat.v1 import styles_pb2, styles_pb2_grpc
from tests.server.samples import model_info

MAX_BYTES = 100_000


@dataclass
class FakeCore:
    """Puts every style into slot 1, or has no slot free."""

    warmed: list[Warm] = field(default_factory=list)
    full: bool = False

    async def call(self, call: Any, answer: type[Any]) -> Any:
        if self.full:
            raise NoFreeSlot("no style slot is free: 8 of 8 are worn by running clips")
        self.warmed.append(call)
        return Warmed((ResidentStyle(1, (call.style.fingerprint,), 4096),))


@dataclass
class Served:
    """A server with nothing but the Styles service, its parts, and a stub."""

    stub: Any
    root: Path
    catalogue: StyleCatalogue
    inputs: JobInputs
    core: FakeCore
    replica: Replica

    def on_disk(self) -> list[str]:
        """Everything that is in the folder for uploads."""
        return sorted(path.name for path in self.root.iterdir())

    async def install(self, parts: Iterable[styles_pb2.InstallStyleRequest]) -> styles_pb2.InstallStyleResponse:
        answer: styles_pb2.InstallStyleResponse = await self.stub.InstallStyle(iter(parts))
        return answer

    async def refused(self, call: Any) -> tuple[grpc.StatusCode, list[tuple[str, str]]]:
        """The status and the field violations of a call."""
        with pytest.raises(grpc.aio.AioRpcError) as answer:
            await call
        status = rpc_status.from_call(answer.value)
        details = error_details_pb2.BadRequest()
        if status is not None and status.details:
            status.details[0].Unpack(details)
        return answer.value.code(), [(each.field, each.description) for each in details.field_violations]

    async def listed(self) -> list[str]:
        answer = await self.stub.ListStyles(styles_pb2.ListStylesRequest())
        return [f"{style.name}@{style.version}" for style in answer.styles]

    async def get(self, name: str, **fields: Any) -> styles_pb2.Style:
        answer: styles_pb2.Style = await self.stub.GetStyle(styles_pb2.GetStyleRequest(name=name, **fields))
        return answer


@asynccontextmanager
async def served(folder: Path, idle_seconds: float = 30.0, max_bytes: int = MAX_BYTES) -> AsyncIterator[Served]:
    root = folder / "styles"
    installed = InstalledStyles(root)
    entry = EntryPoint("grain", "tests.plugins.example_style_package", "cinecat.styles")
    sources = [
        FolderSource(BUNDLED, Origin.BUNDLED),
        FolderSource(folder / "operator"),
        installed.source,
        PackageSource(lambda: [entry]),
    ]
    catalogue = StyleCatalogue(StyleRegistry(sources), model_info())
    inputs, core = JobInputs(folder / "inputs"), FakeCore()
    styles = StyleModels(lambda: [catalogue])
    installer = StyleInstaller(installed, styles, max_bytes, idle_seconds)
    metrics = Metrics(CollectorRegistry())
    faked: Any = core
    replica = Replica(faked, CoreGauges(metrics), catalogue.activity)
    server = grpc.aio.server(interceptors=[ErrorInterceptor(metrics)])
    styles_pb2_grpc.add_StylesServicer_to_server(
        StylesService(styles, installer, inputs, lambda models: [replica]), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(styles_pb2_grpc.StylesStub(channel), root, catalogue, inputs, core, replica)
    finally:
        await server.stop(None)


ALWAYS = ["amber@1.0.0", "blueprint@1.0.0", "grain@1.0.0", "noir@1.0.0"]


class HeldUpload:
    """An upload that sends some messages, and the rest once it may."""

    def __init__(self, parts: Iterable[styles_pb2.InstallStyleRequest], held_after: int) -> None:
        self._parts = list(parts)
        self._held_after = held_after
        self.go_on = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[styles_pb2.InstallStyleRequest]:
        for index, each in enumerate(self._parts):
            if index == self._held_after:
                await self.go_on.wait()
            yield each


def incoming(s: Served) -> bool:
    return any(name.startswith(".incoming-") for name in s.on_disk())
