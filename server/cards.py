"""Which device each replica gets, from the setting `device`."""

from __future__ import annotations

from collections.abc import Sequence

ANY_CARD = ("auto", "cuda")


def next_device(setting: str, own: Sequence[str], others: Sequence[str] = ()) -> str:
    """The device of one more replica, as in `CoreConfig`.

    "auto" and "cuda" give the first GPU that no replica of the server is on; of several names, the one that fewest
    replicas are on, first of the model, then of others.

    Args:
        own: devices of the model's replicas.
        others: devices of all other replicas.
    """
    names = device_names(setting)
    if setting not in ANY_CARD:
        return min(names, key=lambda name: (own.count(name), others.count(name)))
    taken = {_card(device) for device in (*own, *others)}
    card = next(number for number in range(len(taken) + 1) if number not in taken)
    return f"{setting}:{card}" if card else setting


def device_names(setting: str) -> list[str]:
    """The devices that a setting lists."""
    return [word.strip() for word in setting.split(",")]


def _card(device: str) -> int | None:
    kind, _, number = device.partition(":")
    if kind not in ANY_CARD:
        return None
    return int(number) if number else 0
