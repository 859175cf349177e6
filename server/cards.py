"""Which devices each replica gets, from the settings `device` and `shard`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cinecat.engines.sharding.layout import MOST_RANKS, parse_layout

ANY_CARD = ("auto", "cuda")


@dataclass(frozen=True)
class Seat:
    """Where a replica is.

    Attributes:
        device: of its first rank, as in `CoreConfig`.
        cards: GPUs that it takes from there on, where it is on GPUs.
    """

    device: str
    cards: int = 1

    @property
    def numbers(self) -> range:
        """Of its GPUs; none where it is on a CPU by name."""
        kind, _, number = self.device.partition(":")
        first = int(number) if number else 0
        return range(first, first + self.cards) if kind in ANY_CARD else range(0)


def next_seat(device: str, shard: str, own: Sequence[Seat], others: Sequence[Seat] = ()) -> Seat:
    """Where one more replica goes.

    "auto" and "cuda" give the first GPUs that no replica of the server is on; of several names, the one that fewest
    replicas are on, first of the model, then of others.

    Args:
        device, shard: the settings.
        own: of the model's replicas.
        others: of all other replicas.
    """
    layout = parse_layout(shard)
    cards = MOST_RANKS if layout is None else layout.ranks  # one that is chosen takes what there is
    if device not in ANY_CARD:
        taken, foreign = [seat.device for seat in own], [seat.device for seat in others]
        return Seat(min(device_names(device), key=lambda name: (taken.count(name), foreign.count(name))), cards)
    numbers = {number for seat in (*own, *others) for number in seat.numbers}
    starts = (first for first in range(max(numbers, default=-1) + 2) if numbers.isdisjoint(range(first, first + cards)))
    first = next(starts)
    return Seat(f"{device}:{first}" if first else device, cards)


def device_names(device: str) -> list[str]:
    """The devices that the setting lists."""
    return [word.strip() for word in device.split(",")]
