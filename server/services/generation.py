"""The Generation service: wire in, jobs out."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

import grpc

from cinecat.server.artifacts import ArtifactStore
from cinecat.server.errors import RequestError, Violation, invalid
from cinecat.server.fleet import Fleet
from cinecat.server.jobs import Jobs
from cinecat.server.lifecycle import state_name
from cinecat.server.profiles import Profiles
from cinecat.server.request_options import check_previews, check_priority
from cinecat.server.services.listing import job_filter
from cinecat.server.services.paging import decode_token, encode_token, page_size
from cinecat.server.services.tenants import tenant_of
from cinecat.server.tracing import traceparent_of
from cinecat.server.validation import AcceptableClip
from cinecat.v1 import clip_pb2, generation_pb2, generation_pb2_grpc, job_pb2

_MAX_REQUEST_ID = 64

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Request: TypeAlias = generation_pb2.GenerateRequest | generation_pb2.SubmitRequest


class GenerationService(generation_pb2_grpc.GenerationServicer):
    """Converts, delegates, converts back."""

    def __init__(
        self,
        jobs: Jobs,
        fleet: Fleet,
        artifacts: ArtifactStore,
        profiles: Profiles,
    ) -> None:
        self._jobs = jobs
        self._fleet = fleet
        self._artifacts = artifacts
        self._profiles = profiles
        # Its own threads: images that are slow to decode must not keep accepted jobs from theirs.
        self._checkers = ThreadPoolExecutor(2, thread_name_prefix="check")

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[job_pb2.JobEvent]:
        metadata = context.invocation_metadata()
        job = await self.submit(request, tenant_of(metadata), traceparent_of(metadata), detached=False)
        async with aclosing(self._jobs.watch(job.job_id, 0)) as events:
            async for event in events:
                yield event

    async def Submit(self, request: generation_pb2.SubmitRequest, context: Context) -> job_pb2.Job:  # noqa: N802
        metadata = context.invocation_metadata()
        return await self.submit(request, tenant_of(metadata), traceparent_of(metadata), detached=True)

    async def Watch(  # noqa: N802
        self, request: generation_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[job_pb2.JobEvent]:
        if request.after_sequence < 0:
            raise invalid([Violation("after_sequence", f"{request.after_sequence} is negative; 0 replays everything")])
        async with aclosing(self._jobs.watch(request.job_id, request.after_sequence)) as events:
            async for event in events:
                yield event

    async def GetJob(self, request: generation_pb2.GetJobRequest, context: Context) -> job_pb2.Job:  # noqa: N802
        return await self._jobs.get(request.job_id)

    async def ListJobs(  # noqa: N802
        self, request: generation_pb2.ListJobsRequest, context: Context
    ) -> generation_pb2.ListJobsResponse:
        wanted = job_filter(request)
        size = page_size(request.page_size)
        position = decode_token(request.page_token, int, str)
        before = None if position is None else (int(position[0]), str(position[1]))
        jobs = await self._jobs.page(size + 1, before, wanted)
        response = generation_pb2.ListJobsResponse(jobs=jobs[:size])
        if len(jobs) > size:
            last = jobs[size - 1]
            response.next_page_token = encode_token(last.create_time.ToMicroseconds(), last.job_id)
        return response

    async def CancelJob(self, request: generation_pb2.CancelJobRequest, context: Context) -> job_pb2.Job:  # noqa: N802
        return await self._jobs.cancel(request.job_id)

    async def ProfileJob(  # noqa: N802
        self, request: generation_pb2.ProfileJobRequest, context: Context
    ) -> AsyncIterator[generation_pb2.ProfiledStep]:
        async with aclosing(self._profiles.record(request.job_id, request.steps)) as steps:
            async for step in steps:
                yield step

    async def Download(  # noqa: N802
        self, request: generation_pb2.DownloadRequest, context: Context
    ) -> AsyncIterator[generation_pb2.DownloadChunk]:
        job = await self._jobs.get(request.job_id)
        artifact = _artifact(job, request.artifact)
        if not 0 <= request.offset <= artifact.size_bytes:
            raise RequestError(
                grpc.StatusCode.OUT_OF_RANGE,
                f"offset: {request.offset} is not between 0 and {artifact.size_bytes}, the size of {artifact.name}",
                [Violation("offset", f"{request.offset} is not between 0 and {artifact.size_bytes}")],
            )
        offset = request.offset
        async with aclosing(self._artifacts.stream(job.job_id, artifact.name, offset)) as chunks:
            async for data in chunks:
                yield generation_pb2.DownloadChunk(offset=offset, data=data, total_size_bytes=artifact.size_bytes)
                offset += len(data)

    async def submit(self, request: Request, tenant: str, traceparent: str = "", *, detached: bool) -> job_pb2.Job:
        """Turns a request into a persisted, queued job, or finds the one that it already became.

        Raises:
            RequestError: it is refused; the error names each field which is not allowed.
        """
        clip, request_id = request.clip, request.request_id
        if len(request_id) > _MAX_REQUEST_ID:
            allowed = f"has {len(request_id)} characters, at most {_MAX_REQUEST_ID} are allowed"
            raise invalid([Violation("request_id", allowed)])
        if "\0" in request_id:
            raise invalid([Violation("request_id", "holds the character U+0000; any other is allowed")])
        request_hash = await asyncio.to_thread(_hash, clip)
        if request_id and (earlier := await self._jobs.by_request_id(tenant, request_id)) is not None:
            return _same_request(earlier.job, earlier.request_hash == request_hash)
        self._fleet.admit(request_hash)
        acceptable = await self._in_checker(partial(self._fleet.check, clip))
        options = check_priority(request.priority) + check_previews(request.previews, acceptable.clip.steps)
        if options:
            raise invalid(options)
        self._fleet.admit(request_hash)
        job = job_pb2.Job(
            job_id=uuid.uuid4().hex,
            clip=acceptable.clip,
            request_id=request_id,
            detached=detached,
            progress=job_pb2.JobProgress(total_steps=acceptable.clip.steps, total_frames=acceptable.clip.frames),
            notes=acceptable.notes,
            priority=request.priority or (job_pb2.PRIORITY_BATCH if detached else job_pb2.PRIORITY_INTERACTIVE),
            previews=request.previews,
            traceparent=traceparent,
        )
        # A client that vanishes from here on leaves a job that is stored and queued, or none.
        return await asyncio.shield(asyncio.ensure_future(self._enqueue(job, request_hash, acceptable, tenant)))

    async def _in_checker(self, work: Callable[[], AcceptableClip]) -> AcceptableClip:
        return await asyncio.get_running_loop().run_in_executor(self._checkers, work)

    async def _enqueue(self, job: job_pb2.Job, request_hash: str, clip: AcceptableClip, tenant: str) -> job_pb2.Job:
        live, existing = await self._jobs.accept(job, clip.frame, request_hash, clip.weights, tenant)
        if live is None:
            assert existing is not None
            return _same_request(existing.job, existing.request_hash == request_hash)
        self._fleet.enqueue(live)
        return live.known


def _hash(clip: clip_pb2.ClipSpec) -> str:
    return hashlib.sha256(clip.SerializeToString(deterministic=True)).hexdigest()


def _same_request(job: job_pb2.Job, same: bool) -> job_pb2.Job:
    if same:
        return job
    violation = Violation("request_id", f"was used for another clip, job {job.job_id}; use a new one for each request")
    raise RequestError(grpc.StatusCode.ALREADY_EXISTS, f"{violation.field}: {violation.description}", [violation])


def _artifact(job: job_pb2.Job, name: str) -> job_pb2.Artifact:
    """Raises RequestError when the job has no such file, or none yet."""
    if job.state != job_pb2.JOB_STATE_SUCCEEDED:
        state = state_name(job.state)
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"job_id: job {job.job_id} is {state}; only succeeded jobs have files",
            [Violation("job_id", f"the job is {state}; only succeeded jobs have files")],
        )
    artifacts = {artifact.name: artifact for artifact in job.result.artifacts}
    if not name:
        return job.result.artifacts[0]
    if name not in artifacts:
        raise invalid([Violation("artifact", f"{name[:64]!r} is not one of {', '.join(artifacts)}", missing=True)])
    return artifacts[name]
