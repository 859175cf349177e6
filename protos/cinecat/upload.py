"""A style on its way to the server: what it is and its files, as the messages of InstallStyle. No network I/O."""

import hashlib
import os
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict, Unpack

import grpc

from cinecat.errors import FieldViolation, ServerUnavailable, from_rpc, refuse
from cinecat.retry import Backoff
from cinecat.v1 import styles_pb2

CHUNK_BYTES = 512 * 1024
# A slower connection than this needs a larger `timeout_s`.
_SLOWEST_BYTES_PER_S = 256 * 1024
# What grpc.aio makes of the server's answer when that arrives while a chunk is being written.
_LOST_ANSWER = "Internal error from Core"
_MANIFEST_NAME = "style.toml"
_PLAIN = "name version title description base_model prompt_template default_strength license author".split()
_SAMPLER = {"steps": "steps", "guidance": "guidance_scale", "shift": "shift"}

OnProgress = Callable[[int, int], object]


class StyleArguments(TypedDict, total=False):
    """What a bare .safetensors file does not say about itself; a style.toml says it under the same keys.

    `name` is needed: lower-case letters, digits and dashes. Without `version` the server counts one up from the newest
    it has. `base_model` is the family of the server's model when left out. `prompt_template` holds "{prompt}".
    `default_strength` is -4 to 4. `preview` is an image or a short clip. `steps`, `guidance` and `shift` hold for
    requests that do not say.
    """

    name: str
    version: str
    title: str
    description: str
    base_model: str
    trigger_words: list[str]
    prompt_template: str
    default_strength: float | None
    license: str
    author: str
    preview: str | os.PathLike[str] | None
    steps: int | None
    guidance: float | None
    shift: float | None


class StyleUpload:
    """A style that is sent once.

    Attributes:
        size_bytes: of its weights.
        timeout_s: what the transfer may take beside the time that the server takes to answer.
    """

    def __init__(self, path: str | os.PathLike[str], **arguments: Unpack[StyleArguments]) -> None:
        """Reads a folder with a style.toml, or a .safetensors file that `arguments` describe.

        Raises:
            InvalidRequest: naming what is wrong.
            OSError: a file cannot be read.
        """
        given = {key: value for key, value in arguments.items() if value not in (None, "", [], ())}
        source = Path(path)
        if source.is_dir():
            if given and (source / _MANIFEST_NAME).is_file():
                names = ", ".join(given)
                raise refuse([FieldViolation("path", f"{source} has a {_MANIFEST_NAME}, which says: {names}; edit it")])
            self._upload, self._weights, self._preview = _from_folder(source)
        else:
            self._upload, self._weights, self._preview = _from_file(source, given)
        self.size_bytes = self._weights.stat().st_size
        self.timeout_s = self.size_bytes / _SLOWEST_BYTES_PER_S
        self._error: Exception | None = None
        # Progress is nothing to go on with: an upload that breaks off begins again, so only the connection is tried.
        self._backoff = Backoff(0.0)
        with self._weights.open("rb") as file:
            self._upload.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._upload.size_bytes = self.size_bytes

    def messages(self, on_progress: OnProgress | None = None) -> Iterator[styles_pb2.InstallStyleRequest]:
        """What to send, in order; `on_progress` hears the bytes sent and those there are."""
        try:
            yield styles_pb2.InstallStyleRequest(upload=self._upload)
            if self._preview is not None:
                for chunk in _chunks(self._preview):
                    yield styles_pb2.InstallStyleRequest(preview=chunk)
            sent = 0
            for chunk in _chunks(self._weights):
                yield styles_pb2.InstallStyleRequest(weights=chunk)
                sent += len(chunk)
                if on_progress is not None:
                    on_progress(sent, self.size_bytes)
        except Exception as error:
            self._error = error
            raise

    def delay_after(self, error: BaseException) -> float:
        """Seconds to wait before sending it again, after the call ended with `error`. Raises what a caller is to see
        when that makes no sense: whenever the server has answered.
        """
        # gRPC ends the call in its own way when making the messages fails.
        if self._error is not None:
            raise self._error from error
        if not isinstance(error, grpc.RpcError):
            raise error
        problem = from_rpc(error)
        unheard = isinstance(problem, ServerUnavailable) and not problem.connected
        if unheard or _LOST_ANSWER in problem.message:
            return self._backoff.delay_after_end(problem)
        raise problem from error


_Parts = tuple[styles_pb2.StyleUpload, Path, Path | None]


def _from_folder(folder: Path) -> _Parts:
    path = folder / _MANIFEST_NAME
    if not path.is_file():
        raise refuse([FieldViolation("path", f"{folder} has no {_MANIFEST_NAME}; add one, or send the weights file")])
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse([FieldViolation("path", f"{path} is not valid TOML: {error}")]) from error
    files: dict[str, Path | None] = {}
    for key in ("weights", "preview"):
        name = table.get(key)
        files[key] = None if name is None else _own_file(folder, key, name)
    if files["weights"] is None:
        raise refuse([FieldViolation("weights", f"is missing in {path}; name the .safetensors file")])
    return styles_pb2.StyleUpload(toml=text), files["weights"], files["preview"]


def _own_file(folder: Path, key: str, name: object) -> Path:
    """Only a file of the style's own folder is sent, whatever its style.toml says."""
    path = folder / str(name)
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself; a NUL
        inside = False
    if not isinstance(name, str) or Path(name).name != name or not inside:
        raise refuse([FieldViolation(key, f"{name!r} is not the name of a file in {folder}")])
    if not path.is_file():
        raise refuse([FieldViolation(key, f"there is no file {name!r} in {folder}")])
    return path


def _from_file(path: Path, given: dict[str, Any]) -> _Parts:
    violations = []
    if not path.is_file():
        violations.append(FieldViolation("path", f"{path} is neither a folder with a {_MANIFEST_NAME} nor a file"))
    elif path.suffix != ".safetensors":
        violations.append(FieldViolation("path", f"{path.name} is not a .safetensors file; convert it"))
    if not given.get("name"):
        violations.append(FieldViolation("name", "is missing: a weights file does not say what its style is called"))
    preview = Path(given["preview"]) if "preview" in given else None
    if preview is not None and not preview.is_file():
        violations.append(FieldViolation("preview", f"there is no file {preview}"))
    if violations:
        raise refuse(violations)
    fields = styles_pb2.StyleManifest(preview=preview.name if preview else "")
    for key, value in given.items():
        try:
            if key in _PLAIN:
                setattr(fields, key, value)
            elif key in _SAMPLER:
                setattr(fields.sampler, _SAMPLER[key], value)
            elif key == "trigger_words":
                if isinstance(value, str):
                    raise TypeError("a list of words is needed")
                fields.trigger_words.extend(value)
        except (TypeError, ValueError) as error:
            raise refuse([FieldViolation(key, f"{value!r} cannot be sent: {error}")]) from error
    return styles_pb2.StyleUpload(fields=fields), path, preview


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
