"""`cinecat bench watchers`: what 200 watchers cost the jobs that they watch.

One real server makes the same 20 clips again and again, with a preview after every step and every frame as soon as it
is decoded: watched by ten streams each in one half of the rounds, by nobody in the other. Of the ten, five read what
comes, three stop for a second or more after every event, and two read one event and never another. They live in a
process of their own, with a connection for each of the ten, and take what processor time the server leaves them, as
they would from other machines. No two clips share a forward (`--max-batch 1`), so that all steps are the same work.

A step's seconds are the engine core's own. What the front does beside it shows in the seconds of a whole round, and in
the front's processor time; both are reported.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from cinecat import Client, Previews
from cinecat.server.bench.harness import Check, Report, interleave, ratio_check
from cinecat.server.lifecycle import FINAL_STATES
from cinecat.server.local_server import LocalServer, running_server
from cinecat.v1 import generation_pb2, generation_pb2_grpc

_OPTIONS = ("--engine", "torch", "--threads", "1", "--max-batch", "1")

_STEP_RATIO_GOAL = 1.03
_RSS_GROWTH_GOAL_MIB = 64

_QUICK_READER, _NEVER = 0.0, float("inf")
_PAUSES_S = (*[_QUICK_READER] * 5, 1.0, 1.5, 2.0, *[_NEVER] * 2)
"""Of each job's watchers, after every event."""

_PATIENCE_S = 300.0
_POLL_S = 0.25


@dataclass(frozen=True)
class _Sizes:
    """How much is measured."""

    pairs: int
    jobs: int = 20
    width: int = 96
    height: int = 96
    frames: int = 9
    steps: int = 5


@dataclass(frozen=True)
class _Read:
    """What the watchers of one round saw.

    Attributes:
        events: that were read.
        faults: events that did not come after the one before, and streams that did not end in one final event.
    """

    events: int
    faults: int


def bench_watchers(quick: bool, out: Path | None) -> Report:
    """Runs the benchmark; with `out`, writes its samples there as CSV."""
    sizes = _Sizes(pairs=2, steps=3) if quick else _Sizes(pairs=15)
    with (
        tempfile.TemporaryDirectory(prefix="cinecat-bench-") as scratch,
        running_server(Path(scratch), *_OPTIONS) as server,
        _callers(server.address) as callers,
        Client(server.address) as client,
    ):
        rounds = _Rounds(server, client, callers, sizes, Path(scratch))
        steps = interleave(
            {"watched": lambda number: rounds.play(number, True), "alone": lambda number: rounds.play(number, False)},
            sizes.pairs,
        )
    report = _report(sizes, steps, rounds)
    if out is not None:
        report.write_csv(out)
    return report


def _report(sizes: _Sizes, steps: Mapping[str, Sequence[float]], rounds: _Rounds) -> Report:
    samples = {f"step_s_{side}": values for side, values in steps.items()}
    for side in ("watched", "alone"):
        samples[f"round_s_{side}"] = rounds.seconds[side]
        samples[f"front_cpu_s_{side}"] = rounds.front_cpu[side]
    peaks = [peak - rounds.rss_before for peak in rounds.rss_peaks]
    samples["front_rss_growth_mib"] = peaks
    faults = [float(read.faults) for read in rounds.read]
    growth = max(peaks)
    return Report(
        bench="watchers",
        config={**asdict(sizes), "pauses_s": list(map(str, _PAUSES_S)), "model": "wan-tiny", "options": list(_OPTIONS)},
        samples=samples,
        results=[{"events_read_a_round": statistics.median(read.events for read in rounds.read)}],
        checks={
            "watched_step_ratio": ratio_check(samples["step_s_watched"], samples["step_s_alone"], _STEP_RATIO_GOAL),
            "watched_round_ratio": ratio_check(samples["round_s_watched"], samples["round_s_alone"]),
            "front_rss_growth_mib": Check(
                growth, f"<= {_RSS_GROWTH_GOAL_MIB}", growth <= _RSS_GROWTH_GOAL_MIB, (min(peaks), growth)
            ),
            "events_out_of_order": Check(sum(faults), "<= 0", not sum(faults), (min(faults), max(faults))),
        },
    )


class _Rounds:
    """Plays rounds, and keeps what was measured in those that count.

    Attributes:
        seconds: of the rounds, by side: from the first request to the last job's end.
        front_cpu: processor seconds of the front, likewise.
        rss_before: of the front after the warm-up, MiB.
        rss_peaks: of the front, the most in each round, MiB.
        read: what the watchers saw.
    """

    def __init__(self, server: LocalServer, client: Client, callers: Connection, sizes: _Sizes, folder: Path) -> None:
        self._server, self._client, self._callers, self._sizes = server, client, callers, sizes
        self._front = Path(f"/proc/{server.process.pid}")
        self._image = folder / "image.png"
        noise = np.random.default_rng(5).integers(0, 256, (sizes.height, sizes.width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(self._image)
        self.seconds: dict[str, list[float]] = {"watched": [], "alone": []}
        self.front_cpu: dict[str, list[float]] = {"watched": [], "alone": []}
        self.rss_before = 0.0
        self.rss_peaks: list[float] = []
        self.read: list[_Read] = []

    def play(self, number: int, watched: bool) -> float:
        """One round; mean seconds of a step in it. Those with a negative number are warm-up."""
        if number == 0 and not self.rss_before:
            self.rss_before = self._rss_mib()
        before, cpu, started = self._metrics(), self._cpu_seconds(), time.perf_counter()
        for seed in range(self._sizes.jobs):
            job_id = self._submit(seed)
            if watched:
                self._callers.send(job_id)
        peak = self._until_ended(_ended(before) + self._sizes.jobs)
        took, cpu, after = time.perf_counter() - started, self._cpu_seconds() - cpu, self._metrics()
        if watched:
            self._callers.send(None)
            read: _Read = self._callers.recv()
        if number >= 0:
            side = "watched" if watched else "alone"
            self.seconds[side].append(took)
            self.front_cpu[side].append(cpu)
            self.rss_peaks.append(peak)
            if watched:
                self.read.append(read)
        names = ("cinecat_step_seconds_sum", "cinecat_step_seconds_count")
        seconds, steps = (_total(after, name) - _total(before, name) for name in names)
        return seconds / steps

    def _submit(self, seed: int) -> str:
        sizes = self._sizes
        job = self._client.submit(
            image=self._image,
            prompt="a cat that is watched",
            width=sizes.width,
            height=sizes.height,
            frames=sizes.frames,
            steps=sizes.steps,
            guidance=1.0,
            seed=seed,
            previews=Previews(every_steps=1, frames=True),
        )
        return job.job_id

    def _until_ended(self, jobs: float) -> float:
        """Waits until so many jobs have ended since the server's start; the front's largest memory meanwhile, MiB.

        Raises TimeoutError.
        """
        deadline, peak = time.monotonic() + _PATIENCE_S, 0.0
        while _ended(self._metrics()) < jobs:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._sizes.jobs} jobs did not end within {_PATIENCE_S:.0f} s")
            peak = max(peak, self._rss_mib())
            time.sleep(_POLL_S)
        return max(peak, self._rss_mib())

    def _metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._server.metrics_port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        values = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in values}

    def _rss_mib(self) -> float:
        pages = int((self._front / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _cpu_seconds(self) -> float:
        fields = (self._front / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _total(metrics: Mapping[str, float], name: str) -> float:
    """Over all labels."""
    return sum(value for key, value in metrics.items() if key.partition("{")[0] == name)


def _ended(metrics: Mapping[str, float]) -> float:
    return _total(metrics, "cinecat_jobs_ended_total")


@contextmanager
def _callers(address: str) -> Iterator[Connection]:
    """The watchers' process. It is sent the ids of jobs to watch; after None it answers with a _Read."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_call, args=(address, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _call(address: str, connection: Connection) -> None:
    os.nice(10)
    with suppress(EOFError):
        asyncio.run(_serve_rounds(address, connection))


async def _serve_rounds(address: str, connection: Connection) -> None:
    own = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options=own) for _ in _PAUSES_S]
    stubs: list[Any] = [generation_pb2_grpc.GenerationStub(channel) for channel in channels]
    over, watching = asyncio.Event(), list[asyncio.Task[_Read]]()
    while True:
        job_id: str | None = await asyncio.to_thread(connection.recv)
        if job_id is not None:
            for stub, pause in zip(stubs, _PAUSES_S, strict=True):
                watching.append(asyncio.create_task(_watch(stub, job_id, pause, over)))
            continue
        over.set()
        read = await asyncio.gather(*watching)
        connection.send(_Read(sum(each.events for each in read), sum(each.faults for each in read)))
        over, watching = asyncio.Event(), []


async def _watch(stub: Any, job_id: str, pause_s: float, over: asyncio.Event) -> _Read:
    """Reads a job's events, with a pause after each, until the round is over; from then on without, until they end. A
    reader who never reads on leaves then.
    """
    events = faults = finals = last = 0
    stream = stub.Watch(generation_pb2.WatchRequest(job_id=job_id))
    try:
        async for event in stream:
            events += 1
            faults += event.sequence <= last or finals > 0
            last = event.sequence
            finals += event.job.state in FINAL_STATES
            if pause_s and not over.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), None if pause_s == _NEVER else pause_s)
                if pause_s == _NEVER:
                    stream.cancel()
                    return _Read(events, faults)
    except grpc.RpcError:
        faults += 1
    return _Read(events, faults + (finals != 1))
