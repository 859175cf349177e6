"""Page sizes and page tokens, the same for every list."""

from __future__ import annotations

import base64
import binascii
import json

from cinecat.server.errors import Violation, invalid

_DEFAULT_SIZE = 50
_MAX_SIZE = 1000


def page_size(asked: int) -> int:
    """Raises RequestError for a size that is not allowed."""
    if not 0 <= asked <= _MAX_SIZE:
        raise invalid([Violation("page_size", f"{asked} is not between 1 and {_MAX_SIZE} (0 means {_DEFAULT_SIZE})")])
    return asked or _DEFAULT_SIZE


def encode_token(*position: int | str) -> str:
    """An opaque token for a place in a list."""
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode()


def decode_token(token: str, *types: type) -> tuple[int | str, ...] | None:
    """The place that a token stands for; None for the first page.

    Raises:
        RequestError: the token did not come from this list.
    """
    if not token:
        return None
    try:
        position = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        position = None
    if (
        not isinstance(position, list)
        or [type(part) for part in position] != list(types)
        or not all(map(_is_in_a_list, position))
    ):
        raise invalid([Violation("page_token", "is not a next_page_token of this list; leave it empty to start over")])
    return tuple(position)


def _is_in_a_list(part: int | str) -> bool:
    """Whether a database can compare with it: a forged token must not become an internal error."""
    return 0 <= part < 2**63 if isinstance(part, int) else part.isascii() and "\0" not in part
