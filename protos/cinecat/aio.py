"""The client for asyncio. `cinecat.client` is its twin for threads; they share everything but the waiting."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar, Unpack, overload

import grpc

from cinecat.attachment import Attachment
from cinecat.catalog import (
    InstalledStyle,
    ModelInfo,
    StyleInfo,
    StyleList,
    installed_from_proto,
    model_from_proto,
    style_from_proto,
    style_list,
)
from cinecat.clip import Clip, Job, ProfiledStep, job_from_proto
from cinecat.errors import CinecatError, JobCancelled, ServerTimeout, from_rpc
from cinecat.events import Finished, Progress, event_from_proto
from cinecat.request import RequestArguments, build_request, list_request
from cinecat.retry import CHANNEL_OPTIONS, DEFAULT_ADDRESS
from cinecat.states import JobState
from cinecat.tenant import Metadata, tenant_metadata
from cinecat.timeline import HISTORY_S, Moment, moments_from
from cinecat.transfer import Transfer, check_output, select_artifact
from cinecat.upload import OnProgress, StyleArguments, StyleUpload
from cinecat.v1 import generation_pb2, job_pb2, models_pb2, styles_pb2
from cinecat.v1.generation_pb2_grpc import GenerationStub
from cinecat.v1.models_pb2_grpc import ModelsStub
from cinecat.v1.styles_pb2_grpc import StylesStub

if TYPE_CHECKING:
    from grpc.aio import UnaryStreamCall

    from cinecat.v1.generation_pb2_grpc import GenerationAsyncStub
    from cinecat.v1.models_pb2_grpc import ModelsAsyncStub
    from cinecat.v1.styles_pb2_grpc import StylesAsyncStub

    _EventStream = (
        UnaryStreamCall[generation_pb2.GenerateRequest, job_pb2.JobEvent]
        | UnaryStreamCall[generation_pb2.WatchRequest, job_pb2.JobEvent]
    )

_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)


class _Unary(Protocol[_Request, _Response]):
    def __call__(self, request: _Request, *, timeout: float, metadata: Metadata) -> Awaitable[_Response]: ...


class AsyncClient:
    """A connection to a Cinecat server, for one event loop; `Client` says what the arguments mean.

    Methods raise CinecatError, and OSError when an output file cannot be written. Files are read
    and written in threads.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 30.0,
        patience_s: float = 60.0,
        channel: grpc.aio.Channel | None = None,
        tenant: str | None = None,
    ) -> None:
        self._metadata = tenant_metadata(tenant)
        self._address = address
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._given = channel
        self._owned: grpc.aio.Channel | None = None

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection, unless it was given to the client."""
        if self._owned is not None:
            await self._owned.close(grace=None)

    def generate(
        self, *, output: str | os.PathLike[str] | None = None, **request: Unpack[RequestArguments]
    ) -> "AsyncGeneration":
        """Makes a clip, as `Client.generate` does; the request is checked when the AsyncGeneration is iterated."""
        return AsyncGeneration(self, output, request)

    async def submit(self, **request: Unpack[RequestArguments]) -> Job:
        """Hands a clip to the server, which makes it whether anyone watches or not."""
        message = await asyncio.to_thread(lambda: build_request(generation_pb2.SubmitRequest, **request))
        return job_from_proto(await self._call(self._generation.Submit, message))

    async def watch(self, job_id: str, after_sequence: int = 0) -> AsyncIterator[Progress | Finished]:
        """The events of a job, as `Client.watch` gives them."""
        attachment = Attachment(patience_s=self._patience_s, job_id=job_id, after_sequence=after_sequence)
        async with aclosing(self._follow(attachment)) as messages:
            async for message in messages:
                yield event_from_proto(message)

    async def history(self, job_id: str) -> tuple[Moment, ...]:
        """What a job went through up to now, as `Client.history` gives it."""
        stream = self._generation.Watch(
            generation_pb2.WatchRequest(job_id=job_id), timeout=HISTORY_S, metadata=self._metadata
        )
        events: list[job_pb2.JobEvent] = []
        try:
            async for event in stream:
                events.append(event)  # noqa: PERF401 - those before an error count
        except grpc.RpcError as error:
            problem = from_rpc(error, job_id=job_id)
            if not events or not isinstance(problem, ServerTimeout):
                raise problem from error
        return moments_from(events)

    async def job(self, job_id: str) -> Job:
        return job_from_proto(await self._get_job(job_id))

    async def jobs(
        self,
        states: Iterable[JobState | str] = (),
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        style: str = "",
    ) -> AsyncIterator[Job]:
        """All jobs that the filters let through, newest first; `Client.jobs` says what they mean."""
        request = list_request(states, since, until, style)
        while True:
            page = await self._call(self._generation.ListJobs, request)
            for job in page.jobs:
                yield job_from_proto(job)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def cancel(self, job_id: str) -> Job:
        """Asks a job to stop. The job that comes back may still be stopping, or may have ended before."""
        request = generation_pb2.CancelJobRequest(job_id=job_id)
        return job_from_proto(await self._call(self._generation.CancelJob, request, job_id=job_id))

    async def profile(self, job_id: str, steps: int = 1) -> AsyncIterator[ProfiledStep]:
        """As `Client.profile`."""
        stream = self._generation.ProfileJob(
            generation_pb2.ProfileJobRequest(job_id=job_id, steps=steps), metadata=self._metadata
        )
        try:
            async for recorded in stream:
                yield ProfiledStep(recorded.step, recorded.path)
        except grpc.RpcError as error:
            raise from_rpc(error, job_id=job_id) from error
        finally:
            stream.cancel()

    @overload
    async def download(self, job_id: str, output: None = None, artifact: str = "") -> bytes: ...
    @overload
    async def download(self, job_id: str, output: str | os.PathLike[str], artifact: str = "") -> Path: ...
    async def download(
        self, job_id: str, output: str | os.PathLike[str] | None = None, artifact: str = ""
    ) -> bytes | Path:
        """Fetches an artifact of a job, as `Client.download` does."""
        path = await asyncio.to_thread(check_output, output)
        return await self._fetch(await self._get_job(job_id), path, artifact)

    async def styles(self) -> StyleList:
        request = styles_pb2.ListStylesRequest()
        pages = [await self._call(self._styles.ListStyles, request)]
        while pages[-1].next_page_token:
            request.page_token = pages[-1].next_page_token
            pages.append(await self._call(self._styles.ListStyles, request))
        return style_list(pages)

    async def style(self, name: str, version: str = "", *, with_preview: bool = False) -> StyleInfo:
        """One style; the newest version if `version` is empty. `with_preview` fetches the bytes of its preview."""
        request = styles_pb2.GetStyleRequest(name=name, version=version, with_preview=with_preview)
        return style_from_proto(await self._call(self._styles.GetStyle, request))

    async def install_style(
        self,
        path: str | os.PathLike[str],
        *,
        on_progress: OnProgress | None = None,
        **style: Unpack[StyleArguments],
    ) -> InstalledStyle:
        """Uploads a style, as `Client.install_style` does."""
        upload = await asyncio.to_thread(lambda: StyleUpload(path, **style))
        timeout = self._timeout_s + upload.timeout_s
        while True:
            try:
                parts = _in_thread(upload.messages(on_progress))
                answer = await self._styles.InstallStyle(parts, timeout=timeout, metadata=self._metadata)
            except (grpc.RpcError, asyncio.CancelledError) as error:
                delay = upload.delay_after(error)
            else:
                return installed_from_proto(answer)
            await asyncio.sleep(delay)

    async def remove_style(self, name: str, version: str = "") -> StyleInfo:
        """Takes an installed style away, as `Client.remove_style` does."""
        request = styles_pb2.RemoveStyleRequest(name=name, version=version)
        return style_from_proto((await self._call(self._styles.RemoveStyle, request)).style)

    async def warm_style(self, name: str, version: str = "") -> StyleInfo:
        """Loads a style into a slot; the newest version if `version` is empty."""
        request = styles_pb2.WarmStyleRequest(name=name, version=version)
        return style_from_proto(await self._call(self._styles.WarmStyle, request))

    async def models(self) -> list[ModelInfo]:
        answer = await self._call(self._models.ListModels, models_pb2.ListModelsRequest())
        return list(map(model_from_proto, answer.models))

    @property
    def _channel(self) -> grpc.aio.Channel:
        if self._given is not None:
            return self._given
        # A channel belongs to the loop that runs when it is made, and a client may be made before any runs.
        if self._owned is None:
            self._owned = grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        return self._owned

    @property
    def _generation(self) -> "GenerationAsyncStub":
        return GenerationStub(self._channel)

    @property
    def _styles(self) -> "StylesAsyncStub":
        return StylesStub(self._channel)

    @property
    def _models(self) -> "ModelsAsyncStub":
        return ModelsStub(self._channel)

    async def _call(self, method: _Unary[_Request, _Response], request: _Request, *, job_id: str = "") -> _Response:
        try:
            return await method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error, job_id=job_id) from error

    async def _get_job(self, job_id: str) -> job_pb2.Job:
        return await self._call(self._generation.GetJob, generation_pb2.GetJobRequest(job_id=job_id), job_id=job_id)

    async def _follow(self, attachment: Attachment) -> AsyncGenerator[job_pb2.JobEvent, None]:
        while not attachment.has_ended():
            request = attachment.next_request()
            stream = self._open(request)
            broken: grpc.RpcError | None = None
            try:
                async for event in stream:
                    if attachment.accept(event):
                        yield event
                    if attachment.has_ended():
                        return
            except grpc.RpcError as error:
                broken = error
            finally:
                stream.cancel()
            await asyncio.sleep(attachment.delay_after(broken))

    def _open(self, request: generation_pb2.GenerateRequest | generation_pb2.WatchRequest) -> "_EventStream":
        if isinstance(request, generation_pb2.GenerateRequest):
            return self._generation.Generate(request, metadata=self._metadata)
        return self._generation.Watch(request, metadata=self._metadata)

    async def _fetch(self, job: job_pb2.Job, output: Path | None, artifact: str) -> bytes | Path:
        chosen = select_artifact(job, artifact)
        with Transfer(job.job_id, chosen, output, patience_s=self._patience_s) as transfer:
            while not transfer.complete:
                stream = self._generation.Download(transfer.next_request(), metadata=self._metadata)
                broken: grpc.RpcError | None = None
                try:
                    async for chunk in stream:
                        await asyncio.to_thread(transfer.accept, chunk)
                except grpc.RpcError as error:
                    broken = error
                finally:
                    stream.cancel()
                if not transfer.complete:
                    await asyncio.sleep(transfer.delay_after(broken))
            return await asyncio.to_thread(transfer.finish)


class AsyncGeneration:
    """A clip in the making: iterate it for its events, or await `result`; `Generation` says what both raise."""

    def __init__(self, client: AsyncClient, output: str | os.PathLike[str] | None, arguments: RequestArguments) -> None:
        self._client = client
        self._output = output
        self._arguments = arguments
        self._attachment = Attachment(patience_s=client._patience_s)
        self._events = self._run()
        self._clip: Clip | None = None
        self._error: Exception | None = None

    @property
    def job_id(self) -> str:
        """Empty until the first event."""
        return self._attachment.job_id

    def __aiter__(self) -> AsyncIterator[Progress | Finished]:
        return self

    async def __anext__(self) -> Progress | Finished:
        try:
            event = await anext(self._events)
        except StopAsyncIteration:
            raise
        except Exception as error:
            self._error = error
            raise
        if isinstance(event, Finished):
            self._clip = event.clip
        return event

    async def result(self) -> Clip:
        """Waits for the end and returns the clip."""
        async for _ in self:
            pass
        if self._clip is not None:
            return self._clip
        raise self._error or CinecatError("the generation was abandoned before its end", job_id=self.job_id)

    async def cancel(self) -> None:
        """Asks the server to stop the job; iterating it then raises JobCancelled."""
        self._attachment.cancel_wanted = True
        if self._attachment.must_cancel():
            await self._client.cancel(self.job_id)

    async def _run(self) -> AsyncGenerator[Progress | Finished, None]:
        output = await asyncio.to_thread(check_output, self._output)
        request = await asyncio.to_thread(lambda: build_request(generation_pb2.GenerateRequest, **self._arguments))
        if self._attachment.cancel_wanted:
            raise JobCancelled("cancelled before it was sent")
        self._attachment.generate = request
        async with aclosing(self._client._follow(self._attachment)) as messages:
            async for message in messages:
                if self._attachment.must_cancel():
                    await self._client.cancel(self.job_id)
                event = event_from_proto(message)
                if isinstance(event, Finished):
                    fetched = await self._client._fetch(message.job, output, "")
                    event = replace(event, clip=event.clip.fetched(fetched))
                yield event


async def _in_thread(
    messages: Iterator[styles_pb2.InstallStyleRequest],
) -> AsyncIterator[styles_pb2.InstallStyleRequest]:
    """Reads files outside the loop."""
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message
