"""What a rank has sent to others, and how long it waited; free of torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Counts since the last `take`.

    Attributes:
        sent: bytes that this rank sent, by the kind of exchange; without weights that FSDP gathers.
        seconds: spent in exchanges.
    """

    sent: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, kind: str, nbytes: int) -> None:
        """Counts bytes that this rank sends."""
        self.sent[kind] += nbytes

    def take(self) -> Traffic:
        """What was counted, and begins anew."""
        taken = Traffic(self.sent, self.seconds)
        self.sent, self.seconds = Counter(), 0.0
        return taken
