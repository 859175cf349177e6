"""What can be wrong with a style."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class StyleError(Exception):
    """A style that cannot be offered; the message is one sentence with the reason and the fix."""


class LoraError(StyleError):
    """A weights file that is not a LoRA that can be worn."""


def near_miss(word: str, known: Iterable[str]) -> str:
    """The entry of `known` that `word` was probably meant to be; empty when none is close."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def shown(path: Path) -> str:
    """A path in a message: names on disk need not be Unicode, and messages must."""
    return str(path).encode(errors="replace").decode()


def quoted(value: object, limit: int = 64) -> str:
    """A wrong value as a message shows it: one printable line of at most `limit` characters."""
    try:
        text = repr(value)
    except RecursionError:  # tables in tables
        text = type(value).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
