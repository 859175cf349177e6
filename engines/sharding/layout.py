"""How a replica's ranks share the work of a forward; free of torch.

Along the sequence, Ulysses (arXiv 2309.14509) exchanges tokens for heads around self-attention, and a ring (arXiv
2310.01889) passes keys and values on; both together (arXiv 2405.07719) split it over ulysses x ring ranks. Besides, the
rows of a forward, which with guidance are at least two, may go to groups of ranks of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TypeAlias

from cinecat.engines.errors import SettingError

AUTO = "auto"
NONE = "none"

MOST_RANKS = 64
"""Of one replica: it is on one machine."""

LEAST_TOKENS = 1024
"""Of a rank, where the layout is chosen: with fewer, a rank waits longer for the others than it computes."""

_WORD = re.compile(r"(ulysses|ring|cfg)=([1-9][0-9]{0,2})")


@dataclass(frozen=True)
class Place:
    """Where a rank is in its layout."""

    cfg: int
    ring: int
    ulysses: int


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; 1 is none.

    Attributes:
        ulysses: ranks that share the heads of a part of the sequence.
        ring: parts of the sequence whose keys and values go round.
        cfg: groups that share the rows of a forward.
    """

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens of a row."""
        return self.ulysses * self.ring

    @property
    def ranks(self) -> int:
        return self.sequence * self.cfg

    def place(self, rank: int) -> Place:
        """Neighbouring ranks are of one Ulysses group, which talks most."""
        group, shard = divmod(rank, self.sequence)
        ring, ulysses = divmod(shard, self.ulysses)
        return Place(group, ring, ulysses)

    def shard_tokens(self, tokens: int) -> int:
        """Tokens of each rank, of which the last ranks' may be padding."""
        return -(-tokens // self.sequence)

    def __str__(self) -> str:
        words = [f"{each.name}={value}" for each in fields(self) if (value := getattr(self, each.name)) > 1]
        return ",".join(words) or NONE


AnyLayout: TypeAlias = Layout | None
"""None is one that is chosen by cards and size."""


def parse_layout(word: str) -> AnyLayout:
    """The layout of a setting such as "ulysses=4,cfg=2", "none" or "auto".

    Raises:
        ValueError: it is none of these.
    """
    if word == AUTO:
        return None
    if word == NONE:
        return Layout()
    found: dict[str, int] = {}
    for part in word.split(","):
        match = _WORD.fullmatch(part.strip())
        if match is None or match[1] in found:
            raise ValueError(
                f"{part.strip()!r} is not none, auto, or ulysses=N, ring=N and cfg=N with ',' between them, each once"
            )
        found[match[1]] = int(match[2])
    layout = Layout(**found)
    if layout.cfg > 2:
        raise ValueError(f"cfg={layout.cfg}: guidance has two sides; cfg is 1 or 2")
    if layout.ranks > MOST_RANKS:
        raise ValueError(f"{layout} are {layout.ranks} ranks; one replica has {MOST_RANKS} at most")
    return layout


def check_layout(layout: Layout, heads: int, cards: int | None) -> Layout:
    """The layout, where it suits the model and the machine.

    Args:
        heads: of the model's attention.
        cards: GPUs that the replica may use; None on a CPU, where any number of processes may be ranks.

    Raises:
        SettingError: it does not; the message names what would.
    """
    if heads % layout.ulysses:
        allowed = ", ".join(map(str, _divisors(heads)))
        raise SettingError(f"shard: ulysses={layout.ulysses} does not divide the model's {heads} heads; {allowed} do")
    if cards is not None and layout.ranks > cards:
        raise SettingError(
            f"shard: {layout} takes {layout.ranks} GPUs, and there {'is' if cards == 1 else 'are'} {cards} from the "
            f"replica's first on; lower a degree, or set shard to {AUTO}"
        )
    return layout


def choose_layout(cards: int, heads: int, tokens: int, linked: bool = True) -> Layout:
    """The layout for `auto`: guidance first, since its two sides need not talk within a forward; then along the
    sequence Ulysses where the cards are linked, whose traffic falls with the number of ranks, and the ring for the
    rest, whose traffic can hide behind attention.

    Args:
        cards: GPUs at hand.
        heads: of the model's attention.
        tokens: of the clips to plan for.
        linked: every card reaches every other's memory directly.
    """
    if cards < 2:
        return Layout()
    cfg = 2 if cards % 2 == 0 else 1
    sequence = max(each for each in _divisors(cards // cfg) if each == 1 or tokens >= each * LEAST_TOKENS)
    shared = [each for each in _divisors(sequence) if heads % each == 0]
    ulysses = max(shared) if linked else 1
    return Layout(ulysses, sequence // ulysses, cfg)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
