"""A rank's share of a forward: some of its rows, and some of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cinecat.engines.backends.contract import Banks, StackInputs, StyleRows
from cinecat.engines.sharding.layout import Layout
from cinecat.engines.sharding.messages import Forward

Context: TypeAlias = Mapping[str, Tensor]
"""The inputs that stay the same from step to step: keys and values of prompt and image, by their names."""


def rows_of_group(rows: int, layout: Layout, cfg: int) -> range:
    """The rows of a forward that a group of ranks runs; as the two sides of guidance alternate, each gets one."""
    return range(cfg, rows, layout.cfg)


def context_of(inputs: StackInputs, layout: Layout, cfg: int) -> Context:
    """The context of a group's rows."""
    rows = slice(cfg, None, layout.cfg)
    layered = {
        name: getattr(inputs, name)[:, rows].contiguous()
        for name in ("text_keys", "text_values", "image_keys", "image_values")
    }
    return {**layered, "text_bias": inputs.text_bias[rows].contiguous()}


def share_of(inputs: StackInputs, context: Context, layout: Layout, rank: int) -> StackInputs:
    """What a rank gets of a forward; its group must have rows. Tokens are padded with zeros, the bias is of all keys.

    Args:
        context: of the rank's group.
    """
    place = layout.place(rank)
    rows = slice(place.cfg, None, layout.cfg)
    size = layout.shard_tokens(inputs.tokens.shape[1])
    first = (place.ring * layout.ulysses + place.ulysses) * size

    def shard(states: Tensor) -> Tensor:
        part = states[rows, first : first + size]
        return F.pad(part, (0, 0, 0, size - part.shape[1])).contiguous()

    styles = inputs.styles
    return StackInputs(
        tokens=shard(inputs.tokens),
        rope_cos=shard(inputs.rope_cos),
        rope_sin=shard(inputs.rope_sin),
        modulation=inputs.modulation[rows].contiguous(),
        key_bias=None if inputs.key_bias is None else inputs.key_bias[rows].contiguous(),
        styles=None
        if styles is None
        else StyleRows(styles.slots[rows].contiguous(), styles.strengths[rows].contiguous(), styles.banks),
        **context,
    )


def sent_inputs(share: StackInputs) -> list[Tensor]:
    """What goes to the rank of a share for every forward, in order."""
    inputs = [share.tokens, share.rope_cos, share.rope_sin, share.modulation]
    if share.key_bias is not None:
        inputs.append(share.key_bias)
    return inputs if share.styles is None else [*inputs, share.styles.slots, share.styles.strengths]


@dataclass(frozen=True)
class Dimensions:
    """Of a model, and where its tensors are."""

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


def empty_context(order: Forward, layout: Layout, cfg: int, sizes: Dimensions) -> Context:
    """Tensors for a context to come."""
    n = len(rows_of_group(order.rows, layout, cfg))
    text, image = ((sizes.layers, n, keys, sizes.dim) for keys in (order.text, order.image))
    return {
        "text_keys": sizes.empty(*text),
        "text_values": sizes.empty(*text),
        "image_keys": sizes.empty(*image),
        "image_values": sizes.empty(*image),
        "text_bias": sizes.empty(n, order.text),
    }


def empty_share(
    order: Forward, context: Context, layout: Layout, cfg: int, sizes: Dimensions, banks: Banks
) -> StackInputs:
    """Tensors for a share to come, with the context of its rows."""
    n, size = len(rows_of_group(order.rows, layout, cfg)), layout.shard_tokens(order.tokens)
    pairs = sizes.dim // sizes.heads // 2
    slots, strengths = sizes.empty(n, dtype=torch.int64), sizes.empty(n, dtype=torch.float32)
    return StackInputs(
        tokens=sizes.empty(n, size, sizes.dim),
        rope_cos=sizes.empty(n, size, pairs, dtype=torch.float32),
        rope_sin=sizes.empty(n, size, pairs, dtype=torch.float32),
        modulation=sizes.empty(n, 6, sizes.dim),
        key_bias=sizes.empty(n, order.tokens) if order.biased else None,
        styles=StyleRows(slots, strengths, banks) if order.styled else None,
        **context,
    )


def gathered(parts: Mapping[int, Tensor], rows: int, tokens: int, layout: Layout) -> Tensor:
    """The whole output [rows, tokens, dim] of what each rank that has rows gives."""
    whole = parts[0].new_empty(rows, tokens, parts[0].shape[2])
    for cfg in range(min(rows, layout.cfg)):
        own = [parts[rank] for rank in range(cfg * layout.sequence, (cfg + 1) * layout.sequence)]
        whole[cfg :: layout.cfg] = torch.cat(own, dim=1)[:, :tokens]
    return whole
