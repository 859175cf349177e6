"""The gRPC server: its port, its health, and what it takes."""

from __future__ import annotations

import socket
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cinecat.server.metrics import Metrics
from cinecat.server.services.errors import ErrorInterceptor
from cinecat.server.settings import Settings, SettingsError
from cinecat.v1 import generation_pb2, models_pb2, styles_pb2

SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in ((generation_pb2, "Generation"), (styles_pb2, "Styles"), (models_pb2, "Models"))
)

FRONT = "cinecat.front"
"""What a health check names to ask for the front alone: it is alive also while no engine core is."""

# Room in a message beside the image.
_MESSAGE_MARGIN_BYTES = 1 << 20


def check_is_free(address: str) -> None:
    """Raises SettingsError for an address that cannot be listened on, which gRPC says only when the model is loaded."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        raise SettingsError(f"address: {address} cannot be listened on: {error.strerror}") from error


def grpc_server(settings: Settings, metrics: Metrics) -> tuple[grpc.aio.Server, Any]:
    """The server, and the servicer of its health."""
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


async def set_health(servicer: Any, serving: bool) -> None:
    """Says of the server and of each of its services whether it serves, and of the front that it is alive."""
    status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
    for service in ("", *SERVICES):
        await servicer.set(service, status)
    await servicer.set(FRONT, health_pb2.HealthCheckResponse.SERVING)


def bind(server: grpc.aio.Server, address: str) -> int:
    """The port that it listens on. Raises SettingsError."""
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise SettingsError(f"address: {address} cannot be listened on: {error}") from error
    if port == 0:
        raise SettingsError(f"address: {address} cannot be listened on; is another server using the port?")
    return port
