"""`cinecat bench chaos`: the engine core, and the whole server, killed at random moments under load.

Clients keep a few jobs in the server at all times, of six kinds: plain, guided, styled, two styles, merged tokens, a
long one. Each kill comes a random moment after some running job's first checkpoint was written. In the end every
accepted job must have succeeded, once, with whole files, and its frames must be those of the same request on a server
that nobody killed, bit for bit (`--max-batch 1`: jobs that share a forward may differ in their last bits).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from safetensors.numpy import load

from cinecat import AsyncClient, CinecatError, Finished
from cinecat.server.bench.harness import Check, Report
from cinecat.server.local_server import LocalServer, ServerFailed, running_server

CHECKPOINT_STEPS = 4
_OPTIONS = ("--checkpoint-steps", f"{CHECKPOINT_STEPS}", "--max-batch", "1", "--engine", "torch", "--threads", "1")

_KILLS, _QUICK_KILLS = 20, 2
_AT_ONCE = 5  # jobs in the server
_MOMENT_S = 1.5  # a kill comes within this after a checkpoint was seen
_PATIENCE_S = 300.0

_PLAIN: dict[str, Any] = {"width": 128, "height": 128, "frames": 9, "steps": 30, "guidance": 1.0}
KINDS: tuple[dict[str, Any], ...] = (
    {**_PLAIN, "priority": "interactive"},
    {**_PLAIN, "guidance": 3.0},
    {**_PLAIN, "style": "noir:0.8"},
    {**_PLAIN, "style": ["noir:0.4", "amber:0.6"], "priority": "interactive"},
    {**_PLAIN, "tokenization": "cat", "keep_ratio": 0.5},
    {**_PLAIN, "frames": 17, "steps": 60},
)


@dataclass
class _Followed:
    """A job as its watcher saw it.

    Attributes:
        repeated: for each time that it began anew, steps that were done before and are to be done again.
    """

    kind: int
    job_id: str
    highest: int = 0
    repeated: list[int] = field(default_factory=list)
    succeeded: int = 0
    failure: str = ""


@dataclass
class _Findings:
    """What the kills did."""

    kills: dict[str, int] = field(default_factory=lambda: {"core": 0, "server": 0})
    jobs: list[_Followed] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)
    resumed: int = 0


def bench_chaos(quick: bool, out: Path | None) -> Report:
    """Runs the benchmark; with `out`, writes its samples there as CSV."""
    kills = _QUICK_KILLS if quick else _KILLS
    with tempfile.TemporaryDirectory(prefix="cinecat-bench-") as scratch:
        findings = asyncio.run(chaos(Path(scratch), kills, kills))
    report = _report(findings, kills)
    if out is not None:
        report.write_csv(out)
    return report


def _report(found: _Findings, kills: int) -> Report:
    lost = [job.job_id for job in found.jobs if job.succeeded == 0]
    twice = [job.job_id for job in found.jobs if job.succeeded > 1]
    repeated = [steps for job in found.jobs for steps in job.repeated]

    def count(value: float, goal: str, met: bool) -> Check:
        return Check(value, goal, met, (value, value))

    return Report(
        bench="chaos",
        config={"kinds": list(KINDS), "jobs_at_once": _AT_ONCE, "options": list(_OPTIONS), "model": "wan-tiny"},
        samples={"repeated_steps": repeated or [0.0]},
        results=[
            {"killed": name, "times": times, "jobs": len(found.jobs), "taken_up_again": found.resumed}
            for name, times in found.kills.items()
        ]
        + [{"job": job.job_id, "failure": job.failure} for job in found.jobs if job.failure],
        checks={
            "kills": count(sum(found.kills.values()), f">= {2 * kills}", sum(found.kills.values()) >= 2 * kills),
            "lost_jobs": count(len(lost), "<= 0", not lost),
            "jobs_done_twice": count(len(twice), "<= 0", not twice),
            "torn_artifacts": count(len(found.torn), "<= 0", not found.torn),
            "unequal_resumes": count(len(found.unequal), "<= 0", not found.unequal),
            "repeated_steps_max": count(
                max(repeated, default=0), f"<= {CHECKPOINT_STEPS}", max(repeated, default=0) <= CHECKPOINT_STEPS
            ),
        },
    )


async def chaos(
    folder: Path, core_kills: int, server_kills: int, kinds: Sequence[dict[str, Any]] = KINDS, at_once: int = _AT_ONCE
) -> _Findings:
    """Does what the module says, so many times each.

    Args:
        kinds: of jobs, as arguments of `AsyncClient.submit`.
        at_once: jobs in the server.

    Raises:
        ServerFailed: a server did not come up again.
    """
    image = folder / "image.png"
    noise = np.random.default_rng(5).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image)
    shots = [_shot(kind, image, more) for kind, more in enumerate(kinds)]
    expected = await _reference(folder, shots)
    server = _Server(folder / "chaos")
    await server.start()
    found = _Findings()
    try:
        async with AsyncClient(server.address, patience_s=_PATIENCE_S) as client:
            stop = asyncio.Event()
            busy = [_keep_busy(client, shots, found, stop, range(first, 10**6, at_once)) for first in range(at_once)]
            load = [asyncio.create_task(each) for each in busy]
            try:
                kills = ["core"] * core_kills + ["server"] * server_kills
                random.Random(3).shuffle(kills)
                for kill in kills:
                    await server.some_checkpoint()
                    await asyncio.sleep(random.random() * _MOMENT_S)
                    if kill == "core":
                        server.kill_core()
                    else:
                        await server.kill_and_restart()
                    found.kills[kill] += 1
            finally:
                stop.set()
                await asyncio.gather(*load)
            found.resumed = sum(bool(job.repeated) for job in found.jobs)
            for job in found.jobs:
                if job.succeeded:
                    await _check_files(client, job, expected[job.kind], shots[job.kind]["frames"], found)
        found.torn += server.leftovers()
    finally:
        await server.stop()
    return found


async def _reference(folder: Path, shots: Sequence[dict[str, Any]]) -> list[str]:
    """What each shot's frames are on a server that nobody kills, as hashes."""
    server = _Server(folder / "reference")
    await server.start()
    try:
        async with AsyncClient(server.address) as client:
            hashes = []
            for kind, shot in enumerate(shots):
                job = await client.submit(**shot)
                await _until_finished(client, _Followed(kind, job.job_id))
                hashes.append(_frames_hash(await client.download(job.job_id, artifact="frames.safetensors")))
            return hashes
    finally:
        await server.stop()


def _shot(kind: int, image: Path, more: dict[str, Any]) -> dict[str, Any]:
    """What is asked for, the same each time."""
    prompt = f"a chaotic shot, kind {kind}"
    return {"image": image, "prompt": prompt, "seed": kind, "artifacts": ["mp4", "frames_f32"], **more}


async def _keep_busy(
    client: AsyncClient, shots: Sequence[dict[str, Any]], found: _Findings, stop: asyncio.Event, numbers: Iterable[int]
) -> None:
    """Has one job after the other made, each of another kind than the one before."""
    for number in numbers:
        if stop.is_set():
            return
        kind = number % len(shots)
        job = await _patiently(lambda kind=kind: client.submit(**shots[kind]))  # type: ignore[misc]
        followed = _Followed(kind, job.job_id)
        found.jobs.append(followed)
        try:
            await _until_finished(client, followed)
        except CinecatError as error:
            followed.failure = f"{error}"


async def _patiently(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeats a call while the server is away, beyond the patience that the client has for it."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return await call()
        except CinecatError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


async def _until_finished(client: AsyncClient, job: _Followed) -> None:
    begins_anew = False
    async for event in client.watch(job.job_id):
        if isinstance(event, Finished):
            job.succeeded += 1
            continue
        if event.state == "queued":
            job.highest = max(job.highest, event.step)
            begins_anew = job.highest > 0
        elif event.state == "denoising":
            if begins_anew:
                job.repeated.append(max(0, job.highest - event.step))
                begins_anew = False
            job.highest = max(job.highest, event.step)


async def _check_files(client: AsyncClient, job: _Followed, expected: str, count: int, found: _Findings) -> None:
    """The download itself checks each file's SHA-256 against what the job says."""
    frames = await client.download(job.job_id, artifact="frames.safetensors")
    if _frames_hash(frames) != expected:
        found.unequal.append(job.job_id)
    movie = await client.download(job.job_id, artifact="clip.mp4")
    if await asyncio.to_thread(_frame_count, movie) != count:
        found.torn.append(job.job_id)


def _frames_hash(file: bytes) -> str:
    return hashlib.sha256(load(file)["frames"].tobytes()).hexdigest()


def _frame_count(movie: bytes) -> int:
    import io

    with av.open(io.BytesIO(movie)) as container:
        return sum(1 for _ in container.decode(video=0))


class _Server:
    """A server on one port and one folder that can be killed and comes back."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._context: Any = None
        self._running: LocalServer | None = None

    async def start(self) -> None:
        self._context = running_server(self._folder, "--address", self.address, *_OPTIONS)
        self._running = await asyncio.to_thread(self._context.__enter__)

    async def stop(self) -> None:
        await asyncio.to_thread(self._context.__exit__, None, None, None)

    async def kill_and_restart(self) -> None:
        assert self._running is not None
        self._running.process.kill()
        with suppress(ServerFailed):  # which it is to do
            await self.stop()
        await self.start()

    def kill_core(self) -> None:
        assert self._running is not None
        os.kill(self._running.core_pid, signal.SIGKILL)

    async def some_checkpoint(self) -> None:
        """Waits until some job has one that was written since the call."""
        since = time.time()
        while not self._saved_after(since):  # noqa: ASYNC110 - it is another process that writes them
            await asyncio.sleep(0.02)

    def _saved_after(self, since: float) -> bool:
        for path in (self._folder / "data" / "checkpoints").glob("*.safetensors"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime > since:
                    return True
        return False

    def leftovers(self) -> list[str]:
        """What is left of jobs that are all done."""
        data = self._folder / "data"
        folders = (data / "artifacts" / ".scratch", data / "inputs", data / "checkpoints")
        return [f"{path}" for folder in folders if folder.exists() for path in folder.iterdir() if path.is_file()]
