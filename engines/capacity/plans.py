"""Every layout for some cards, what it would do, and how many ranks are worth having."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from cinecat.engines.capacity.memory import MemoryModel, ReplicaMemory
from cinecat.engines.capacity.speeds import Speeds
from cinecat.engines.capacity.times import (
    ClipSeconds,
    StepSeconds,
    clip_seconds,
    forward_shape,
    most_sent,
    spread_bytes,
    step_seconds,
)
from cinecat.engines.capacity.work import ClipWork
from cinecat.engines.sharding.layout import MOST_RANKS, Layout

WORTH = 1.3
"""Twice the ranks are worth having where a clip takes at most 1 / WORTH of the time."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step, the mean over all steps of the clip: of each kind, those of the rank that sends the most, but of
    `gather` what the leader receives.

    Attributes:
        weights: of blocks that are spread over ranks.
    """

    all_to_all: float
    ring: float
    scatter: float
    gather: float
    weights: float


@dataclass(frozen=True)
class Plan:
    """A layout, and what it would do.

    Attributes:
        layout: of one replica.
        replicas: that the cards are enough for, each working at clips of its own.
        step: the mean over all steps of the clip.
        traffic: of a step.
        context_bytes: that the leader sends once a clip.
        tokens_per_second: tokens of all rows that one replica takes through a step, over its seconds.
        efficiency: time of a clip's steps on one card, over that on this layout and the number of its ranks.
        memory: of the leader and of a follower.
        fits: whether the cards have that much.
        tiles: whether the VAE then works in tiles.
    """

    layout: Layout
    replicas: int
    step: StepSeconds
    clip: ClipSeconds
    traffic: StepBytes
    context_bytes: int
    tokens_per_second: float
    efficiency: float
    memory: ReplicaMemory
    fits: bool
    tiles: bool

    @property
    def clips_per_hour(self) -> float:
        """Of all replicas."""
        return self.replicas * 3600.0 / self.clip.total

    @property
    def communicating(self) -> float:
        """Share of a step that is spent communicating."""
        return self.step.communicating / self.step.total

    def as_json(self) -> dict[str, Any]:
        """Plain data: seconds, bytes and shares."""
        return {
            "shard": str(self.layout),
            "ranks": self.layout.ranks,
            "replicas": self.replicas,
            "step_seconds": self.step.total,
            "step": asdict(self.step),
            "clip_seconds": self.clip.total,
            "clip": asdict(self.clip),
            "clips_per_hour": self.clips_per_hour,
            "tokens_per_second": self.tokens_per_second,
            "communication_share": self.communicating,
            "efficiency": self.efficiency,
            "step_bytes": asdict(self.traffic),
            "context_bytes": self.context_bytes,
            "memory": {
                "leader": self.memory.leader.as_json(),
                "follower": None if self.memory.follower is None else self.memory.follower.as_json(),
            },
            "fits": self.fits,
            "vae_in_tiles": self.tiles,
        }


@dataclass(frozen=True)
class Stop:
    """Where a family of layouts stops scaling.

    Attributes:
        family: how the ranks are doubled.
        layout: the last that is worth twice the ranks of the one before; "none" where none is.
        speed_up: of its clip, over one card's.
        next_gain: what twice as many would still gain; None where there is no such layout.
        reason: why it ends there.
    """

    family: str
    layout: Layout
    speed_up: float
    next_gain: float | None
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "layout": str(self.layout), "ranks": self.layout.ranks}


class Planner:
    """Plans of one clip on cards of one kind."""

    def __init__(
        self, work: ClipWork, memory: MemoryModel, speeds: Speeds, cards: int, card_bytes: int, spread: bool = False
    ) -> None:
        """Args:
        spread: as in `times.step_seconds`.
        """
        self._work, self._memory, self._speeds, self._spread = work, memory, speeds, spread
        self._cards, self._card_bytes = cards, card_bytes

    def plan(self, layout: Layout) -> Plan:
        """What a layout would do, which need not fill the cards."""
        work, count = self._work, self._work.step_count
        spread = self._spread and layout.sequence > 1
        kinds = [(each, step_seconds(work, each, layout, self._speeds, spread)) for each in work.steps]
        clip = clip_seconds(work, layout, self._speeds, spread)
        alone = clip_seconds(work, Layout(), self._speeds)
        sent = [(each.count, most_sent(forward_shape(work, each), layout)) for each in work.steps]

        def mean(kind: str) -> float:
            return sum(steps * int(getattr(each, kind)) for steps, each in sent) / count

        memory = self._memory.of(layout, spread)
        return Plan(
            layout=layout,
            replicas=self._cards // layout.ranks,
            step=_mean_step([(each.count, seconds) for each, seconds in kinds]),
            clip=clip,
            traffic=StepBytes(
                all_to_all=mean("all_to_all"),
                ring=mean("ring"),
                scatter=mean("scatter"),
                gather=mean("gather"),
                weights=spread_bytes(work, layout) if spread else 0,
            ),
            context_bytes=sum(each.context for _, each in sent),
            tokens_per_second=sum(each.count * each.tokens for each in work.steps) * work.rows / clip.steps,
            efficiency=alone.steps / clip.steps / layout.ranks,
            memory=memory,
            fits=memory.fits(self._card_bytes),
            tiles=memory.tiles(self._card_bytes),
        )

    def plans(self) -> list[Plan]:
        """Those of all layouts that fill the cards with replicas, by their ranks and then the fastest first."""
        found = [self.plan(layout) for layout in layouts(self._cards, self._work.heads, self._work.rows)]
        return sorted(found, key=lambda plan: (plan.layout.ranks, plan.clip.total))

    def stops(self) -> list[Stop]:
        """Where doubling stops being worth it, of each family, whatever cards there are and fit into their memory."""
        return [self._stop(name, chain) for name, chain in families(self._work.heads, self._work.rows)]

    def _stop(self, family: str, chain: Sequence[Layout]) -> Stop:
        times = [clip_seconds(self._work, layout, self._speeds, self._spread).total for layout in chain]
        for index, (before, after) in enumerate(pairwise(times)):
            if before / after < WORTH:
                reason = f"{chain[index + 1]} gains {before / after:.2f}x"
                return Stop(family, chain[index], times[0] / before, before / after, reason)
        last = chain[-1]
        if last.ranks * 2 > MOST_RANKS:
            reason = f"a replica has {MOST_RANKS} ranks at most"
        else:
            reason = f"ulysses={2 * last.ulysses} does not divide {self._work.heads} heads"
        return Stop(family, last, times[0] / times[-1], None, reason)


def layouts(cards: int, heads: int, rows: int) -> Iterator[Layout]:
    """All whose ranks divide the cards."""
    for cfg in range(1, min(2, rows) + 1):
        for ulysses in _divisors(heads):
            for ring in range(1, cards + 1):
                layout = Layout(ulysses, ring, cfg)
                if layout.ranks <= MOST_RANKS and cards % layout.ranks == 0:
                    yield layout


def families(heads: int, rows: int) -> Iterator[tuple[str, list[Layout]]]:
    """Ways to double the ranks from one on, as far as heads and MOST_RANKS go."""
    widest = max(each for each in _divisors(heads) if each & (each - 1) == 0)
    for cfg in range(1, min(2, rows) + 1):
        start = [Layout()] if cfg == 1 else [Layout(), Layout(cfg=2)]
        name = "" if cfg == 1 else "cfg=2, "
        powers = [2**power for power in range(1, MOST_RANKS.bit_length()) if 2**power * cfg <= MOST_RANKS]
        ulysses = [Layout(ulysses=each, cfg=cfg) for each in powers if each <= widest]
        yield f"{name}ulysses", [*start, *ulysses]
        yield f"{name}ring", [*start, *(Layout(ring=each, cfg=cfg) for each in powers)]
        both = [Layout(ulysses=widest, ring=each // widest, cfg=cfg) for each in powers if each > widest]
        if ulysses and both:
            yield f"{name}ulysses, then ring", [*start, *ulysses, *both]


def _mean_step(kinds: Sequence[tuple[int, StepSeconds]]) -> StepSeconds:
    count = sum(steps for steps, _ in kinds)
    names = vars(kinds[0][1])
    return StepSeconds(**{name: sum(steps * getattr(each, name) for steps, each in kinds) / count for name in names})


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
