"""Reads the image of a request and refuses what no server can take."""

import os
from pathlib import Path
from typing import IO

from cinecat.errors import FieldViolation

ImageArgument = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]

MAX_IMAGE_BYTES = 32 * 1024 * 1024
_SIGNATURES = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"II*\x00",
    b"MM\x00*",
    b"II+\x00",
    b"MM\x00+",
)


def read(image: ImageArgument, violations: list[FieldViolation]) -> bytes:
    """The bytes of `image`: a path, bytes, or a binary file that is read from where it stands. What is wrong with it is
    appended to `violations`.
    """
    try:
        content = _content(image)
    except OSError as error:
        # OSError itself says "[Errno 2] ...", which is no help to a person.
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        violations.append(FieldViolation("clip.image", reason))
        return b""
    except (TypeError, ValueError) as error:
        violations.append(FieldViolation("clip.image", str(error)))
        return b""
    problem = _problem(content)
    if problem:
        violations.append(FieldViolation("clip.image", problem))
        return b""
    return content


def _content(image: ImageArgument) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        with Path(image).open("rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    reader = getattr(image, "read", None)
    if reader is None:
        raise TypeError(f"a {type(image).__name__} is not an image; give a path, bytes or a file opened in binary mode")
    content = reader(MAX_IMAGE_BYTES + 1)
    if not isinstance(content, bytes):
        raise TypeError("the file gives text; open it in binary mode ('rb')")
    return content


def _problem(content: bytes) -> str:
    if not content:
        return "is empty; allowed: a PNG, JPEG, WebP or TIFF file"
    if len(content) > MAX_IMAGE_BYTES:
        return f"is larger than {MAX_IMAGE_BYTES // 1024**2} MiB; scale it down or compress it"
    if content.startswith(_SIGNATURES) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP"):
        return ""
    return f"is not a PNG, JPEG, WebP or TIFF file (it starts with {content[:8]!r})"
