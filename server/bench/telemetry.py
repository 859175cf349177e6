"""`cinecat bench telemetry`: what metrics and tracing cost a denoising step.

Two real servers with the same engine and settings make the same clips in turn. One counts, is scraped every few
seconds and sends its traces to a collector on this machine; the other does none of it. What the engine core computes is
the same and varies by more than is looked for here, so only what the front spends between its calls is compared: a
clip's time from its first step to its first decode without the steps themselves, by the clocks of the server.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import numpy as np
from PIL import Image

from cinecat import Client
from cinecat.server.bench.harness import Check, Report, interleave
from cinecat.server.local_server import LocalServer, running_server
from cinecat.v1 import generation_pb2, generation_pb2_grpc
from cinecat.v1 import job_pb2 as pb

_GOAL = 0.01
_OPTIONS = ("--engine", "torch", "--threads", "1", "--max-batch", "1")
_SCRAPE_S = 2.0


@dataclass(frozen=True)
class _Sizes:
    """How much is measured."""

    pairs: int
    width: int = 128
    height: int = 128
    frames: int = 17
    steps: int = 60


_FULL, _QUICK = _Sizes(pairs=21), _Sizes(pairs=5)


@dataclass(frozen=True)
class _Spent:
    """Of one clip, in seconds a step: by the engine core, and by the front around it."""

    core: float
    front: float


def bench_telemetry(quick: bool, out: Path | None) -> Report:
    """Runs the benchmark; with `out`, writes its samples as CSV there."""
    sizes = _QUICK if quick else _FULL
    core_seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="cinecat-bench-") as scratch, contextlib.ExitStack() as stack:
        collector = stack.enter_context(_collector())
        folders = {side: Path(scratch) / side for side in ("on", "off")}
        for folder in folders.values():
            folder.mkdir()
        traced = ("--trace-endpoint", f"http://127.0.0.1:{collector.server_port}/v1/traces")
        on = stack.enter_context(running_server(folders["on"], *_OPTIONS, *traced))
        off = stack.enter_context(running_server(folders["off"], *_OPTIONS, module="cinecat.server.bench.unmeasured"))
        stack.enter_context(_scraped(on))

        image = Path(scratch) / "image.png"
        noise = np.random.default_rng(5).integers(0, 256, (sizes.height, sizes.width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image)

        def measure(server: LocalServer, number: int) -> float:
            spent = _clip(server, image, sizes)
            if number >= 0:
                core_seconds.append(spent.core)
            return spent.front

        samples = interleave(
            {"on": lambda number: measure(on, number), "off": lambda number: measure(off, number)}, sizes.pairs
        )
    step = statistics.median(core_seconds)
    costs = [(a - b) / step for a, b in zip(samples["on"], samples["off"], strict=True)]
    value = statistics.median(costs)
    low, _, high = statistics.quantiles(costs, n=4)
    report = Report(
        bench="telemetry",
        config={**asdict(sizes), "model": "wan-tiny", "options": list(_OPTIONS), "scrape_seconds": _SCRAPE_S},
        samples={"front_s_on": samples["on"], "front_s_off": samples["off"], "step_s": core_seconds},
        results=[],
        checks={"cost_of_a_step": Check(value, f"<= {_GOAL}", value <= _GOAL, (low, high))},
    )
    if out is not None:
        report.write_csv(out)
    return report


def _clip(server: LocalServer, image: Path, sizes: _Sizes) -> _Spent:
    """Makes a clip and tells what a step of it took."""
    with Client(server.address) as client:
        job = client.submit(
            image=image,
            prompt="a cat looks up",
            width=sizes.width,
            height=sizes.height,
            frames=sizes.frames,
            steps=sizes.steps,
            guidance=1.0,
            seed=1,
        )
    began = ended = 0
    with grpc.insecure_channel(server.address) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        for event in stub.Watch(generation_pb2.WatchRequest(job_id=job.job_id)):
            if event.job.state == pb.JOB_STATE_DENOISING and not began:
                began = event.time.ToNanoseconds()
            elif event.job.state == pb.JOB_STATE_DECODING and not ended:
                ended = event.time.ToNanoseconds()
            result = event.job.result
    core = sum(each.duration.ToNanoseconds() for each in result.timings if each.stage == pb.STAGE_DENOISE)
    return _Spent(core / 1e9 / sizes.steps, (ended - began - core) / 1e9 / sizes.steps)


@contextlib.contextmanager
def _collector() -> Iterator[ThreadingHTTPServer]:
    """Takes whatever is sent to it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def _scraped(server: LocalServer) -> Iterator[None]:
    """Reads a server's metrics every few seconds, as Prometheus does."""
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(_SCRAPE_S):
            with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
                answer.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
