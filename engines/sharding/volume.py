"""How many bytes the ranks of a layout send each other in a forward, by formula; free of torch.

`ranks.Ranks` counts what is really sent, under the same names, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from cinecat.engines.sharding.layout import Layout

FLOAT32, SLOT, STRENGTH = 4, 8, 4
"""Bytes of a rotation's cosine or sine, of a row's slot and of its strength, whatever the dtype of the rest."""


@dataclass(frozen=True)
class ForwardShape:
    """One forward of a stack of blocks.

    Attributes:
        layers, heads, dim: of the model.
        rows: of the forward.
        tokens: of each row, without padding.
        text, image: keys of each row's context.
        value_bytes: of a number, 2 in 16 bits.
        biased: whether tokens have a bias each, as merged ones do.
        styled: whether rows wear styles.
    """

    layers: int
    heads: int
    dim: int
    rows: int
    tokens: int
    text: int
    image: int
    value_bytes: int
    biased: bool = False
    styled: bool = False


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends in one forward, by the kind of exchange.

    Attributes:
        all_to_all: queries, keys, values and outputs of every layer, to the other ranks of its Ulysses group.
        ring: keys and values of every layer, to the next rank of its ring.
        scatter: from the leader, the other ranks' inputs.
        gather: to the leader, this rank's output.
        context: from the leader, the other ranks' keys and values of prompt and image; only in a forward whose context
            they lack, as a clip's first has.
    """

    all_to_all: int = 0
    ring: int = 0
    scatter: int = 0
    gather: int = 0
    context: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def kinds(self) -> dict[str, int]:
        """What is not zero, by name, as `traffic.Traffic` counts it."""
        return {kind: count for kind, count in vars(self).items() if count}


def sent_bytes(shape: ForwardShape, layout: Layout, rank: int, fresh: bool = False) -> Sent:
    """What a rank sends in a forward.

    With n rows of its group, K_s tokens of its share with padding, dim values of e bytes each:

    - all-to-all, in each layer: 4 x (ulysses - 1) / ulysses x n x K_s x dim x e;
    - ring, in each layer: 2 x (ring - 1) x n x K_s x dim x e;
    - gather: n x K_s x dim x e, of every rank but the leader;
    - scatter, from the leader: for each other rank `input_bytes`;
    - context, from the leader: for each other rank `context_bytes`.

    A rank whose group has no rows takes no part.

    Args:
        fresh: whether the others lack the forward's context.
    """
    place = layout.place(rank)
    rows = group_rows(shape.rows, layout, place.cfg)
    if not rows:
        return Sent()
    states = _states(shape, layout, rows)
    scatter = context = 0
    if rank == 0:
        others = [group_rows(shape.rows, layout, layout.place(other).cfg) for other in range(1, layout.ranks)]
        scatter = sum(input_bytes(shape, layout, each) for each in others)
        context = sum(context_bytes(shape, each) for each in others) if fresh else 0
    return Sent(
        all_to_all=shape.layers * 4 * states // layout.ulysses * (layout.ulysses - 1),
        ring=shape.layers * 2 * states * (layout.ring - 1),
        scatter=scatter,
        gather=states if rank else 0,
        context=context,
    )


def group_rows(rows: int, layout: Layout, cfg: int) -> int:
    """Rows of a forward that a group of ranks runs: every layout.cfg-th, from its own index on."""
    return len(range(cfg, rows, layout.cfg))


def input_bytes(shape: ForwardShape, layout: Layout, rows: int) -> int:
    """A rank's inputs, of so many rows: its tokens [n, K_s, dim], their rotations, float32 [n, K_s, head_dim / 2]
    twice, modulation [n, 6, dim], a bias for every token of the whole rows [n, K] where there is one, and slot (int64)
    and strength (float32) of each row where styles are worn.
    """
    tokens = layout.shard_tokens(shape.tokens)
    rotations = 2 * tokens * (shape.dim // shape.heads // 2) * FLOAT32
    bias = shape.tokens * shape.value_bytes if shape.biased else 0
    styles = SLOT + STRENGTH if shape.styled else 0
    row = tokens * shape.dim * shape.value_bytes + rotations + 6 * shape.dim * shape.value_bytes + bias + styles
    return rows * row


def context_bytes(shape: ForwardShape, rows: int) -> int:
    """A rank's context, of so many rows: keys and values [layers, n, T, dim] of the text's T keys, with a bias [n, T],
    and [layers, n, I, dim] of the image's I.
    """
    keys = 2 * shape.layers * (shape.text + shape.image) * shape.dim
    return rows * (keys + shape.text) * shape.value_bytes


def _states(shape: ForwardShape, layout: Layout, rows: int) -> int:
    """Bytes of a rank's tokens, or anything of their shape."""
    return rows * layout.shard_tokens(shape.tokens) * shape.dim * shape.value_bytes
