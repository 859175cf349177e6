"""`cinecat top`: frames that fit the terminal, and what is said where there is nothing to see."""

from __future__ import annotations

import dataclasses
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
import typer
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from typer.testing import CliRunner

from cinecat import Client
from cinecat.clip import Job, job_from_proto
from cinecat.errors import CinecatError, InvalidRequest, ServerUnavailable
from cinecat.server.metrics import Metrics
from cinecat.server.scrapes import Figures, History, Latency, Scrape, figures
from cinecat.server.top import Look, scrape, top
from cinecat.server.top_view import NARROW, WIDE, Lost, Seen, draw
from cinecat.v1 import job_pb2 as pb
from tests.server.samples import new_job

NOBODY = "127.0.0.1:1"


def some_figures() -> Figures:
    registry = CollectorRegistry()
    Metrics(registry)
    history = History()
    history.add(Scrape.of(generate_latest(registry).decode(), 0.0))
    return dataclasses.replace(
        figures(history),
        model="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        queue={"interactive": 12, "batch": 345},
        tokens_per_second={"uniform": 123_456.0, "cat": 65_432.0},
        keep_ratio=0.5,
        memory={"resident": 40 * 2**30, "allocated": 70 * 2**30, "peak": 75 * 2**30, "available": 3 * 2**20},
        latencies=[Latency("end to end", "interactive", 1234.5, 3600.0, 12_345)],
        tenants={f"tenant-{number}": 0.1 for number in range(10)},
    )


def job(number: int, state: pb.JobState.ValueType, **progress: int) -> Job:
    made = new_job(f"{number:032x}")
    made.state, made.priority = state, pb.PRIORITY_BATCH
    made.clip.styles.add(name="a-style-with-a-long-name", strength=0.8)
    made.clip.styles.add(name="another", strength=0.2)
    made.progress.MergeFrom(pb.JobProgress(total_steps=30, wait_reason="no style slot is free", **progress))
    made.progress.eta.FromSeconds(3725)
    return job_from_proto(made)


def frame(width: int, height: int | None = None, *, running: int = 2, waiting: int = 100, lost: bool = False) -> str:
    seen = Seen(
        "gpu-host-17.studio.example:50051",
        datetime.now(),
        some_figures(),
        [job(number, pb.JOB_STATE_DENOISING, step=15) for number in range(running)],
        [job(100 + number, pb.JOB_STATE_QUEUED, queue_position=number) for number in range(waiting)],
        [Lost(datetime(2026, 1, 1, 22, 31, 7, tzinfo=UTC), "--metrics: nobody\x1b[2J " + "x" * 200)] if lost else [],
    )
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(draw(seen, width, height))
    return captured.get()


@pytest.mark.parametrize("width", [44, NARROW, 80, WIDE, 160])
def test_a_frame_fits_the_width_and_leaves_no_figure_out(width: int) -> None:
    text = frame(width)
    assert max(map(len, text.splitlines())) <= width
    for shown in ("15/30", "1:02:05", "denoising", "123,456/s", "keep ratio 0.50", "70 GiB", "1234.50 s", "AHEAD"):
        assert shown in text
    assert "and 257 more" in text  # of the 357 that wait, 100 are known
    assert (f"{1:032x}" in text) == (width >= WIDE)
    assert ("no style slot is free" in text) == (width >= WIDE)


@pytest.mark.parametrize(("width", "height"), [(80, 40), (80, 60), (44, 50), (160, 45)])
def test_a_frame_fits_the_height_where_that_can_be(width: int, height: int) -> None:
    for lost in (False, True):
        assert len(frame(width, height, lost=lost).splitlines()) == height


def test_what_does_not_answer_is_told_in_a_line_with_the_time() -> None:
    text = frame(80, lost=True)
    assert "not reachable" in text.splitlines()[0]
    assert text.splitlines()[1].startswith("since 22:31:07 --metrics: nobody")
    assert "\x1b" not in text


def test_with_nothing_to_do_it_says_so() -> None:
    assert "nothing runs" in frame(80, running=0, waiting=0)


def run(*arguments: str) -> BaseException:
    app = typer.Typer()
    app.command()(top)
    error = CliRunner().invoke(app, arguments).exception
    assert error is not None
    return error


@contextmanager
def web_page(status: int, text: str) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/metrics"
        finally:
            server.shutdown()


def metrics_text() -> str:
    registry = CollectorRegistry()
    Metrics(registry)
    return generate_latest(registry).decode()


def test_an_endpoint_that_cannot_be_reached_is_named_by_its_option() -> None:
    unreachable = run("--once", "--metrics", f"http://{NOBODY}/metrics")
    assert isinstance(unreachable, ServerUnavailable)
    assert unreachable.message.startswith(f"--metrics: http://{NOBODY}/metrics cannot be reached: ")
    with web_page(200, metrics_text()) as url:
        unreachable = run("--once", "--metrics", url, "--server", NOBODY)
    assert isinstance(unreachable, ServerUnavailable)
    assert unreachable.message.startswith(f"--server: no server answers at {NOBODY}: ")


def test_what_stops_answering_later_is_waited_out_and_told_since_when() -> None:
    with Client(NOBODY) as client:
        with web_page(200, metrics_text()) as url:
            look = Look(client, NOBODY, url)
            look.at_what_answers()
            assert look.lost.keys() == {"--server"}
            since = look.lost["--server"].since
        look.at_what_answers()
    assert look.lost.keys() == {"--server", "--metrics"}
    assert look.lost["--server"].since == since < look.lost["--metrics"].since
    assert look.seen().figures.queue == {"interactive": 0, "batch": 0}


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [(200, "<html>", "not in Prometheus' text format"), (200, "up 1\n", "no metrics of Cinecat"), (404, "", "404")],
)
def test_an_endpoint_of_something_else_is_not_taken_for_cinecat(status: int, text: str, said: str) -> None:
    with web_page(status, text) as url, pytest.raises(CinecatError, match=said):
        scrape(url)


def test_usage_that_cannot_be_meant_is_refused() -> None:
    for arguments in (("--metrics", "localhost:9464"), ()):
        error = run(*arguments)
        assert isinstance(error, InvalidRequest)
        assert "--metrics: 'localhost:9464' is no URL" in error.message or "use --once or --json" in error.message
