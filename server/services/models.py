"""The Models service."""

from __future__ import annotations

from typing import Any

import grpc

from cinecat.v1 import models_pb2, models_pb2_grpc


class ModelsService(models_pb2_grpc.ModelsServicer):
    """Tells what is loaded."""

    def __init__(self, model: models_pb2.Model) -> None:
        self._model = model

    async def ListModels(  # noqa: N802
        self, request: models_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb2.ListModelsResponse:
        return models_pb2.ListModelsResponse(models=[self._model])
