"""Recordings of a job's steps, for the operators of a server: asked for while it runs or waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc

from cinecat.server.errors import RequestError, Violation, invalid
from cinecat.server.jobs import Jobs
from cinecat.server.lifecycle import state_name
from cinecat.server.live_job import LiveJob
from cinecat.server.settings import SettingsError
from cinecat.v1 import generation_pb2

MOST_STEPS = 20


def open_profiles(folder: Path | None) -> Path | None:
    """Makes the folder, without what a killed core left half-written. Raises SettingsError."""
    if folder is None:
        return None
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*-step-*.json.gz"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(f"profile_dir: {folder} cannot be written: {error}") from error
    return folder


def next_profile(folder: Path | None, live: LiveJob) -> str:
    """The file that a job's coming step is to be recorded in; empty for none."""
    if folder is None or not live.profile_steps:
        return ""
    return str(folder / f"{live.job_id}-step-{live.job.progress.step + 1}.json.gz")


async def note_profile(live: LiveJob, path: str) -> None:
    """Takes note of a step that was to be recorded, and whether it was."""
    written = await asyncio.to_thread(Path(path).exists)
    live.profile_steps -= 1
    if written:
        live.profiles[live.job.progress.step + 1] = path
        live.log.info("step recorded", path=path)


class Profiles:
    """Has steps recorded, where the operator allows it."""

    def __init__(self, jobs: Jobs, folder: Path | None) -> None:
        self._jobs = jobs
        self._folder = folder

    async def record(self, job_id: str, steps: int) -> AsyncGenerator[generation_pb2.ProfiledStep, None]:
        """The coming steps of a job as they are recorded, until all are or the job has ended. Whoever leaves before
        ends the recording.

        Args:
            steps: how many; 0 is 1.

        Raises:
            RequestError: it may not be; the error says why.
        """
        if self._folder is None:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "this server records no steps; its operator allows it with the setting profile_dir",
            )
        if not 0 <= steps <= MOST_STEPS:
            raise invalid([Violation("steps", f"{steps} is not between 1 and {MOST_STEPS}")])
        job = await self._jobs.get(job_id)
        live = self._jobs.live(job_id)
        if live is None or live.ended:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"job_id: job {job_id} is {state_name(job.state)}; only a job that waits or runs has steps to record",
                [Violation("job_id", f"the job is {state_name(job.state)}")],
            )
        if live.profile_steps:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"job_id: steps of job {job_id} are being recorded already; wait for them",
            )
        known = set(live.profiles)
        wanted = len(known) + (steps or 1)
        live.profile_steps = steps or 1
        try:
            while True:
                changed = live.changed
                for step in sorted(live.profiles.keys() - known):
                    known.add(step)
                    yield generation_pb2.ProfiledStep(step=step, path=live.profiles[step])
                if not live.profile_steps and len(known) < wanted and not live.ended:
                    message = "profile_dir: a recording could not be written; the server's log says why"
                    raise RequestError(grpc.StatusCode.UNAVAILABLE, message)
                if not live.profile_steps or live.ended:
                    return
                await changed.wait()
        finally:
            live.profile_steps = 0
