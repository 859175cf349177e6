"""From what the server raises to what a gRPC client reads; the only place that does so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from structlog.contextvars import bind_contextvars, get_contextvars

from cinecat.server.errors import RequestError, explain, status_of
from cinecat.server.metrics import Metrics
from cinecat.server.services.call_id import CALL_ID_KEY, call_id_of

# A gRPC client refuses trailers above 8 KiB. The message goes into them twice, once percent-encoded, once with the
# details in base64.
_MAX_MESSAGE_BYTES = 800
_MAX_DETAILS_BYTES = 3000

log = structlog.get_logger(__name__)


if TYPE_CHECKING:
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor


class ErrorInterceptor(_Interceptor):
    """Answers RequestError with its status and field violations, and anything unexpected with a bare INTERNAL."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/cinecat."):
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(method, handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(
                self._unary(method, handler.stream_unary), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )

    def _unary(self, method: str, behaviour: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            _name(context)
            try:
                return await behaviour(request, context)
            except Exception as error:
                return await self._abort(method, error, context)

        return call

    def _streaming(self, method: str, behaviour: Any) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            _name(context)
            try:
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response
            except Exception as error:
                await self._abort(method, error, context)

        return call

    async def _abort(self, method: str, error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if not isinstance(error, RequestError):
            log.error("rpc failed", method=method, exc_info=error)
            error = RequestError(status_of(error), explain(error))
        self._metrics.requests_refused.labels(method.rpartition("/")[2], error.code.name).inc()
        status = rpc_status.to_status(to_proto(error))
        call_id = get_contextvars().get("call_id", "")
        trailing = (*status.trailing_metadata, (CALL_ID_KEY, call_id))
        await context.abort(status.code, status.details, trailing)


def _name(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Has the call's id in its answer, and in every line of the log: each call is a task with variables of its own."""
    call_id = call_id_of(context.invocation_metadata())
    context.set_trailing_metadata(((CALL_ID_KEY, call_id),))
    bind_contextvars(call_id=call_id)


def to_proto(error: RequestError) -> status_pb2.Status:
    """google.rpc.Status, with a BadRequest when fields are to blame: the first of them where they are very many."""
    status = status_pb2.Status(code=error.code.value[0], message=_cut(error.message, _MAX_MESSAGE_BYTES))
    if error.violations:
        details = error_details_pb2.BadRequest()
        for violation in error.violations:
            room = _MAX_DETAILS_BYTES - details.ByteSize() - len(violation.field.encode())
            if room <= 0:
                break
            details.field_violations.add(field=violation.field, description=_cut(violation.description, room))
        packed = AnyMessage()
        packed.Pack(details)
        status.details.append(packed)
    return status


def _cut(text: str, size: int) -> str:
    encoded = text.encode(errors="replace")
    return encoded.decode() if len(encoded) <= size else encoded[: max(0, size - 3)].decode(errors="ignore") + "…"
