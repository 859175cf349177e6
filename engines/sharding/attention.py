"""Self-attention over tokens that are spread over ranks: Ulysses, a ring, or both."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cinecat.engines.backends.stack import attention
from cinecat.engines.sharding.ranks import Ranks

_ALIGNED_KEYS = 16
"""The memory-efficient kernel reads biases in runs of so many keys."""


class SequenceAttention:
    """What a stack of blocks calls in place of `stack.attention`.

    Attributes:
        tokens: of a row on all ranks together, without padding; set before each forward.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.tokens = 0
        self._ranks = ranks

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of this rank's tokens to those of all ranks of its sequence.

        Args:
            query, key, value: [rows, tokens / ranks, heads, head_dim].
            bias: of all keys, [rows, tokens].

        Returns:
            [rows, tokens / ranks, heads, head_dim]; zeros for padding.
        """
        if self._ranks.layout.ulysses > 1:
            query, key, value = self._heads_for_tokens(torch.stack([query, key, value]))
        size = query.shape[1]
        first = self._ranks.place.ring * size
        real = self._real(first, size)
        if self._ranks.layout.ring > 1:
            attended = self._around(query[:, :real], torch.stack([key, value]), bias)
        else:
            attended = attention(query[:, :real], key[:, :real], value[:, :real], bias)
        if real < size:
            attended = F.pad(attended, (0, 0, 0, 0, 0, size - real))
        return attended if self._ranks.layout.ulysses == 1 else self._tokens_for_heads(attended)

    def _real(self, first: int, size: int) -> int:
        """How many of the tokens from `first` on are no padding."""
        return max(0, min(size, self.tokens - first))

    def _heads_for_tokens(self, states: Tensor) -> Tensor:
        """[3, rows, n, heads, d] of this rank's tokens to [3, rows, n x ulysses, heads / ulysses, d] of its heads."""
        u = self._ranks.layout.ulysses
        parts = torch.unflatten(states, 3, (u, -1)).movedim(3, 0).contiguous()
        return self._ranks.all_to_all(parts).movedim(0, 2).flatten(2, 3)

    def _tokens_for_heads(self, states: Tensor) -> Tensor:
        """[rows, n x ulysses, heads / ulysses, d] back to [rows, n, heads, d]."""
        u = self._ranks.layout.ulysses
        parts = torch.unflatten(states, 1, (u, -1)).movedim(1, 0).contiguous()
        return self._ranks.all_to_all(parts).movedim(0, 2).flatten(2, 3)

    def _around(self, query: Tensor, block: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of queries to this rank's keys and values [2, rows, n, heads, d], then to those that come round;
        the next ones are on their way meanwhile.
        """
        ring, size = self._ranks.layout.ring, block.shape[2]
        total, total_sum = query.new_zeros(query.shape, dtype=torch.float32), None
        for hop in range(ring):
            coming = self._ranks.pass_on(block.contiguous()) if hop + 1 < ring else None
            first = (self._ranks.place.ring - hop) % ring * size
            real = self._real(first, size)
            if real and query.shape[1]:
                key, value = block[:, :, :real]
                part_bias = None if bias is None else bias[:, first : first + real]
                part, part_sum = attention_with_sum(query, key, value, part_bias)
                summed = part_sum if total_sum is None else torch.logaddexp(total_sum, part_sum)
                if total_sum is not None:
                    total = total * (total_sum - summed).exp()
                total = total + part.float() * (part_sum - summed).exp()
                total_sum = summed
            if coming is not None:
                block = coming.wait()
        return total.type_as(query)


def attention_with_sum(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`stack.attention`, and the logarithm of each query's sum of exponentials, by which parts are put together.

    The kernels are those that scaled_dot_product_attention itself calls, which keeps the sum to itself.

    Returns:
        [rows, queries, heads, d] in the queries' dtype, and float32 [rows, queries, heads, 1].
    """
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    count, keys = query.shape[2], key.shape[2]
    ops = torch.ops.aten
    mask = None
    if bias is not None:
        padded = F.pad(bias, (0, -keys % _ALIGNED_KEYS))[:, None, None, :keys]
        mask = padded.expand(query.shape[0], query.shape[1], count, keys)
    if query.device.type == "cpu":
        out, total = ops._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)
    elif mask is None and query.dtype != torch.float32:
        out, total, *_ = ops._scaled_dot_product_flash_attention(query, key, value)
    else:
        out, total, *_ = ops._scaled_dot_product_efficient_attention(query, key, value, mask, True)
    return out.transpose(1, 2), total[:, :, :count].float().transpose(1, 2)[..., None]
