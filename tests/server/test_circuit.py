"""A request that killed the core is refused for a while, and only that one."""

from __future__ import annotations

import grpc
import pytest

from cinecat.server import circuit as circuit_module
from cinecat.server.circuit import OPEN_SECONDS, Circuit
from cinecat.server.errors import RequestError


def test_a_request_is_refused_until_its_time_is_up() -> None:
    now = [0.0]
    circuit = Circuit(lambda: now[0])
    circuit.open("poison", "a-job")
    circuit.check("other")
    now[0] = OPEN_SECONDS - 60
    with pytest.raises(RequestError, match=r"clip: the same request .*\(job a-job\).* in 60 s") as refused:
        circuit.check("poison")
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
    now[0] = OPEN_SECONDS
    circuit.check("poison")


def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_module, "_MOST", 2)
    circuit = Circuit()
    for name in ("a", "b", "c"):
        circuit.open(name, "job")
    circuit.check("a")
    for name in ("b", "c"):
        with pytest.raises(RequestError):
            circuit.check(name)
