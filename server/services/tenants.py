"""On whose behalf a call is made. Until callers authenticate themselves they say so, in metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cinecat.server.errors import Violation, invalid
from cinecat.server.settings import TENANT_NAME

TENANT_KEY = "cinecat-tenant"


def tenant_of(metadata: Iterable[Any] | None) -> str:
    """The tenant that a call's metadata names; empty where it names none. Raises RequestError for what is no name."""
    named = [value for key, value in metadata or () if key == TENANT_KEY]
    if not named:
        return ""
    if len(named) > 1 or not isinstance(named[0], str) or not TENANT_NAME.fullmatch(named[0]):
        allowed = "names one tenant, by 1 to 64 of the characters A-Z a-z 0-9 . _ -"
        raise invalid([Violation(TENANT_KEY, allowed)])
    return named[0]
