"""What a leader tells its followers, in order, over a pipe of its own to each. Tensors go between the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from cinecat.engines.messages import CoreConfig, Failure
from cinecat.engines.sharding.layout import Layout
from cinecat.engines.sharding.traffic import Traffic


@dataclass(frozen=True)
class FollowerConfig:
    """The first message: what a follower needs to start.

    Attributes:
        core: the leader's; `device` is the follower's own, `threads` too.
    """

    core: CoreConfig
    layout: Layout
    rank: int


@dataclass(frozen=True)
class Loaded:
    """A follower's answer to its config, after its weights are there; a Failure means that they are not."""


@dataclass(frozen=True)
class Meet:
    """Join the other ranks, whose store listens on a port of this machine."""

    port: int


@dataclass(frozen=True)
class Forward:
    """A forward of the stack, whose inputs come next.

    Attributes:
        rows: of the forward.
        tokens: of each row, without padding.
        text, image: keys of each row.
        biased: whether there is a bias per key.
        styled: whether rows wear styles.
        context: number of the keys and values of prompt and image.
        fresh: whether these come too; else the follower has them.
    """

    rows: int
    tokens: int
    text: int
    image: int
    biased: bool
    styled: bool
    context: int
    fresh: bool


@dataclass(frozen=True)
class Swap:
    """Another style in a slot, whose factors come next."""

    slot: int


@dataclass(frozen=True)
class StartDecoding:
    """Take a band of a job's latents, which come next."""

    job_id: str


@dataclass(frozen=True)
class DecodeNext:
    """Decode the band's next frames, and send them."""

    job_id: str


@dataclass(frozen=True)
class EndDecoding:
    """Forget the band."""

    job_id: str


@dataclass(frozen=True)
class TellTraffic:
    """Asks for the Traffic since the last time."""


Order: TypeAlias = Meet | Forward | Swap | StartDecoding | DecodeNext | EndDecoding | TellTraffic
Report: TypeAlias = Loaded | Failure | Traffic
