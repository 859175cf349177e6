"""A server of one's own: a real `cinecat serve` in another process, for the demo, the benchmarks and the tests."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READY_SECONDS = 300.0
STOP_SECONDS = 60.0


class ServerFailed(RuntimeError):
    """The server did not start or stop as it should; the message ends with its log."""


@dataclass(frozen=True)
class LocalServer:
    """A server that is ready.

    Attributes:
        address: of the gRPC services.
        metrics_port: on 127.0.0.1.
        process: its front.
        log: everything that it printed.
    """

    address: str
    metrics_port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def core_pid(self) -> int:
        """Of the engine core that was started first."""
        return self.core_pids[0]

    @property
    def core_pids(self) -> list[int]:
        """Of all engine cores, in the order of their starts: the front's children that were spawned."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = sorted(int(pid) for task in tasks for pid in task.read_text().split())
        return [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@contextmanager
def running_server(folder: Path, *options: str, module: str = "cinecat.cli") -> Iterator[LocalServer]:
    """Runs `cinecat serve` on a free loopback port, with its data in `folder`, and yields it.

    Args:
        module: the command line that has `serve`, as `python -m` runs it.

    Raises ServerFailed when it does not get ready, or does not exit with 0 on SIGTERM.
    """
    ready, log = folder / "ready.json", folder / "server.log"
    ready.unlink(missing_ok=True)  # of a former server on this folder
    command = [sys.executable, "-m", module, "serve", "--model", "wan-tiny", "--address", "127.0.0.1:0"]
    command += ["--metrics-port", "0", "--data-dir", str(folder / "data"), "--ready-file", str(ready), *options]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as server:
        try:
            endpoint = _endpoint(server, ready, log)
            yield LocalServer(endpoint["address"], endpoint["metrics_port"], server, log)
            server.send_signal(signal.SIGTERM)
            try:
                code = server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise ServerFailed(_with_log(f"the server did not stop within {STOP_SECONDS:.0f} s", log)) from error
            if code != 0:
                raise ServerFailed(_with_log(f"the server exited with {code} on SIGTERM", log))
        finally:
            if server.poll() is None:
                server.kill()


def _endpoint(server: subprocess.Popen[bytes], ready: Path, log: Path) -> dict[str, Any]:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ServerFailed(_with_log(f"the server exited with {server.returncode} before it was ready", log))
        try:
            endpoint: dict[str, Any] = json.loads(ready.read_text())
            return endpoint
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(0.1)
    raise ServerFailed(_with_log(f"the server was not ready within {READY_SECONDS:.0f} s", log))


def _with_log(message: str, log: Path) -> str:
    tail = log.read_text(errors="replace").splitlines()[-40:]
    return "\n".join([f"{message}; its log ends with:", *tail])
