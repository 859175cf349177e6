"""Who looks at the page: a key stands for a tenant."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from cinecat.server.settings import page_key

COOKIE = "cinecat_key"


@dataclass(frozen=True)
class Viewer:
    """Somebody at the page.

    Attributes:
        tenant: whose jobs they see.
        may_act: whether they may submit and cancel jobs of that tenant; without a key nobody may.
    """

    tenant: str
    may_act: bool


READER = Viewer(tenant="", may_act=False)
"""Whoever has no key: sees the jobs of callers who name no tenant."""


class Keys:
    """The keys of a server's page."""

    def __init__(self, tenants: Mapping[str, str]) -> None:
        """`tenants` by key."""
        self._tenants = dict(tenants)

    def viewer(self, key: str | None) -> Viewer | None:
        """Whose key it is; None for one that is nobody's. Takes as long for a wrong one as for a right one."""
        given, found = (key or "").encode(errors="replace"), None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known.encode(), given):
                found = Viewer(tenant, may_act=True)
        return found


def keys_of(words: Sequence[str], host: str) -> tuple[Keys, str]:
    """The keys that the setting page_keys gives; where it gives none and the page is for this machine alone, one that
    is drawn, for callers who name no tenant.

    Returns:
        The keys, and the one that was drawn or "".
    """
    if words or not is_loopback(host):
        return Keys(dict(map(page_key, words))), ""
    drawn = secrets.token_urlsafe(24)
    return Keys({drawn: ""}), drawn


def is_addressed_to_loopback(host_header: str) -> bool:
    """Whether a request's Host header names this machine, with a port or without."""
    try:
        return is_loopback(urlsplit(f"//{host_header}").hostname or "")
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
