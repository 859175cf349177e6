"""What a follower has of a model, and does with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cinecat.engines.backends.contract import STYLED_TARGETS, Banks
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.model import find_device, load_transformer, load_vae_decoder
from cinecat.engines.placement import on_host, place
from cinecat.engines.sharding.attention import SequenceAttention
from cinecat.engines.sharding.decoding import FollowedDecoders
from cinecat.engines.sharding.engine import FollowedStack, ShardedStack
from cinecat.engines.sharding.messages import DecodeNext, EndDecoding, FollowerConfig, Forward, StartDecoding
from cinecat.engines.sharding.ranks import Ranks, open_store
from cinecat.engines.sharding.shares import Dimensions
from cinecat.engines.sharding.traffic import Traffic
from cinecat.engines.sharding.weights import spread_weights
from cinecat.engines.slots import empty_bank
from cinecat.engines.variants import find_variant, fuse_variant


class Part:
    """A loaded follower; `meet` comes before all else."""

    def __init__(self, config: FollowerConfig) -> None:
        """Loads the blocks and the VAE's decoder.

        Raises:
            ModelError: they cannot be loaded here.
        """
        core = config.core
        if core.threads:
            torch.set_num_threads(core.threads)
        self._config = config
        self._device = find_device(core.device)
        checkpoint = find_checkpoint(core.model)
        self._transformer = load_transformer(checkpoint, "cpu" if on_host(core) else core.device, core.dtype)
        self._vae = load_vae_decoder(checkpoint, core.device)
        if (variant := find_variant(core.model_variant)) is not None:
            fuse_variant(self._transformer, variant)

    def meet(self, port: int) -> None:
        """Joins the other ranks."""
        config, core = self._config, self._config.core
        store = open_store(config.layout, port)
        self._ranks = Ranks(config.layout, config.rank, self._device, store, core.rank_timeout_seconds)
        attention = SequenceAttention(self._ranks)
        stack = WanStack(self._transformer, attention)
        place(self._transformer, stack, self._device, core.offload, core.storage_dtype)
        spread_weights(self._transformer, stack, self._ranks, core.shard_weights)
        self._banks = _empty_banks(self._transformer, core.style_slots, core.max_rank, self._device)
        sizes = dimensions(self._transformer, self._device)
        self._decoders = FollowedDecoders(self._vae, self._ranks)
        self._followed = FollowedStack(ShardedStack(stack, attention), self._ranks, sizes, self._banks)

    @torch.inference_mode()
    def forward(self, order: Forward) -> None:
        """Its share of a forward."""
        self._followed(order)

    @torch.inference_mode()
    def swap(self, slot: int) -> None:
        """Takes over what the leader has in a slot."""
        share_slot(self._ranks, self._banks, slot)

    @torch.inference_mode()
    def decode(self, order: StartDecoding | DecodeNext | EndDecoding) -> None:
        """Its band of a clip."""
        self._decoders(order)

    def traffic(self) -> Traffic:
        """Since the last call."""
        return self._ranks.take_traffic()


def share_slot(ranks: Ranks, banks: Banks, slot: int) -> None:
    """Makes a slot on all ranks what it is on the leader; called by all of them."""
    for bank in (*banks.a, *banks.b):
        factors: Tensor = bank[:, slot].contiguous()
        ranks.broadcast("swap", factors)
        if not ranks.leads:
            bank[:, slot] = factors


def dimensions(transformer: Any, device: torch.device) -> Dimensions:
    """Of a diffusers transformer that runs on a device."""
    config = transformer.config
    heads = config.num_attention_heads
    return Dimensions(config.num_layers, heads, heads * config.attention_head_dim, transformer.dtype, device)


def _empty_banks(transformer: Any, slots: int, rank: int, device: torch.device) -> Banks:
    pairs = [
        empty_bank(transformer.blocks, target, slots, rank, transformer.dtype, device) for target in STYLED_TARGETS
    ]
    return Banks(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
