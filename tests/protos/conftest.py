from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.protos.scripted_server import PNG, Script, start
from tests.protos.twins import AsyncTwin, SyncTwin, Twin


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def address(script: Script) -> Iterator[str]:
    server, address = start(script)
    yield address
    server.stop(None).wait()


@pytest.fixture(params=[SyncTwin, AsyncTwin], ids=["Client", "AsyncClient"])
def twin(request: pytest.FixtureRequest, address: str) -> Twin:
    """Both clients behind one face, so that every behaviour is held to both."""
    chosen: Twin = request.param(address)
    return chosen


@pytest.fixture
def shot(tmp_path: Path) -> Path:
    path = tmp_path / "shot.png"
    path.write_bytes(PNG)
    return path
