"""What a call is called in the logs, on both sides."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from typing import Any

CALL_ID_KEY = "x-request-id"
"""Metadata, of the call and of its answer; the name is the one that proxies use."""

_SANE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def call_id_of(metadata: Iterable[Any] | None) -> str:
    """The id that the caller gave, or a new one where that is none to put into a log."""
    for key, value in metadata or ():
        if key == CALL_ID_KEY and isinstance(value, str) and _SANE.fullmatch(value):
            return value
    return uuid.uuid4().hex
