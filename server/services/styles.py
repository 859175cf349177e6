"""The Styles service."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from cinecat.plugins.registry import Style, UnknownStyle
from cinecat.server.errors import Violation, invalid
from cinecat.server.services.paging import decode_token, encode_token, page_size
from cinecat.server.styles import StyleCatalogue
from cinecat.v1 import styles_pb2, styles_pb2_grpc


class StylesService(styles_pb2_grpc.StylesServicer):
    """Reads the styles folders at every call, so that what is put there is found without a restart."""

    def __init__(self, catalogue: StyleCatalogue) -> None:
        self._catalogue = catalogue

    async def ListStyles(  # noqa: N802
        self, request: styles_pb2.ListStylesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> styles_pb2.ListStylesResponse:
        size = page_size(request.page_size)
        position = decode_token(request.page_token, int)
        start = 0 if position is None else int(position[0])
        styles = await asyncio.to_thread(self._catalogue.styles)
        response = styles_pb2.ListStylesResponse(
            styles=[self._to_proto(style) for style in styles[start : start + size]]
        )
        for problem in await asyncio.to_thread(self._catalogue.problems):
            folder = str(problem.folder).encode(errors="replace").decode()  # a name on disk need not be Unicode
            response.problems.add(folder=folder, reason=problem.reason)
        if start + size < len(styles):
            response.next_page_token = encode_token(start + size)
        return response

    async def GetStyle(  # noqa: N802
        self, request: styles_pb2.GetStyleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> styles_pb2.Style:
        try:
            style = await asyncio.to_thread(self._catalogue.find, request.name, request.version)
        except UnknownStyle as error:
            raise invalid([Violation("name", f"{error}", missing=True)]) from error
        return self._to_proto(style)

    def _to_proto(self, style: Style) -> styles_pb2.Style:
        manifest = style.manifest
        incompatibility = self._catalogue.incompatibility(style)
        return styles_pb2.Style(
            name=manifest.name,
            version=manifest.version,
            title=manifest.title,
            description=manifest.description,
            trigger_words=manifest.trigger_words,
            default_strength=manifest.default_strength,
            base_model=manifest.base_model,
            rank=style.header.max_rank,
            license=manifest.license,
            author=manifest.author,
            compatible=not incompatibility,
            incompatibility=incompatibility,
        )
