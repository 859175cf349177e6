"""The client for threads. `cinecat.aio` is its twin for asyncio; they share everything but the waiting."""

import os
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar, Unpack, overload

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

_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)


class _Unary(Protocol[_Request, _Response]):
    def __call__(self, request: _Request, *, timeout: float, metadata: Metadata) -> _Response: ...


class Client:
    """A connection to a Cinecat server. Safe to use from several threads; close it, or use it as a context manager.

    `timeout_s` bounds every call that answers once. A stream that breaks off is resumed for up to `patience_s` seconds
    after the last thing received. With `channel`, `address` is not used and the channel stays open; give it
    `cinecat.retry.CHANNEL_OPTIONS` to have its unary calls repeated while the server is unavailable. Every call is made
    for `tenant`, 1 to 64 of A-Z, a-z, 0-9, ".", "_" and "-"; tenants get equal shares of the server. InvalidRequest for
    another name.

    Methods raise CinecatError, and OSError when an output file cannot be written.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 30.0,
        patience_s: float = 60.0,
        channel: grpc.Channel | None = None,
        tenant: str | None = None,
    ) -> None:
        self._metadata = tenant_metadata(tenant)
        self._owned = grpc.insecure_channel(address, options=CHANNEL_OPTIONS) if channel is None else None
        channel = channel or self._owned
        assert channel is not None
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._generation = GenerationStub(channel)
        self._styles = StylesStub(channel)
        self._models = ModelsStub(channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection, unless it was given to the client."""
        if self._owned is not None:
            self._owned.close()

    def generate(
        self, *, output: str | os.PathLike[str] | None = None, **request: Unpack[RequestArguments]
    ) -> "Generation":
        """Makes a clip; see `RequestArguments` for `request`. Saves it at `output`, or keeps it in `Clip.data`.

        Checks the request now (InvalidRequest, RequestTooLarge); sends it once the Generation is iterated. The server
        cancels the job when nobody follows it; `submit` is for work that runs on its own.
        """
        return Generation(self, build_request(generation_pb2.GenerateRequest, **request), check_output(output))

    def submit(self, **request: Unpack[RequestArguments]) -> Job:
        """Hands a clip to the server, which makes it whether anyone watches or not."""
        message = build_request(generation_pb2.SubmitRequest, **request)
        return job_from_proto(self._call(self._generation.Submit, message))

    def watch(self, job_id: str, after_sequence: int = 0) -> Iterator[Progress | Finished]:
        """The events of a job after `after_sequence`, until it has ended; see `Generation` for what is raised. The clip
        of the Finished event was not fetched.
        """
        attachment = Attachment(patience_s=self._patience_s, job_id=job_id, after_sequence=after_sequence)
        return map(event_from_proto, self._follow(attachment))

    def history(self, job_id: str) -> tuple[Moment, ...]:
        """What a job went through up to now, in order: changes of state and the latest progress. Takes two seconds
        where it still runs. `cinecat.timeline.timeline` lays it out.
        """
        stream = self._generation.Watch(
            generation_pb2.WatchRequest(job_id=job_id), timeout=HISTORY_S, metadata=self._metadata
        )
        events: list[job_pb2.JobEvent] = []
        try:
            for event in stream:
                events.append(event)  # noqa: PERF402 - those before an error count
        except grpc.RpcError as error:
            problem = from_rpc(error, job_id=job_id)
            if not events or not isinstance(problem, ServerTimeout):
                raise problem from error
        return moments_from(events)

    def job(self, job_id: str) -> Job:
        return job_from_proto(self._get_job(job_id))

    def jobs(
        self,
        states: Iterable[JobState | str] = (),
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        style: str = "",
    ) -> Iterator[Job]:
        """All jobs in one of `states` (none means all), newest first. Pages are fetched as they are needed.

        `since` and `until` bound the time of creation, `until` excluded; a datetime without a time zone is local time.
        `style` is the name of one that the clip wears.
        """
        request = list_request(states, since, until, style)
        while True:
            page = self._call(self._generation.ListJobs, request)
            yield from map(job_from_proto, page.jobs)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def cancel(self, job_id: str) -> Job:
        """Asks a job to stop. The job that comes back may still be stopping, or may have ended before."""
        request = generation_pb2.CancelJobRequest(job_id=job_id)
        return job_from_proto(self._call(self._generation.CancelJob, request, job_id=job_id))

    def profile(self, job_id: str, steps: int = 1) -> Iterator[ProfiledStep]:
        """Has the coming steps of a job recorded by torch's profiler, for operators: the server's setting profile_dir
        allows it. They come as they are recorded, fewer where the job ends before.
        """
        stream = self._generation.ProfileJob(
            generation_pb2.ProfileJobRequest(job_id=job_id, steps=steps), metadata=self._metadata
        )
        try:
            for recorded in stream:
                yield ProfiledStep(recorded.step, recorded.path)
        except grpc.RpcError as error:
            raise from_rpc(error, job_id=job_id) from error
        finally:
            stream.cancel()  # type: ignore[no-untyped-call]

    @overload
    def download(self, job_id: str, output: None = None, artifact: str = "") -> bytes: ...
    @overload
    def download(self, job_id: str, output: str | os.PathLike[str], artifact: str = "") -> Path: ...
    def download(self, job_id: str, output: str | os.PathLike[str] | None = None, artifact: str = "") -> bytes | Path:
        """Fetches an artifact of a job, the first one if `artifact` is empty: its bytes, or the path it was saved at.

        Resumes when the connection breaks off. Raises DownloadCorrupted when size or SHA-256 are not the job's.
        """
        path = check_output(output)
        return self._fetch(self._get_job(job_id), path, artifact)

    def styles(self) -> StyleList:
        request = styles_pb2.ListStylesRequest()
        pages = [self._call(self._styles.ListStyles, request)]
        while pages[-1].next_page_token:
            request.page_token = pages[-1].next_page_token
            pages.append(self._call(self._styles.ListStyles, request))
        return style_list(pages)

    def style(self, name: str, version: str = "", *, with_preview: bool = False) -> StyleInfo:
        """One style; the newest version if `version` is empty. `with_preview` fetches the bytes of its preview."""
        request = styles_pb2.GetStyleRequest(name=name, version=version, with_preview=with_preview)
        return style_from_proto(self._call(self._styles.GetStyle, request))

    def install_style(
        self,
        path: str | os.PathLike[str],
        *,
        on_progress: OnProgress | None = None,
        **style: Unpack[StyleArguments],
    ) -> InstalledStyle:
        """Uploads a style: a folder with a style.toml, or a .safetensors file described by `style`.

        It appears on the server whole or not at all. `on_progress` hears the bytes sent and those there are. Raises
        AlreadyExists for a version that exists with other content, Conflict while somebody else uploads the name.
        """
        upload = StyleUpload(path, **style)
        timeout = self._timeout_s + upload.timeout_s
        while True:
            try:
                answer = self._styles.InstallStyle(
                    upload.messages(on_progress), timeout=timeout, metadata=self._metadata
                )
            except grpc.RpcError as error:
                delay = upload.delay_after(error)
            else:
                return installed_from_proto(answer)
            time.sleep(delay)

    def remove_style(self, name: str, version: str = "") -> StyleInfo:
        """Takes an installed style away and returns it as it was; `version` may be empty where there is only one.
        Accepted jobs finish with it.
        """
        request = styles_pb2.RemoveStyleRequest(name=name, version=version)
        return style_from_proto(self._call(self._styles.RemoveStyle, request).style)

    def warm_style(self, name: str, version: str = "") -> StyleInfo:
        """Loads a style into a slot; the newest version if `version` is empty."""
        request = styles_pb2.WarmStyleRequest(name=name, version=version)
        return style_from_proto(self._call(self._styles.WarmStyle, request))

    def models(self) -> list[ModelInfo]:
        answer = self._call(self._models.ListModels, models_pb2.ListModelsRequest())
        return list(map(model_from_proto, answer.models))

    def _call(self, method: _Unary[_Request, _Response], request: _Request, *, job_id: str = "") -> _Response:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error, job_id=job_id) from error

    def _get_job(self, job_id: str) -> job_pb2.Job:
        return self._call(self._generation.GetJob, generation_pb2.GetJobRequest(job_id=job_id), job_id=job_id)

    def _follow(self, attachment: Attachment) -> Iterator[job_pb2.JobEvent]:
        while not attachment.has_ended():
            request = attachment.next_request()
            if isinstance(request, generation_pb2.GenerateRequest):
                stream = self._generation.Generate(request, metadata=self._metadata)
            else:
                stream = self._generation.Watch(request, metadata=self._metadata)
            broken: grpc.RpcError | None = None
            try:
                for event in stream:
                    if attachment.accept(event):
                        yield event
                    if attachment.has_ended():
                        return
            except grpc.RpcError as error:
                broken = error
            finally:
                stream.cancel()  # type: ignore[no-untyped-call]
            time.sleep(attachment.delay_after(broken))

    def _fetch(self, job: job_pb2.Job, output: Path | None, artifact: str) -> bytes | Path:
        chosen = select_artifact(job, artifact)
        with Transfer(job.job_id, chosen, output, patience_s=self._patience_s) as transfer:
            while not transfer.complete:
                stream = self._generation.Download(transfer.next_request(), metadata=self._metadata)
                broken: grpc.RpcError | None = None
                try:
                    for chunk in stream:
                        transfer.accept(chunk)
                except grpc.RpcError as error:
                    broken = error
                finally:
                    stream.cancel()  # type: ignore[no-untyped-call]
                if not transfer.complete:
                    time.sleep(transfer.delay_after(broken))
            return transfer.finish()


class Generation:
    """A clip in the making: iterate it for its events, or call `result`.

    Nothing is sent before that. The last event is a Finished, whose clip has been fetched. Iterating raises JobFailed,
    JobCancelled, ServerUnavailable and the errors of the request; `result` raises the same again.
    """

    def __init__(self, client: Client, request: generation_pb2.GenerateRequest, output: Path | None) -> None:
        self._client = client
        self._output = output
        self._attachment = Attachment(patience_s=client._patience_s, generate=request)
        self._events = self._run()
        self._clip: Clip | None = None
        self._error: Exception | None = None

    @property
    def job_id(self) -> str:
        """Empty until the first event."""
        return self._attachment.job_id

    def __iter__(self) -> Iterator[Progress | Finished]:
        return self

    def __next__(self) -> Progress | Finished:
        try:
            event = next(self._events)
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise
        if isinstance(event, Finished):
            self._clip = event.clip
        return event

    def result(self) -> Clip:
        """Waits for the end and returns the clip."""
        for _ in self:
            pass
        if self._clip is not None:
            return self._clip
        raise self._error or CinecatError("the generation was abandoned before its end", job_id=self.job_id)

    def cancel(self) -> None:
        """Asks the server to stop the job; iterating it then raises JobCancelled. May be called from any thread."""
        self._attachment.cancel_wanted = True
        if self._attachment.must_cancel():
            self._client.cancel(self.job_id)

    def _run(self) -> Generator[Progress | Finished, None, None]:
        if self._attachment.cancel_wanted:
            raise JobCancelled("cancelled before it was sent")
        for message in self._client._follow(self._attachment):
            if self._attachment.must_cancel():
                self._client.cancel(self.job_id)
            event = event_from_proto(message)
            if isinstance(event, Finished):
                fetched = self._client._fetch(message.job, self._output, "")
                event = replace(event, clip=event.clip.fetched(fetched))
            yield event
