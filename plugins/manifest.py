"""style.toml: what a style says about itself."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cinecat.plugins.errors import StyleError, near_miss, quoted

T = TypeVar("T")

# tomllib takes time by the square of the parts of a dotted key and more: seconds for a few kilobytes.
_KEY_PARTS = 8
_DEEP_KEY = re.compile(rf"(?:[\w-]*[ \t]*\.[ \t]*){{{_KEY_PARTS}}}")
_STRINGS = re.compile(r'"""(?:[^\\]|\\.)*?"""|' r"'''.*?'''|" r'"(?:[^"\\\n]|\\.)*"|' r"'[^'\n]*'|#[^\n]*", re.DOTALL)

MANIFEST_NAME = "style.toml"
MAX_MANIFEST_BYTES = 64 * 1024
MAX_PREVIEW_BYTES = 2 * 1024 * 1024
PROMPT = "{prompt}"

PREVIEW_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}

_LINE = r"^[^\x00-\x1f\x7f]*$"
_Line = Annotated[str, Field(max_length=200, pattern=_LINE, description="one line of at most 200 characters")]
_TriggerWord = Annotated[str, Field(min_length=1, max_length=64, pattern=_LINE)]


def _fits_a_file_system(name: str) -> str:
    if len(name.encode()) > 255:  # a ValueError too: a character that is none
        raise ValueError(name)
    return name


_FileName = Annotated[str, AfterValidator(_fits_a_file_system)]
_CONFIG = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class BaseDims:
    """Sizes of the transformer that a style was made for; what is None goes unchecked."""

    dim: Annotated[
        int | None,
        Field(ge=1, le=2**20, description="a whole number from 1 to 1048576: channels of a token, 5120 in Wan2.1 14B"),
    ] = None
    ffn_dim: Annotated[
        int | None,
        Field(ge=1, le=2**20, description="a whole number from 1 to 1048576: width of the feed-forward layers"),
    ] = None
    layers: Annotated[
        int | None, Field(ge=1, le=1000, description="a whole number from 1 to 1000: transformer blocks")
    ] = None


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class SamplerDefaults:
    """How a style wants to be sampled where the request does not say; None leaves it to the model."""

    steps: Annotated[int | None, Field(ge=1, le=10_000, description="a whole number from 1 to 10000")] = None
    guidance_scale: Annotated[
        float | None, Field(ge=0.0, le=30.0, allow_inf_nan=False, description="a number from 0 to 30")
    ] = None
    # Of the noise schedule: above 1 spends more of the steps on the noisy part.
    shift: Annotated[
        float | None, Field(ge=0.01, le=100.0, allow_inf_nan=False, description="a number from 0.01 to 100")
    ] = None


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class StyleManifest:
    """A style's own description. The description of each field says what it allows."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9][a-z0-9-]{0,63}$",
            description="1 to 64 lower-case letters, digits and dashes, not starting with a dash",
        ),
    ]
    version: Annotated[
        str,
        Field(
            pattern=r"^(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){2}$",
            description='three numbers as a string, like "1.0.0"',
        ),
    ]
    title: Annotated[
        str,
        Field(min_length=1, max_length=80, pattern=_LINE, description="one line of 1 to 80 characters"),
    ]
    # Family of models that the style was made for.
    base_model: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
            description='a model family of 1 to 64 characters, like "wan2.1-i2v-14b"',
        ),
    ]
    weights: Annotated[
        _FileName,
        Field(
            pattern=r"^[^/\\.\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*\.safetensors$",
            description="the name of a .safetensors file in the style's own folder, without a path, of at most 255 "
            "bytes",
        ),
    ]
    description: Annotated[str, Field(max_length=2000, description="text of at most 2000 characters")] = ""
    # Of the weights file; empty leaves it unchecked.
    sha256: Annotated[
        str,
        Field(pattern=r"^([0-9a-fA-F]{64})?$", description="the 64 hexadecimal digits that sha256sum prints"),
    ] = ""
    trigger_words: Annotated[
        tuple[_TriggerWord, ...],
        Field(strict=False, max_length=32, description="a list of at most 32 strings of 1 to 64 characters"),
    ] = ()
    # What becomes of a request's prompt, e.g. "film noir, {prompt}"; empty leaves it as it is.
    prompt_template: Annotated[
        str,
        Field(
            max_length=1000,
            pattern=r"^([^\x00-\x1f\x7f]*\{prompt\}[^\x00-\x1f\x7f]*)?$",
            description="one line of at most 1000 characters that holds {prompt}",
        ),
    ] = ""
    # Multiplier on the style's effect when the request gives none.
    default_strength: Annotated[
        float,
        Field(ge=-4.0, le=4.0, description="a number from -4 to 4"),
    ] = 1.0
    license: _Line = ""
    author: _Line = ""
    # A picture or a short clip of what the style does.
    preview: Annotated[
        _FileName,
        Field(
            pattern=r"^([^/\\.\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*\.(png|jpg|jpeg|webp|mp4|webm))?$",
            description="the name of a .png, .jpg, .jpeg, .webp, .mp4 or .webm file in the style's own folder, "
            "without a path, of at most 255 bytes",
        ),
    ] = ""
    base_dims: Annotated[
        BaseDims,
        Field(description="a table with dim, ffn_dim and layers, whole numbers"),
    ] = BaseDims()
    sampler: Annotated[
        SamplerDefaults,
        Field(description="a table with steps, guidance_scale and shift, numbers"),
    ] = SamplerDefaults()

    @property
    def version_key(self) -> tuple[int, ...]:
        """The version as numbers, for comparing."""
        return tuple(int(part) for part in self.version.split("."))


def _allowed(kind: Any) -> dict[str, str]:
    """What each key of a table must be."""
    properties = TypeAdapter(kind).json_schema(mode="validation")["properties"]
    return {key: schema["description"] for key, schema in properties.items()}


_TABLES: Mapping[str, Any] = {"base_dims": BaseDims, "sampler": SamplerDefaults}
_ALLOWED: Mapping[Any, dict[str, str]] = {kind: _allowed(kind) for kind in (StyleManifest, BaseDims, SamplerDefaults)}
KEYS = tuple(_ALLOWED[StyleManifest])


class ManifestError(StyleError):
    """A manifest whose keys are wrong.

    Attributes:
        key: the first of them, e.g. "version" or "sampler.steps"; empty when the text is not TOML.
        problem: what is wrong with it, and what it allows.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"{MANIFEST_NAME}: {f'{self.key} {self.problem}'.strip()}"


def read_manifest(folder: Path) -> StyleManifest:
    """Reads a style folder's manifest and checks that its files are files of that folder.

    Raises:
        StyleError: naming the key that is wrong and what it allows.
    """
    manifest = parse_manifest(_text(own_file(folder, MANIFEST_NAME, MANIFEST_NAME)))
    own_file(folder, manifest.weights, f"{MANIFEST_NAME}: weights")
    if manifest.preview:
        preview = own_file(folder, manifest.preview, f"{MANIFEST_NAME}: preview")
        if preview.stat().st_size > MAX_PREVIEW_BYTES:
            raise ManifestError("preview", f"has more than {MAX_PREVIEW_BYTES} bytes; make it smaller")
    return manifest


def parse_manifest(text: str) -> StyleManifest:
    """Reads the text of a style.toml, whatever files there are.

    Raises:
        ManifestError: naming the key that is wrong and what it allows.
    """
    if _DEEP_KEY.search(_STRINGS.sub("", text)):
        raise ManifestError("", f"has a key of more than {_KEY_PARTS} parts; no key here has more than two")
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError: also a number of too many digits
        raise ManifestError("", f"is not valid TOML: {error}") from error
    return make_manifest(table)


def make_manifest(table: Mapping[str, Any]) -> StyleManifest:
    """Checks the keys of a manifest.

    Raises:
        ManifestError: naming the key that is wrong and what it allows.
    """
    tables = {
        name: _checked(kind, table[name], f"{name}.") if isinstance(table.get(name), Mapping) else table[name]
        for name, kind in _TABLES.items()
        if name in table
    }
    return _checked(StyleManifest, {**table, **tables})


def _checked(kind: type[T], table: Mapping[str, Any], prefix: str = "") -> T:
    allowed = _ALLOWED[kind]
    for key in table:
        if key not in allowed:
            near = near_miss(key, allowed)
            hint = f"did you mean {near}?" if near else f"the keys are {', '.join(allowed)}"
            raise ManifestError(quoted(f"{prefix}{key}"), f"is not a key; {hint}")
    try:
        return kind(**table)
    except ValidationError as error:
        key = str(error.errors(include_url=False)[0]["loc"][0])
    found = f"is {quoted(table[key])}" if key in table else "is missing"
    raise ManifestError(f"{prefix}{key}", f"{found}; it must be {allowed[key]}")


def write_manifest(manifest: StyleManifest) -> str:
    """The text of a style.toml that reads as `manifest`; what has its default is left out."""
    lines, tables = [], []
    for key in KEYS:
        value = getattr(manifest, key)
        if isinstance(value, BaseDims | SamplerDefaults):
            given = {name: number for name in _ALLOWED[type(value)] if (number := getattr(value, name)) is not None}
            if given:
                tables += ["", f"[{key}]", *(f"{name} = {_toml(number)}" for name, number in given.items())]
        elif value not in ("", ()):
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join([*lines, *tables, ""])


def _toml(value: object) -> str:
    # A JSON string, list or finite number is TOML too, apart from the DEL character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ManifestError("", f"cannot be read ({error.strerror})") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError("", f"has more than {MAX_MANIFEST_BYTES} bytes; shorten it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError("", "is not UTF-8 text; save it as UTF-8") from error


def own_file(folder: Path, name: str, subject: str) -> Path:
    """The real path of a regular file that lies in `folder`, links followed."""
    try:
        path = (folder / name).resolve(strict=True)
        inside = path.is_relative_to(folder.resolve(strict=True))
        regular = path.is_file()
    except FileNotFoundError:
        raise StyleError(f"{subject}: there is no file {quoted(name)} in the folder; put it there") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise StyleError(f"{subject}: {quoted(name)} cannot be read ({error})") from error
    if not inside:
        raise StyleError(f"{subject}: {quoted(name)} is a link out of the style's folder; copy the file into it")
    if not regular:
        raise StyleError(f"{subject}: {quoted(name)} is not a regular file; replace it by one")
    return path
