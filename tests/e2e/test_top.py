"""`cinecat top` beside a server that works."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys

import typer
from typer.testing import CliRunner

from cinecat import Client
from cinecat.server.local_server import LocalServer
from cinecat.server.top import top

INTERVAL = "0.5"


def run(server: LocalServer, *arguments: str) -> str:
    app = typer.Typer()
    app.command()(top)
    metrics = f"http://127.0.0.1:{server.metrics_port}/metrics"
    result = CliRunner().invoke(
        app, ["--server", server.address, "--metrics", metrics, "--interval", INTERVAL, *arguments]
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_running_job_and_one_that_waits_are_shown_with_what_the_engine_does(
    server: LocalServer, client: Client, frame_png: bytes
) -> None:
    shot = {"image": frame_png, "prompt": "a cat", "size": "64x64", "frames": 5, "guidance": 1.0, "style": "noir:0.8"}
    jobs = [client.submit(steps=100, tokenization="cat", keep_ratio=0.5, **shot) for _ in range(2)]  # type: ignore[arg-type]
    try:
        for event in client.watch(jobs[0].job_id):
            if getattr(event, "step", 0) >= 5:
                break
        found = json.loads(run(server, "--json"))
        text = run(server, "--once")
    finally:
        for job in jobs:
            client.cancel(job.job_id)
    listed = {job["job_id"]: job["status"] for job in (*found["jobs_running"], *found["jobs_waiting"])}
    assert listed.keys() >= {job.job_id for job in jobs}
    assert found["ready"]
    assert found["steps_per_second"] > 0.0
    assert found["tokens_per_second"]["cat"] > 0.0
    assert found["keep_ratio"] is not None
    assert found["keep_ratio"] < 1.0
    assert found["slots_resident"] >= 1
    assert found["memory"]["resident"] > 2**20
    assert jobs[0].job_id[:12] in text
    assert "/100" in text
    assert "noir:0.8" in text


def test_ctrl_c_gives_the_terminal_back_as_it_was(server: LocalServer) -> None:
    metrics = f"http://127.0.0.1:{server.metrics_port}/metrics"
    # A shell's background jobs have their children ignore Ctrl-C.
    call = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import typer; "
    call += "from cinecat.server.top import top; app = typer.Typer(); app.command()(top); app()"
    command = [sys.executable, "-c", call, "--server", server.address, "--metrics", metrics, "--interval", "0.2"]
    ours, its = pty.openpty()
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, start_new_session=True) as process:
        os.close(its)
        screen = b""
        while screen.count(b"style slots") < 3:
            screen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # which is how the end of a terminal reads
            while more := os.read(ours, 65536):
                screen += more
        assert process.wait(30) == 0
    os.close(ours)
    entered, left = screen.rindex(b"\x1b[?1049h"), screen.rindex(b"\x1b[?1049l")
    assert entered < left
    assert screen.rindex(b"\x1b[?25l") < screen.rindex(b"\x1b[?25h")
    assert b"Traceback" not in screen
