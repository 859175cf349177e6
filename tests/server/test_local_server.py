"""How starting and stopping a server of one's own takes a server that fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cinecat.server import local_server


def server_that(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Puts a script in the place of the Python that would run `cinecat serve`."""
    script = folder / "server"
    script.write_text("\n".join([f"#!{sys.executable}", "import pathlib, signal, sys", *lines]))
    script.chmod(0o755)
    monkeypatch.setattr(local_server.sys, "executable", str(script))


ENDPOINT = '{"address": "127.0.0.1:9", "metrics_port": 1}'
READY = f"pathlib.Path(sys.argv[sys.argv.index('--ready-file') + 1]).write_text({ENDPOINT!r})"


def test_a_server_that_exits_at_once_is_reported_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server_that(tmp_path, monkeypatch, "sys.exit('no such model')")
    with (
        pytest.raises(local_server.ServerFailed, match=r"(?s)exited with 1 before it was ready.*no such model"),
        local_server.running_server(tmp_path),
    ):
        pytest.fail("the server cannot have started")


def test_a_server_that_is_ready_is_used_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = tmp_path / "stopped"
    on_signal = f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(stopped)!r}).touch(), sys.exit(0)))"
    server_that(tmp_path, monkeypatch, on_signal, READY, "signal.pause()")
    with local_server.running_server(tmp_path) as server:
        assert server.address == "127.0.0.1:9"
        assert not stopped.exists()
    assert stopped.exists()


def test_a_server_that_stops_with_an_error_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server_that(tmp_path, monkeypatch, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))", READY, "signal.pause()")
    running = local_server.running_server(tmp_path)
    with pytest.raises(local_server.ServerFailed, match="exited with 3 on SIGTERM"), running:
        pass
