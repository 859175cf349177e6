"""style.toml: what a style says about itself."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cinecat.plugins.errors import StyleError, near_miss, quoted

MANIFEST_NAME = "style.toml"
MAX_MANIFEST_BYTES = 64 * 1024

_LINE = r"^[^\x00-\x1f\x7f]*$"
_Line = Annotated[str, Field(max_length=200, pattern=_LINE, description="one line of at most 200 characters")]
_TriggerWord = Annotated[str, Field(min_length=1, max_length=64, pattern=_LINE)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
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
        str,
        Field(
            max_length=255,
            pattern=r"^[^/\\.\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*\.safetensors$",
            description="the name of a .safetensors file in the style's own folder, without a path",
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
    # Multiplier on the style's effect when the request gives none.
    default_strength: Annotated[
        float,
        Field(ge=-4.0, le=4.0, description="a number from -4 to 4"),
    ] = 1.0
    license: _Line = ""
    author: _Line = ""

    @property
    def version_key(self) -> tuple[int, ...]:
        """The version as numbers, for comparing."""
        return tuple(int(part) for part in self.version.split("."))


_ADAPTER = TypeAdapter(StyleManifest)
_ALLOWED = {key: schema["description"] for key, schema in _ADAPTER.json_schema(mode="validation")["properties"].items()}


def read_manifest(folder: Path) -> StyleManifest:
    """Reads a style folder's manifest and checks that its weights are a file of that folder.

    Raises:
        StyleError: naming the key that is wrong and what it allows.
    """
    table = _read_table(_own_file(folder, MANIFEST_NAME, MANIFEST_NAME))
    for key in table:
        if key not in _ALLOWED:
            near = near_miss(key, _ALLOWED)
            hint = f"did you mean {near}?" if near else f"the keys are {', '.join(_ALLOWED)}"
            raise StyleError(f"{MANIFEST_NAME}: {quoted(key)} is not a key; {hint}")
    try:
        manifest = StyleManifest(**table)
    except ValidationError as error:
        key = str(error.errors(include_url=False)[0]["loc"][0])
        found = f"is {quoted(table[key])}" if key in table else "is missing"
        raise StyleError(f"{MANIFEST_NAME}: {key} {found}; it must be {_ALLOWED[key]}") from None
    _own_file(folder, manifest.weights, f"{MANIFEST_NAME}: weights")
    return manifest


def _read_table(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise StyleError(f"{MANIFEST_NAME}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise StyleError(f"{MANIFEST_NAME}: has more than {MAX_MANIFEST_BYTES} bytes; shorten it")
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise StyleError(f"{MANIFEST_NAME}: is not UTF-8 text; save it as UTF-8") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise StyleError(f"{MANIFEST_NAME}: is not valid TOML: {error}") from error


def _own_file(folder: Path, name: str, subject: str) -> Path:
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
