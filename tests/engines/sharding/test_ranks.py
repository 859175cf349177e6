"""Where ranks meet."""

from __future__ import annotations

import socket
import sys

import pytest

from cinecat.engines.sharding.layout import Layout
from cinecat.engines.sharding.ranks import open_store


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of the machine")
def test_the_place_is_not_open_to_other_networks() -> None:
    layout = Layout(ulysses=2)
    leaders = open_store(layout)
    followers = open_store(layout, leaders.port)
    followers.set("word", "heard")
    assert leaders.get("word") == b"heard"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", leaders.port), 10)
