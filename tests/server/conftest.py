"""What the tests of the front share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.postgresql import Cluster, cluster


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    with cluster() as running:
        yield running
