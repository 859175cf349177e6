"""A stack of blocks on several ranks, as one engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cinecat.engines.backends.contract import Banks, StackInputs
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.denoise import KNOWN_CONTEXTS
from cinecat.engines.model import synchronize
from cinecat.engines.sharding.attention import SequenceAttention
from cinecat.engines.sharding.messages import Forward, Order
from cinecat.engines.sharding.ranks import Ranks, in_step
from cinecat.engines.sharding.shares import (
    Context,
    Dimensions,
    context_of,
    empty_context,
    empty_share,
    gathered,
    rows_of_group,
    sent_inputs,
    share_of,
)


@dataclass(frozen=True)
class _Known:
    """A context that followers have: known by the very text keys that it was made of, and the leader's part of it."""

    text_keys: Tensor
    of_leader: Context


class ShardedStack:
    """This rank's stack, over its share of the tokens."""

    def __init__(self, stack: WanStack, attention: SequenceAttention) -> None:
        self._stack, self._attention = stack, attention

    def __call__(self, share: StackInputs, tokens: int) -> Tensor:
        """Runs all blocks on a share of rows of so many tokens: [rows, tokens / ranks, dim]. All ranks of the sequence
        call it at once. It waits for the device, from when on the exchange of the output is timed.
        """
        self._attention.tokens = tokens
        output: Tensor = self._stack(share)
        synchronize(output.device)
        return output


class ShardedEngine:
    """The leader's engine: takes whole inputs, gives whole outputs, and has the followers do their shares."""

    name = "torch"

    def __init__(self, stack: ShardedStack, ranks: Ranks, tell: Callable[[Order], None]) -> None:
        """Args:
        tell: tells all followers.
        """
        self._stack, self._ranks, self._tell = stack, ranks, tell
        self._contexts: OrderedDict[int, _Known] = OrderedDict()
        self._newest = 0

    def covers(self, inputs: StackInputs) -> bool:
        return True

    def __call__(self, inputs: StackInputs) -> Tensor:
        """Raises RanksLost where anything goes wrong: the others are in the middle of it then."""
        with in_step():
            return self._forward(inputs)

    def _forward(self, inputs: StackInputs) -> Tensor:
        layout, (rows, tokens, _) = self._ranks.layout, inputs.tokens.shape
        number, fresh = self._context(inputs)
        self._tell(
            Forward(
                rows=rows,
                tokens=tokens,
                text=inputs.text_keys.shape[2],
                image=inputs.image_keys.shape[2],
                biased=inputs.key_bias is not None,
                styled=inputs.styles is not None,
                context=number,
                fresh=fresh,
            )
        )
        busy = [rank for rank in range(layout.ranks) if rows_of_group(rows, layout, layout.place(rank).cfg)]
        if fresh:
            of_groups = [context_of(inputs, layout, cfg) for cfg in range(min(rows, layout.cfg))]
            self._contexts[number] = _Known(inputs.text_keys, of_groups[0])
            sent = [(each, rank) for rank in busy[1:] for each in of_groups[layout.place(rank).cfg].values()]
            self._ranks.exchange("context", sent, [])
        context = self._contexts[number].of_leader
        shares = {rank: share_of(inputs, context, layout, rank) for rank in busy}
        sent = [(each, rank) for rank in busy[1:] for each in sent_inputs(shares[rank])]
        self._ranks.exchange("scatter", sent, [])
        parts = {0: self._stack(shares[0], tokens)}
        parts |= {rank: torch.empty_like(shares[rank].tokens) for rank in busy[1:]}
        self._ranks.exchange("gather", [], [(parts[rank], rank) for rank in busy[1:]])
        return gathered(parts, rows, tokens, layout)

    def _context(self, inputs: StackInputs) -> tuple[int, bool]:
        """The number of the context of a forward, and whether the followers lack it."""
        for number, known in self._contexts.items():
            if known.text_keys is inputs.text_keys:
                self._contexts.move_to_end(number)
                return number, False
        self._newest += 1
        if len(self._contexts) == KNOWN_CONTEXTS:
            self._contexts.popitem(last=False)
        return self._newest, True


class FollowedStack:
    """A follower's part in the forwards of a ShardedEngine."""

    def __init__(self, stack: ShardedStack, ranks: Ranks, sizes: Dimensions, banks: Banks) -> None:
        self._stack, self._ranks, self._sizes, self._banks = stack, ranks, sizes, banks
        self._contexts: OrderedDict[int, Context] = OrderedDict()

    def __call__(self, order: Forward) -> None:
        """Receives this rank's share of a forward, runs it, and sends the output to the leader."""
        layout, cfg = self._ranks.layout, self._ranks.place.cfg
        has_rows = bool(rows_of_group(order.rows, layout, cfg))
        if order.fresh:
            if len(self._contexts) == KNOWN_CONTEXTS:
                self._contexts.popitem(last=False)
            context = empty_context(order, layout, cfg, self._sizes) if has_rows else {}
            self._ranks.exchange("context", [], [(each, 0) for each in context.values()])
            self._contexts[order.context] = context
        # Also without rows: the leader, too, forgets the one that was not used for longest.
        self._contexts.move_to_end(order.context)
        if not has_rows:
            return
        share = empty_share(order, self._contexts[order.context], layout, cfg, self._sizes, self._banks)
        self._ranks.exchange("scatter", [], [(each, 0) for each in sent_inputs(share)])
        self._ranks.exchange("gather", [(self._stack(share, order.tokens).contiguous(), 0)], [])
