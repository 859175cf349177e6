"""Label values of metrics that come from requests, kept few whatever is asked for."""

from __future__ import annotations

OTHER = "other"
NONE = "none"

_MOST_TOKENS, _MOST_JOBS = 1 << 20, 1 << 4


class Names:
    """The first so many names that come, as they are; `OTHER` for any later one.

    Tenants and styles are named by callers, and Prometheus keeps a series for ever for each that it has seen.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def label(self, name: str) -> str:
        """What stands for a name, `NONE` for the empty one."""
        if not name:
            return NONE
        if name not in self._known and len(self._known) < self._most:
            self._known.add(name)
        return name if name in self._known else OTHER


def tokens_label(tokens: int) -> str:
    """The power of two that a number of tokens does not exceed; the highest stands for more, too."""
    return str(min(1 << max(0, tokens - 1).bit_length(), _MOST_TOKENS))


def jobs_label(jobs: int) -> str:
    """How many jobs shared a forward, likewise."""
    return str(min(1 << max(0, jobs - 1).bit_length(), _MOST_JOBS))
