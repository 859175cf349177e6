"""Every replica gets a device, and no two a GPU where there is another."""

from __future__ import annotations

import pytest

from cinecat.engines.sharding.layout import MOST_RANKS
from cinecat.server.cards import Seat, next_seat


def seats(*devices: str) -> list[Seat]:
    return [Seat(device) for device in devices]


@pytest.mark.parametrize(
    ("setting", "own", "others", "device"),
    [
        ("auto", [], [], "auto"),
        ("auto", ["auto"], [], "auto:1"),
        ("auto", ["auto:1"], [], "auto"),
        ("auto", ["auto"], ["cuda:1", "cpu"], "auto:2"),
        ("cuda", ["cuda"], [], "cuda:1"),
        ("cpu", ["cpu"], ["cpu"], "cpu"),
        ("cuda:3", [], ["cuda:3"], "cuda:3"),
        ("cuda:2,cuda:5", ["cuda:2"], [], "cuda:5"),
        ("cuda:2, cuda:5", ["cuda:2", "cuda:5", "cuda:2"], [], "cuda:5"),
        ("cuda:2,cuda:5", [], ["cuda:2"], "cuda:5"),
    ],
)
def test_the_next_replica_takes_the_card_that_is_least_taken(
    setting: str, own: list[str], others: list[str], device: str
) -> None:
    assert next_seat(setting, "none", seats(*own), seats(*others)) == Seat(device)


def test_a_replica_of_several_ranks_takes_as_many_cards_in_a_row() -> None:
    first = next_seat("cuda", "ulysses=2,cfg=2", [])
    second = next_seat("cuda", "ulysses=2,cfg=2", [first])
    assert (first, second) == (Seat("cuda", 4), Seat("cuda:4", 4))
    # A gap that is too small for them is left to others.
    between = [second, *seats("cuda:2")]
    assert next_seat("cuda", "ring=3", between) == Seat("cuda:8", 3)
    assert next_seat("cuda", "ring=2", between) == Seat("cuda", 2)
    assert next_seat("auto", "none", between) == Seat("auto")


def test_a_layout_that_is_chosen_takes_what_there_is() -> None:
    first = next_seat("auto", "auto", [])
    assert next_seat("auto", "none", [first]) == Seat(f"auto:{MOST_RANKS}")
