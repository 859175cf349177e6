"""The stack of Wan's transformer blocks as pure arithmetic over tensors: what every backend runs or compiles.

It computes what diffusers' WanTransformerBlock does, with the same dtypes (norms, modulation and residual sums in
float32), and differs in form only: the projections of self-attention are one, keys and values of the context come in
ready, rotations are real arithmetic without in-place writes, and styles are inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cinecat.engines.backends.contract import STYLED_TARGETS, StackInputs

LayerBanks = dict[str, tuple[Tensor, Tensor]]
"""Banks A [slots + 1, rank, in] and B [slots + 1, out, rank] of one layer, by target."""

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""As `attention`, which it stands in for."""


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attention over [rows, n, heads, head_dim], with a bias [rows, keys] per key."""
    mask = None if bias is None else bias[:, None, None]
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


class WanStackBlock(nn.Module):
    """One block, over the weights of a diffusers block; its q, k and v of self-attention become parts of one tensor,
    which the diffusers block then reads too.
    """

    def __init__(self, block: Any, attend: Attend = attention) -> None:
        """Args:
        attend: self-attention of the block.
        """
        super().__init__()
        self._attend = attend
        own, cross = block.attn1, block.attn2
        self.heads = own.heads
        self.eps = block.norm1.eps
        self.scale_shift_table = block.scale_shift_table
        # In a tuple, since these are no modules of this one.
        self._parts = (own.to_q, own.to_k, own.to_v)
        self.qkv_weight, self.qkv_bias = _fuse(*self._parts)
        self.norm_q, self.norm_k = own.norm_q, own.norm_k
        self.out = own.to_out[0]
        self.norm_cross = block.norm2
        self.cross_q, self.cross_norm_q = cross.to_q, cross.norm_q
        self.cross_out = cross.to_out[0]
        self.up, self.down = block.ffn.net[0].proj, block.ffn.net[2]

    def forward(
        self,
        tokens: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        modulation: Tensor,
        text_keys: Tensor,
        text_values: Tensor,
        text_bias: Tensor,
        image_keys: Tensor,
        image_values: Tensor,
        key_bias: Tensor | None,
        slots: Tensor | None,
        strengths: Tensor | None,
        banks: LayerBanks,
    ) -> Tensor:
        """Arguments are those of `StackInputs`, of one layer; `banks` is empty where `slots` is None."""
        worn = _Worn(slots, strengths, banks)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table + modulation.float()).chunk(
            6, dim=1
        )

        hidden = self._modulated(tokens, shift, scale)
        qkv = F.linear(hidden, self.qkv_weight, self.qkv_bias)
        query, key, value = qkv.chunk(3, dim=-1)
        query = self.norm_q(worn.add("attn1.to_q", hidden, query))
        key = self.norm_k(worn.add("attn1.to_k", hidden, key))
        value = worn.add("attn1.to_v", hidden, value)
        attended = _merge_heads(
            self._attend(
                _rotate(self._heads(query), rope_cos, rope_sin),
                _rotate(self._heads(key), rope_cos, rope_sin),
                self._heads(value),
                key_bias,
            )
        )
        output = worn.add("attn1.to_out.0", attended, _apply(self.out, attended))
        tokens = (tokens.float() + output * gate).type_as(tokens)

        hidden = self.norm_cross(tokens.float()).type_as(tokens)
        query = self._heads(self.cross_norm_q(worn.add("attn2.to_q", hidden, _apply(self.cross_q, hidden))))
        attended = attention(query, self._heads(text_keys), self._heads(text_values), text_bias)
        attended = attended + attention(query, self._heads(image_keys), self._heads(image_values), None)
        attended = _merge_heads(attended)
        tokens = tokens + worn.add("attn2.to_out.0", attended, _apply(self.cross_out, attended))

        hidden = self._modulated(tokens, ffn_shift, ffn_scale)
        inner = worn.add("ffn.net.0.proj", hidden, _apply(self.up, hidden))
        inner = F.gelu(inner, approximate="tanh")
        output = worn.add("ffn.net.2", inner, _apply(self.down, inner))
        summed: Tensor = (tokens.float() + output.float() * ffn_gate).type_as(tokens)
        return summed

    def release(self) -> None:
        """Frees the weights, the diffusers block's too."""
        self.free_parts()
        for parameter in self.parameters():
            parameter.data = parameter.data.new_empty(0)

    def free_parts(self) -> None:
        """Takes q, k and v from the diffusers block, which cannot run afterwards: views would keep the whole tensor
        alive wherever this block's weights move.
        """
        for parameter in (each for part in self._parts for each in part.parameters()):
            parameter.data = parameter.data.new_empty(0)

    def _modulated(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=self.eps)
        return (normed * (1 + scale) + shift).type_as(tokens)

    def _heads(self, states: Tensor) -> Tensor:
        """[rows, n, dim] to [rows, n, heads, head_dim]."""
        return states.view(*states.shape[:-1], self.heads, -1)


class _Worn:
    """What the rows' styles add to a linear."""

    def __init__(self, slots: Tensor | None, strengths: Tensor | None, banks: LayerBanks) -> None:
        self._slots, self._strengths, self._banks = slots, strengths, banks

    def add(self, target: str, given: Tensor, output: Tensor) -> Tensor:
        if self._slots is None or self._strengths is None:
            return output
        return add_styles(given, output, *self._banks[target], self._slots, self._strengths)


def add_styles(
    given: Tensor, output: Tensor, bank_a: Tensor, bank_b: Tensor, slots: Tensor, strengths: Tensor
) -> Tensor:
    """What a linear gives, with each row's style: output + strength * B[slot] (A[slot] given).

    Args:
        given: what goes into the linear, [rows, n, in].
        output: what comes out of it, [rows, n, out].
        bank_a, bank_b: [slots + 1, rank, in] and [slots + 1, out, rank].
        slots, strengths: int64 and float32 [rows].
    """
    # A strength keeps its float32 digits until it meets the product.
    low = (strengths.view(-1, 1, 1) * (given @ bank_a.index_select(0, slots).mT)).to(given.dtype)
    return output + low @ bank_b.index_select(0, slots).mT


class WanStack(nn.Module):
    """All blocks of a transformer, sharing its weights."""

    def __init__(self, transformer: Any, attend: Attend = attention) -> None:
        """Args:
        attend: self-attention of the blocks.
        """
        super().__init__()
        self.blocks = nn.ModuleList(WanStackBlock(block, attend) for block in transformer.blocks)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def size_bytes(self) -> int:
        """Of the weights."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def release(self) -> None:
        """Frees the weights, those that the transformer reads too: nothing but an engine with weights of its own can
        run afterwards.
        """
        for block in self.blocks:
            assert isinstance(block, WanStackBlock)
            block.release()

    def free_parts(self) -> None:
        """As `WanStackBlock.free_parts`, of all blocks."""
        for block in self.blocks:
            assert isinstance(block, WanStackBlock)
            block.free_parts()

    def forward(self, inputs: StackInputs) -> Tensor:
        """Runs all blocks: [rows, K, dim] in the tokens' dtype."""
        tokens = inputs.tokens
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, *layer_inputs(inputs, layer))
        return tokens


def layer_inputs(inputs: StackInputs, layer: int) -> tuple[Any, ...]:
    """What a layer's block takes after its tokens."""
    slots, strengths, banks = None, None, LayerBanks()
    if (styles := inputs.styles) is not None:
        slots, strengths = styles.slots, styles.strengths
        pairs = zip(STYLED_TARGETS, styles.banks.a, styles.banks.b, strict=True)
        banks = {target: (a[layer], b[layer]) for target, a, b in pairs}
    return (
        inputs.rope_cos,
        inputs.rope_sin,
        inputs.modulation,
        inputs.text_keys[layer],
        inputs.text_values[layer],
        inputs.text_bias,
        inputs.image_keys[layer],
        inputs.image_values[layer],
        inputs.key_bias,
        slots,
        strengths,
        banks,
    )


def _fuse(*linears: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights and biases of linears, one below the other, as one tensor each, of which theirs become views."""
    weight, bias = (
        nn.Parameter(torch.cat([getattr(linear, name).detach() for linear in linears]), requires_grad=False)
        for name in ("weight", "bias")
    )
    start = 0
    for linear in linears:
        end = start + linear.out_features
        linear.weight = nn.Parameter(weight[start:end], requires_grad=False)
        linear.bias = nn.Parameter(bias[start:end], requires_grad=False)
        start = end
    return weight, bias


def _apply(linear: Any, given: Tensor) -> Tensor:
    """The linear without styles, whatever its class adds to it."""
    return F.linear(given, linear.weight, linear.bias)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of neighbouring channels of [rows, n, heads, head_dim] by its token's angle."""
    even, odd = states.view(*states.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(states)


def _merge_heads(states: Tensor) -> Tensor:
    return states.flatten(-2)
