"""The Styles service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc

from cinecat.engines.messages import StyleUse, Warm, Warmed
from cinecat.plugins.errors import shown
from cinecat.plugins.manifest import PREVIEW_TYPES
from cinecat.plugins.registry import Style, UnknownStyle
from cinecat.plugins.sources import Origin
from cinecat.server.errors import RequestError, Violation, invalid
from cinecat.server.inputs import JobInputs
from cinecat.server.replica import Replica
from cinecat.server.services.paging import decode_token, encode_token, page_size
from cinecat.server.style_installer import StyleInstaller
from cinecat.server.style_models import StyleModels
from cinecat.v1 import styles_pb2, styles_pb2_grpc

_MAX_IGNORED_KEYS, _MAX_KEY = 100, 256
_READ_OUT_SECONDS = 2.0
_ORIGINS = {
    Origin.BUNDLED: styles_pb2.STYLE_ORIGIN_BUNDLED,
    Origin.FOLDER: styles_pb2.STYLE_ORIGIN_FOLDER,
    Origin.INSTALLED: styles_pb2.STYLE_ORIGIN_INSTALLED,
    Origin.PACKAGE: styles_pb2.STYLE_ORIGIN_PACKAGE,
}


class StylesService(styles_pb2_grpc.StylesServicer):
    """Looks for styles at every call, so that what is put into a folder or installed is found without a restart."""

    def __init__(
        self,
        catalogue: StyleModels,
        installer: StyleInstaller,
        inputs: JobInputs,
        replicas: Callable[[Collection[str]], Sequence[Replica]],
    ) -> None:
        """`inputs` tells which styles accepted jobs wear, `replicas` are those of some models."""
        self._catalogue = catalogue
        self._installer = installer
        self._inputs = inputs
        self._replicas = replicas
        # One at a time, so that between two of them the cores are the schedulers'.
        self._warming = asyncio.Lock()

    async def ListStyles(  # noqa: N802
        self, request: styles_pb2.ListStylesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> styles_pb2.ListStylesResponse:
        return await self.page(request)

    async def page(self, request: styles_pb2.ListStylesRequest) -> styles_pb2.ListStylesResponse:
        """A page of the styles. Raises RequestError for what is no size or no token."""
        size = page_size(request.page_size)
        position = decode_token(request.page_token, int)
        start = 0 if position is None else int(position[0])
        styles = await asyncio.to_thread(self._catalogue.styles)
        page = await asyncio.to_thread(lambda: [self._to_proto(style) for style in styles[start : start + size]])
        response = styles_pb2.ListStylesResponse(styles=page)
        for style in response.styles:
            del style.ignored_keys[:]
        for problem in await asyncio.to_thread(self._catalogue.problems):
            response.problems.add(folder=shown(problem.folder), reason=problem.reason)
        if start + size < len(styles):
            response.next_page_token = encode_token(start + size)
        return response

    async def GetStyle(  # noqa: N802
        self, request: styles_pb2.GetStyleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> styles_pb2.Style:
        style = await self._find(request.name, request.version)
        answer = self._to_proto(style)
        if request.with_preview and style.manifest.preview:
            with contextlib.suppress(OSError):  # taken away since
                answer.preview.data = await asyncio.to_thread((style.folder / style.manifest.preview).read_bytes)
        return answer

    async def InstallStyle(  # noqa: N802
        self,
        request_iterator: AsyncIterator[styles_pb2.InstallStyleRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> styles_pb2.InstallStyleResponse:
        try:
            installation = await self._installer.install(request_iterator)
        except RequestError:
            await _read_out(request_iterator)
            raise
        if installation.unchanged:
            await _read_out(request_iterator)
        return styles_pb2.InstallStyleResponse(
            style=self._to_proto(installation.style), unchanged=installation.unchanged, notes=installation.notes
        )

    async def RemoveStyle(  # noqa: N802
        self, request: styles_pb2.RemoveStyleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> styles_pb2.RemoveStyleResponse:
        style = await self._installer.remove(request.name, request.version)
        if style is None:
            broken = styles_pb2.Style(name=request.name, version=request.version)
            return styles_pb2.RemoveStyleResponse(style=broken)
        return styles_pb2.RemoveStyleResponse(style=self._to_proto(style))

    async def WarmStyle(  # noqa: N802
        self, request: styles_pb2.WarmStyleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> styles_pb2.Style:
        style = await self._find(request.name, request.version)
        if problem := self._catalogue.incompatibility(style):
            problem = f"{style.manifest.name!r} {problem}"
            raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, f"name: {problem}", [Violation("name", problem)])
        use = StyleUse(str(style.weights_path), style.fingerprint, 1.0)
        replicas = self._replicas(self._catalogue.wearers(style.manifest, style.header))
        async with self._warming:
            answers = await asyncio.gather(*(_warm(each, use) for each in replicas), return_exceptions=True)
        failures = [answer for answer in answers if answer is not None]
        if len(failures) == len(replicas):
            raise failures[0] if failures else RequestError(grpc.StatusCode.UNAVAILABLE, "no engine core is there now")
        return self._to_proto(style)

    async def _find(self, name: str, version: str) -> Style:
        try:
            return await asyncio.to_thread(self._catalogue.find, name, version)
        except UnknownStyle as error:
            raise invalid([Violation("name", f"{error}", missing=True)]) from error

    def _to_proto(self, style: Style) -> styles_pb2.Style:
        manifest, header, activity = style.manifest, style.header, self._catalogue.activity
        incompatibility = self._catalogue.incompatibility(style)
        ignored = self._catalogue.ignored(manifest, header)
        uses, last_use_ns = activity.uses(style.fingerprint)
        answer = styles_pb2.Style(
            name=manifest.name,
            version=manifest.version,
            title=manifest.title,
            description=manifest.description,
            trigger_words=manifest.trigger_words,
            default_strength=manifest.default_strength,
            base_model=manifest.base_model,
            rank=header.max_rank,
            license=manifest.license,
            author=manifest.author,
            compatible=not incompatibility,
            incompatibility=incompatibility,
            models=self._catalogue.wearers(manifest, header),
            prompt_template=manifest.prompt_template,
            sampler=styles_pb2.SamplerDefaults(**_given(manifest.sampler)),
            base_dims=styles_pb2.BaseDims(**_given(manifest.base_dims)),
            fingerprint=style.fingerprint,
            weights_size_bytes=style.weights_bytes,
            format=header.format,
            ignored_key_count=len(ignored),
            origin=_ORIGINS[style.place.origin],
            provider=style.place.provider or shown(style.folder),
            uses=uses,
            jobs=self._inputs.wearers(style.fingerprint),
        )
        for each in ignored[:_MAX_IGNORED_KEYS]:
            key = each.key if len(each.key) <= _MAX_KEY else f"{each.key[: _MAX_KEY - 3]}..."
            answer.ignored_keys.add(key=key, reason=each.reason)
        if manifest.preview:
            _describe_preview(answer.preview, style.folder / manifest.preview)
        if last_use_ns:
            answer.last_use_time.FromNanoseconds(last_use_ns)
        if slots := activity.slots(style.fingerprint):
            answer.residency.slots.extend(slot.slot for slot in slots)
            answer.residency.size_bytes = sum(slot.size_bytes for slot in slots)
        return answer


async def _warm(replica: Replica, use: StyleUse) -> None:
    warmed = await replica.core.call(Warm(use), Warmed)
    replica.resident = warmed.resident
    replica.gauges.slots(len(warmed.resident), warmed.slots)


def _describe_preview(preview: styles_pb2.StylePreview, path: Path) -> None:
    preview.file_name = path.name
    preview.mime_type = PREVIEW_TYPES[path.suffix]
    with contextlib.suppress(OSError):  # taken away since
        preview.size_bytes = path.stat().st_size


def _given(numbers: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(numbers).items() if value is not None}


async def _read_out(messages: AsyncIterator[styles_pb2.InstallStyleRequest]) -> None:
    """Lets a client that gets an early answer finish what it is sending: grpc.aio clients lose an answer that overtakes
    their writes.
    """
    with contextlib.suppress(TimeoutError, grpc.RpcError):
        async with asyncio.timeout(_READ_OUT_SECONDS):
            async for _ in messages:
                pass
