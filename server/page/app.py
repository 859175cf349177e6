"""The routes: metrics, the page, and what it asks for in the wire contract's own messages as JSON."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import structlog
from google.protobuf.json_format import MessageToJson, ParseDict, ParseError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from cinecat.server.artifacts import ArtifactNotFoundError, ArtifactStore
from cinecat.server.errors import RequestError, Violation, explain, invalid, status_of
from cinecat.server.page.keys import COOKIE, READER, Keys, Viewer, is_addressed_to_loopback, is_loopback
from cinecat.server.page.posters import Posters
from cinecat.server.page.status import Served, Statuses, as_json
from cinecat.v1 import generation_pb2
from cinecat.v1 import job_pb2 as pb

_STATIC = Path(__file__).parent / "static"
_MONTH_S = 30 * 86_400
_MAX_SMALL_BODY = 4096
_BODY_S = 60
_BODY_MARGIN = 1 << 16
_BODIES_AT_ONCE = 2

# Nothing but what lies beside this module; pictures come also in the JSON.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{0,15})")

_HTTP = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 416,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
}

Endpoint = Callable[[Request], Awaitable[Response]]

log = structlog.get_logger(__name__)


class Page:
    """The HTTP side of a server.

    Attributes:
        served: None until the model is loaded, and again when the server stops.
        ready: whether jobs are taken.
    """

    def __init__(self, registry: CollectorRegistry, keys: Keys, host: str) -> None:
        """`host` is where the page is listened for."""
        self.served: Served | None = None
        self.ready = False
        self._for_this_machine = is_loopback(host)
        self._bodies = asyncio.Semaphore(_BODIES_AT_ONCE)
        self._statuses: Statuses | None = None
        self._registry = registry
        self._keys = keys
        self._posters: Posters | None = None
        job = "/api/jobs/{job_id}"
        self.app = Starlette(
            routes=[
                Route("/metrics", _guarded(self._metrics)),
                Route("/", _guarded(self._index)),
                Route("/{name:str}", _guarded(self._static)),
                Route("/api/session", _guarded(self._sign_in), methods=["POST"]),
                Route("/api/session", _guarded(self._sign_out), methods=["DELETE"]),
                Route("/api/status", _guarded(self._status)),
                Route("/api/jobs", _guarded(self._submit), methods=["POST"]),
                Route(f"{job}/cancel", _guarded(self._cancel), methods=["POST"]),
                Route(f"{job}/events", _guarded(self._events)),
                Route(f"{job}/poster", _guarded(self._poster)),
                Route(f"{job}/artifacts/{{name}}", _guarded(self._artifact)),
            ],
            exception_handlers={HTTPException: _no_such_route},
        )

    async def _metrics(self, request: Request) -> Response:
        try:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):  # of a header that is none
            encode, content_type = choose_encoder("")
        # A thread: what is running must not wait for it.
        text = await asyncio.to_thread(encode, self._registry)
        return Response(text, headers={"Content-Type": content_type})

    async def _index(self, request: Request) -> Response:
        key = request.query_params.get("key")
        if key is None:
            return FileResponse(_STATIC / "index.html")
        # The key does not stay in the address.
        answer = RedirectResponse("/", status_code=303)
        # Another site's link must not sign anybody in for whoever wrote it.
        if request.headers.get("sec-fetch-site") != "cross-site" and self._keys.viewer(key) is not None:
            _remember(answer, request, key)
        return answer

    async def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ("page.css", "page.js", "icon.svg"):
            raise RequestError(grpc.StatusCode.NOT_FOUND, "there is no such page")
        return FileResponse(_STATIC / name)

    async def _sign_in(self, request: Request) -> Response:
        _check_origin(request)
        body = await _json(request, _MAX_SMALL_BODY)
        key = body.get("key")
        if not isinstance(key, str) or (viewer := self._keys.viewer(key)) is None:
            raise RequestError(
                grpc.StatusCode.PERMISSION_DENIED, "key: is none of this server's; its operator has them (page_keys)"
            )
        answer = JSONResponse({"tenant": viewer.tenant})
        _remember(answer, request, key)
        return answer

    async def _sign_out(self, request: Request) -> Response:
        _check_origin(request)
        answer = JSONResponse({})
        answer.delete_cookie(_cookie(request))
        return answer

    async def _status(self, request: Request) -> Response:
        viewer = self._known(request)
        shown = viewer or READER
        found: dict[str, Any] = {
            "ready": self.ready,
            "viewer": {"tenant": shown.tenant, "may_act": shown.may_act},
        }
        if self.served is not None and viewer is not None:
            found |= await self._status_of(self.served).of(viewer)
        return JSONResponse(found)

    def _status_of(self, served: Served) -> Statuses:
        self._statuses = self._statuses or Statuses(served)
        return self._statuses

    async def _submit(self, request: Request) -> Response:
        viewer, served = self._actor(request), self._loaded()
        limit = served.fleet.models[0].limits.max_image_bytes * 4 // 3 + _BODY_MARGIN
        async with self._bodies:  # each takes several times its size while it is read
            body = await _json(request, limit)
            # A thread: an image in base64 takes a while to decode, and what is running must not wait for it.
            asked = await asyncio.to_thread(_submit_request, body)
            del body
            job = await served.generation.submit(asked, viewer.tenant, detached=True)
        return JSONResponse(as_json(job), status_code=201)

    async def _cancel(self, request: Request) -> Response:
        viewer = self._actor(request)
        job = await self._job(request, viewer)
        return JSONResponse(as_json(await self._loaded().jobs.cancel(job.job_id)))

    async def _events(self, request: Request) -> Response:
        """Server-sent events; each has its sequence number as id, from which a browser that lost them goes on."""
        viewer = self._viewer(request)
        job = await self._job(request, viewer)
        _check_may_act(viewer)  # whoever watches an attached job keeps it alive
        last = request.headers.get("last-event-id", "")
        after = int(last) if last.isdecimal() and len(last) < 19 else 0
        headers = {"X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(job.job_id, after), media_type="text/event-stream", headers=headers)

    async def _stream(self, job_id: str, after: int) -> AsyncIterator[str]:
        try:
            async with aclosing(self._loaded().jobs.watch(job_id, after)) as events:
                async for event in events:
                    text = MessageToJson(event, preserving_proto_field_name=True, indent=None)
                    yield f"id: {event.sequence}\ndata: {text}\n\n"
        except RequestError:
            return  # it stops, or the job is gone meanwhile; the browser asks again and is told

    async def _poster(self, request: Request) -> Response:
        job = await self._job(request, self._viewer(request))
        posters = self._posters = self._posters or Posters(self._loaded().artifacts)
        poster = await asyncio.to_thread(posters.poster, job)
        if poster is None:
            raise RequestError(grpc.StatusCode.NOT_FOUND, "the job has no video")
        return Response(
            poster, media_type="image/webp", headers={"Cache-Control": "private, max-age=86400", "Vary": "Cookie"}
        )

    async def _artifact(self, request: Request) -> Response:
        """All of a file, or the one range that is asked for; players ask for ranges."""
        job = await self._job(request, self._viewer(request))
        names = {artifact.name: artifact for artifact in job.result.artifacts}
        artifact = names.get(request.path_params["name"])
        if artifact is None:
            raise RequestError(grpc.StatusCode.NOT_FOUND, "the job has no such file")
        size, first, last, code = artifact.size_bytes, 0, artifact.size_bytes - 1, 200
        if (given := _RANGE.fullmatch(request.headers.get("range", ""))) is not None:
            first, code = int(given[1]), 206
            last = min(int(given[2]), last) if given[2] else last
            if not first <= last:
                return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        headers = {"Accept-Ranges": "bytes", "Content-Length": str(last - first + 1)}
        if code == 206:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        if request.method == "HEAD":
            return Response(status_code=code, headers=headers, media_type=artifact.mime_type)
        content = _read(self._loaded().artifacts, job.job_id, artifact.name, first, last - first + 1)
        return StreamingResponse(content, code, headers, media_type=artifact.mime_type)

    async def _job(self, request: Request, viewer: Viewer) -> pb.Job:
        """Another tenant's is as unknown as any."""
        return await self._loaded().jobs.get(request.path_params["job_id"], viewer.tenant)

    def _loaded(self) -> Served:
        if self.served is None:
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "the model is being loaded; try again in a moment")
        return self.served

    def _known(self, request: Request) -> Viewer | None:
        """None for a stranger who reached a page that is for this machine by another name: it may be that of a web
        site that resolves to this machine, whose scripts would then read what the page shows.
        """
        known = self._keys.viewer(request.cookies.get(_cookie(request)))
        if known is None and self._for_this_machine:
            return READER if is_addressed_to_loopback(request.headers.get("host", "")) else None
        return known or READER

    def _viewer(self, request: Request) -> Viewer:
        viewer = self._known(request)
        if viewer is None:
            raise RequestError(
                grpc.StatusCode.PERMISSION_DENIED, "the page is for this machine; sign in with a key first"
            )
        return viewer

    def _actor(self, request: Request) -> Viewer:
        _check_origin(request)
        viewer = self._viewer(request)
        _check_may_act(viewer)
        return viewer


def _check_may_act(viewer: Viewer) -> None:
    if not viewer.may_act:
        raise RequestError(grpc.StatusCode.PERMISSION_DENIED, "sign in with a key of this server first")


def _guarded(endpoint: Endpoint) -> Endpoint:
    """Answers errors as JSON, and every page with headers that keep others' scripts and frames out."""

    async def call(request: Request) -> Response:
        try:
            answer = await endpoint(request)
        except ArtifactNotFoundError as error:
            answer = _refusal(RequestError(grpc.StatusCode.NOT_FOUND, f"{error}"))
        except RequestError as error:
            answer = _refusal(error)
        except Exception as error:
            log.error("page failed", path=request.url.path, exc_info=error)
            answer = _refusal(RequestError(status_of(error), explain(error)))
        for name, value in _HEADERS.items():
            answer.headers.setdefault(name, value)
        return answer

    return call


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = grpc.StatusCode.NOT_FOUND if error.status_code == 404 else grpc.StatusCode.UNIMPLEMENTED
    body = {"code": code.name, "message": error.detail, "violations": []}
    return JSONResponse(body, error.status_code, {**_HEADERS, **(error.headers or {})})


def _submit_request(body: dict[str, Any]) -> generation_pb2.SubmitRequest:
    """Raises RequestError for what is none."""
    try:
        return ParseDict(body, generation_pb2.SubmitRequest())
    except (ParseError, RecursionError) as error:
        raise invalid([Violation("request", f"is no SubmitRequest: {error}")]) from error


async def _read(artifacts: ArtifactStore, job_id: str, name: str, offset: int, count: int) -> AsyncIterator[bytes]:
    """At most `count` bytes from `offset` on."""
    async with aclosing(artifacts.stream(job_id, name, offset)) as chunks:
        async for chunk in chunks:
            yield chunk[:count]
            count -= len(chunk)
            if count <= 0:
                return


def _refusal(error: RequestError) -> Response:
    violations = [{"field": each.field, "description": each.description} for each in error.violations]
    body = {"code": error.code.name, "message": error.message, "violations": violations}
    return JSONResponse(body, status_code=_HTTP.get(error.code, 500))


def _check_origin(request: Request) -> None:
    """Another site must not act with the key that this one has set; SameSite says so too, to browsers that heed it."""
    origin = request.headers.get("origin")
    try:
        other = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    except ValueError:
        other = True
    if other or request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise RequestError(grpc.StatusCode.PERMISSION_DENIED, "the page of another site may not do this")


async def _json(request: Request, limit: int) -> dict[str, Any]:
    """A body that is an object, read as far as the limit."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise invalid([Violation("request", "is not JSON; set Content-Type to application/json")])
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise invalid([Violation("request", f"is larger than {limit} bytes; send a smaller image")])
    except TimeoutError as error:
        raise invalid([Violation("request", f"was not whole within {_BODY_S} seconds")]) from error
    try:
        found = await asyncio.to_thread(_loads, body)
    except (ValueError, RecursionError) as error:
        raise invalid([Violation("request", f"is not JSON: {error}")]) from error
    if not isinstance(found, dict):
        raise invalid([Violation("request", "is not a JSON object")])
    return found


def _loads(body: bytearray) -> Any:
    """Raises ValueError or RecursionError."""
    found = json.loads(body)
    json.dumps(found, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    return found


def _cookie(request: Request) -> str:
    """Browsers keep one set of cookies for all ports of a machine, and there may be several servers on it."""
    return f"{COOKIE}_{request.scope['server'][1]}"


def _remember(answer: Response, request: Request, key: str) -> None:
    secure = request.url.scheme == "https"
    answer.set_cookie(_cookie(request), key, max_age=_MONTH_S, httponly=True, samesite="strict", secure=secure)
