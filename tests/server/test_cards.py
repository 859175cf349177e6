"""Every replica gets a device, and no two a GPU where there is another."""

from __future__ import annotations

import pytest

from cinecat.server.cards import next_device


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
    assert next_device(setting, own, others) == device
