"""The Models service."""

from __future__ import annotations

from typing import Any

import grpc

from cinecat.server.fleet import Fleet
from cinecat.v1 import models_pb2, models_pb2_grpc


class ModelsService(models_pb2_grpc.ModelsServicer):
    """Tells what is loaded, the default first."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def ListModels(  # noqa: N802
        self, request: models_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb2.ListModelsResponse:
        return models_pb2.ListModelsResponse(models=self._fleet.models)
