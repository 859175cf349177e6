"""Uploads and removals of styles: what may become a style of this server, and what may go."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import grpc
import structlog

from cinecat.plugins.errors import shown
from cinecat.plugins.installed import InstalledStyles, StagedStyle, UploadError, VersionTaken
from cinecat.plugins.manifest import (
    MAX_MANIFEST_BYTES,
    ManifestError,
    StyleManifest,
    make_manifest,
    parse_manifest,
)
from cinecat.plugins.registry import Style, UnknownStyle
from cinecat.plugins.sources import Origin
from cinecat.server.errors import RequestError, Violation, invalid
from cinecat.server.style_models import StyleModels
from cinecat.v1 import styles_pb2

T = TypeVar("T")

# Each may fill the disk with a file of the largest size.
MAX_UPLOADS = 4
IDLE_SECONDS = 60.0
# An upload that trickles would hold its place for ever.
LEAST_BYTES_A_SECOND = 16 * 1024

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_UNVERSIONED = "0.0.0"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Installation:
    """What an upload came to.

    Attributes:
        unchanged: the same content was there already.
        notes: what whoever sent it should know.
    """

    style: Style
    unchanged: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Announced:
    """The first message of an upload. `manifest` has no version of its own when `numbered`; `fields` is what names its
    keys in the request.
    """

    manifest: StyleManifest
    numbered: bool
    fields: str


class StyleInstaller:
    """Installs and removes styles. One upload or removal of a name at a time."""

    def __init__(
        self,
        installed: InstalledStyles,
        catalogue: StyleModels,
        max_bytes: int,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        """`idle_seconds` is how long an upload may send nothing."""
        self._installed = installed
        self._catalogue = catalogue
        self._max_bytes = max_bytes
        self._idle_seconds = idle_seconds
        self._busy: set[str] = set()
        self._uploads = 0

    async def install(self, parts: AsyncIterator[styles_pb2.InstallStyleRequest]) -> Installation:
        """Takes an upload in, checks it and publishes it; whatever goes wrong, nothing of it stays.

        Raises:
            RequestError: with the field that is wrong.
        """
        parts = aiter(parts)
        first = await self._next(parts)
        if first is None or first.WhichOneof("part") != "upload":
            raise invalid([Violation("upload", "must come first, and before any bytes")])
        upload = first.upload
        announced = await asyncio.to_thread(self._announced, upload)
        with self._claim(announced.manifest.name, uploads=1), _explained():
            announced = await asyncio.to_thread(self._numbered, announced)
            # Nothing is sent in vain where the checksum tells that it is there.
            sha256 = upload.sha256.lower()
            if sha256 and (same := await asyncio.to_thread(self._existing, announced, sha256, None)):
                return Installation(same, unchanged=True)
            # Not in a thread: a call that is cancelled meanwhile would leave the folder behind.
            with self._installed.begin(self._max_bytes) as staged:
                await self._receive(parts, staged, upload.size_bytes)
                return await _to_the_end(partial(self._finish, announced, staged))

    async def remove(self, name: str, version: str) -> Style | None:
        """Takes an installed style away; accepted jobs keep its weights on their own.

        Returns:
            The style as it was; None for one that was installed and could not be offered any more.

        Raises:
            RequestError: there is none, it is not clear which, or it did not come by an upload.
        """
        with self._claim(name[:64]), _explained():
            return await _to_the_end(partial(self._remove, name, version))

    def _announced(self, upload: styles_pb2.StyleUpload) -> _Announced:
        violations = []
        if upload.sha256 and not _SHA256.fullmatch(upload.sha256):
            violations.append(Violation("upload.sha256", f"{upload.sha256[:80]!r} is not 64 hexadecimal digits"))
        if not 0 <= upload.size_bytes <= self._max_bytes:
            allowed = f"is not between 0 and {self._max_bytes} (the server's setting max_style_mib)"
            violations.append(Violation("upload.size_bytes", f"{upload.size_bytes} {allowed}"))
        try:
            announced = self._manifest(upload)
        except ManifestError as error:
            if upload.WhichOneof("manifest") == "fields":
                field, problem = f"upload.fields.{error.key}", error.problem
            else:
                field, problem = "upload.toml", f"{error}"
            raise invalid([Violation(field, problem), *violations]) from error
        if upload.sha256 and announced.manifest.sha256.lower() not in ("", upload.sha256.lower()):
            violations.append(Violation("upload.sha256", "is not the sha256 of style.toml; correct one of them"))
        if violations:
            raise invalid(violations)
        if upload.sha256:
            announced = replace(announced, manifest=replace(announced.manifest, sha256=upload.sha256.lower()))
        return announced

    def _manifest(self, upload: styles_pb2.StyleUpload) -> _Announced:
        """Raises ManifestError, or RequestError when there is none."""
        kind = upload.WhichOneof("manifest")
        if kind is None:
            raise invalid([Violation("upload.fields", "is missing: say what the style is, here or in upload.toml")])
        if kind == "toml":
            if len(upload.toml.encode()) > MAX_MANIFEST_BYTES:
                raise ManifestError("", f"has more than {MAX_MANIFEST_BYTES} bytes; shorten it")
            return _Announced(parse_manifest(upload.toml), numbered=False, fields="toml")
        fields = upload.fields
        table: dict[str, Any] = {
            "name": fields.name,
            "version": fields.version or _UNVERSIONED,
            "title": fields.title or fields.name,
            "base_model": fields.base_model or self._catalogue.family,
            "weights": f"{fields.name}.safetensors",
            "trigger_words": list(fields.trigger_words),
            "base_dims": _set_fields(fields.base_dims),
            "sampler": _set_fields(fields.sampler),
        }
        for key in ("description", "prompt_template", "license", "author", "preview"):
            table[key] = getattr(fields, key)
        if fields.HasField("default_strength"):
            table["default_strength"] = fields.default_strength
        return _Announced(make_manifest(table), numbered=not fields.version, fields="fields")

    def _numbered(self, announced: _Announced) -> _Announced:
        """With a version of its own, above all there are."""
        if not announced.numbered:
            return announced
        versions = self._catalogue.versions(announced.manifest.name)
        major, minor, patch = versions[0].manifest.version_key if versions else (1, 0, -1)
        version = _after(major, minor, patch)
        while self._installed.folder(announced.manifest.name, version) is not None:  # one that cannot be offered
            version = _after(*map(int, version.split(".")))
        return replace(announced, manifest=replace(announced.manifest, version=version))

    def _existing(self, announced: _Announced, sha256: str, preview: bytes | None) -> Style | None:
        """The style that an upload would only repeat.

        Args:
            preview: that was sent; None before anything was.

        Raises:
            RequestError: its version is taken by something else.
        """
        manifest = announced.manifest
        for style in self._catalogue.versions(manifest.name):
            taken = style.manifest.version == manifest.version
            alike = style.fingerprint == sha256 and _alike(style.manifest, manifest, numbered=announced.numbered)
            if alike and manifest.preview and preview is None:
                return None  # that is still to be compared
            same = alike and (not manifest.preview or _preview(style) == preview)
            if same and (taken or announced.numbered):
                return style
            if taken:
                what = "other weights" if style.fingerprint != sha256 else "another style.toml"
                what = "another preview" if alike else what
                problem = f"{manifest.name} {manifest.version} exists with {what}; give this one a new version"
                raise _taken(announced, problem)
            if reason := _stays(style):
                # A newer version would change what everybody gets who asks for the name alone.
                problem = f"{reason}; give yours another name"
                violation = Violation("name", problem)
                raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, f"name: {problem}", [violation])
        return None

    async def _receive(
        self, parts: AsyncIterator[styles_pb2.InstallStyleRequest], staged: StagedStyle, announced_bytes: int
    ) -> None:
        started = time.monotonic()
        while (part := await self._next(parts)) is not None:
            if time.monotonic() - started > self._idle_seconds + staged.size_bytes / LEAST_BYTES_A_SECOND:
                slow = f"the upload sends less than {LEAST_BYTES_A_SECOND} bytes a second; start it again"
                raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, slow)
            match part.WhichOneof("part"):
                case "weights":
                    if announced_bytes and staged.size_bytes + len(part.weights) > announced_bytes:
                        raise UploadError("weights", f"has more than the announced {announced_bytes} bytes")
                    await _to_the_end(partial(staged.write_weights, part.weights))
                case "preview":
                    staged.write_preview(part.preview)
                case "upload":
                    raise invalid([Violation("upload", "came a second time; send one style per call")])
                case _:
                    raise invalid([Violation("weights", "is missing: a message held nothing")])
        if announced_bytes and staged.size_bytes < announced_bytes:
            cut = f"ended after {staged.size_bytes} of the announced {announced_bytes} bytes; send it again"
            raise UploadError("weights", cut)

    def _finish(self, announced: _Announced, staged: StagedStyle) -> Installation:
        manifest = announced.manifest
        header = staged.check(manifest)
        if (same := self._existing(announced, staged.sha256, staged.preview)) is not None:
            return Installation(same, unchanged=True)
        if misfit := self._catalogue.misfit(manifest, header):
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION, f"weights: {misfit}", [Violation("weights", misfit)]
            )
        try:
            staged.publish(manifest)
        except VersionTaken as error:
            raise _taken(announced, f"{error}") from error
        style = self._catalogue.find(manifest.name, manifest.version)
        log.info("style installed", style=manifest.name, version=manifest.version, bytes=staged.size_bytes)
        notes = []
        families = self._catalogue.families(manifest, header)
        if manifest.base_model not in families:
            notes.append(
                f"base_model: made for {manifest.base_model}; the server has {', '.join(families)}, whose layers fit"
            )
        return Installation(style, notes=tuple(notes))

    def _remove(self, name: str, version: str) -> Style | None:
        versions = self._catalogue.versions(name)
        chosen = [style for style in versions if version in ("", style.manifest.version)]
        if not chosen and version and (folder := self._installed.folder(name, version)) is not None:
            self._installed.remove(folder)
            return None
        if not chosen:
            try:
                self._catalogue.find(name, version)
            except UnknownStyle as error:
                raise invalid([Violation("name", f"{error}", missing=True)]) from error
        if len(chosen) > 1:
            there_are = ", ".join(style.manifest.version for style in chosen)
            raise invalid([Violation("version", f"must be set, because {name!r} has {there_are}")])
        style = chosen[0]
        if reason := _stays(style):
            raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, f"name: {reason}", [Violation("name", reason)])
        with contextlib.suppress(FileNotFoundError):  # somebody took the folder away
            self._installed.remove(style.folder)
        log.info("style removed", style=name, version=style.manifest.version)
        return style

    async def _next(
        self, parts: AsyncIterator[styles_pb2.InstallStyleRequest]
    ) -> styles_pb2.InstallStyleRequest | None:
        """The next message, None at the end of the stream."""
        try:
            async with asyncio.timeout(self._idle_seconds):
                return await anext(parts, None)
        except TimeoutError as error:
            idle = f"the upload sent nothing for {self._idle_seconds:g} s; start it again"
            raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, idle) from error

    @contextmanager
    def _claim(self, name: str, uploads: int = 0) -> Iterator[None]:
        if name in self._busy:
            busy = f"another upload or removal of {name!r} is running; try again when it has ended"
            raise RequestError(grpc.StatusCode.ABORTED, busy)
        if self._uploads + uploads > MAX_UPLOADS:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_UPLOADS} uploads are running, which is all that may; try later",
            )
        self._busy.add(name)
        self._uploads += uploads
        try:
            yield
        finally:
            self._busy.discard(name)
            self._uploads -= uploads


@contextmanager
def _explained() -> Iterator[None]:
    """Gives what can go wrong with an upload its status."""
    try:
        yield
    except UploadError as error:
        field = "upload.sha256" if error.part == "sha256" else error.part
        raise invalid([Violation(field, error.problem)]) from error
    except OSError as error:
        problem = f"the styles folder cannot be written now: {error.strerror}"
        raise RequestError(grpc.StatusCode.UNAVAILABLE, problem) from error


async def _to_the_end(work: Callable[[], T]) -> T:
    """Runs it in a thread, and waits for that thread also when the caller leaves: what it writes to is cleaned up after
    it, never under it.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            await task
        raise


def _after(major: int, minor: int, patch: int) -> str:
    """The next version; its numbers have at most nine digits."""
    if patch + 1 < 10**9:
        return f"{major}.{minor}.{patch + 1}"
    return f"{major}.{minor + 1}.0" if minor + 1 < 10**9 else f"{major + 1}.0.0"


def _taken(announced: _Announced, problem: str) -> RequestError:
    field = "upload.toml" if announced.fields == "toml" else "upload.fields.version"
    return RequestError(grpc.StatusCode.ALREADY_EXISTS, f"{field}: {problem}", [Violation(field, problem)])


def _alike(there: StyleManifest, sent: StyleManifest, *, numbered: bool) -> bool:
    """Whether two manifests say the same of the same weights, whatever the files are called."""
    ignored = {"weights", "sha256", *(("version",) if numbered else ())}
    ours, theirs = asdict(there), asdict(sent)
    return all(ours[key] == theirs[key] for key in ours if key not in ignored)


def _preview(style: Style) -> bytes:
    try:
        return (style.folder / style.manifest.preview).read_bytes()
    except OSError:
        return b""


def _stays(style: Style) -> str:
    """Why a style cannot be removed over the wire; empty when it can."""
    name = style.manifest.name
    match style.place.origin:
        case Origin.INSTALLED:
            return ""
        case Origin.BUNDLED:
            return f"{name!r} comes with Cinecat and stays"
        case Origin.PACKAGE:
            return f"{name!r} comes with the Python package {style.place.provider}; uninstall that"
        case _:
            return f"{name!r} was not uploaded; its folder {shown(style.folder)} is the operator's to remove"


def _set_fields(message: Any) -> dict[str, float]:
    return {descriptor.name: value for descriptor, value in message.ListFields()}
