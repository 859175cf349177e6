"""One real server for all tests that leave it as it was, and a way to start others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import grpc
import pytest

from cinecat import Client
from cinecat.server.local_server import LocalServer, running_server
from cinecat.v1 import clip_pb2, generation_pb2_grpc

ServerFactory = Callable[..., AbstractContextManager[LocalServer]]


@pytest.fixture(scope="session")
def start_server() -> ServerFactory:
    """`with start_server(folder, "--grace-seconds", "1") as server:`."""
    # One thread: the clips are tiny, and two engine cores that share two CPUs spin at each other's barriers.
    return lambda folder, *options: running_server(folder, "--threads", "1", *options)


@pytest.fixture(scope="session")
def server(start_server: ServerFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with start_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


@pytest.fixture
def generation(server: LocalServer) -> Iterator[generation_pb2_grpc.GenerationStub]:
    """The bare stub, for requests that the client would not send."""
    with grpc.insecure_channel(server.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)


@pytest.fixture
def small_clip(frame_png: bytes) -> clip_pb2.ClipSpec:
    """Half a second of work."""
    return clip_pb2.ClipSpec(image=frame_png, prompt="a cat", width=64, height=64, frames=5, steps=2, seed=5)
