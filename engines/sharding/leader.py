"""The leader's followers: started, watched, told what to do, and ended."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from cinecat.engines.backends.contract import Banks
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.errors import ModelError
from cinecat.engines.memory import available_bytes
from cinecat.engines.messages import CoreConfig, Failure
from cinecat.engines.sharding import pulse
from cinecat.engines.sharding.attention import SequenceAttention
from cinecat.engines.sharding.decoding import LedDecoder
from cinecat.engines.sharding.engine import ShardedEngine, ShardedStack
from cinecat.engines.sharding.layout import Layout
from cinecat.engines.sharding.messages import FollowerConfig, Loaded, Meet, Order, Swap, TellTraffic
from cinecat.engines.sharding.part import share_slot
from cinecat.engines.sharding.ranks import Ranks, in_step, open_store
from cinecat.engines.sharding.traffic import Traffic
from cinecat.engines.sharding.vae import band_decoder_bytes, fits_in_bands
from cinecat.engines.sharding.weights import spread_weights

_END_SECONDS = 2.0
_PATIENCE_SECONDS = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Follower:
    process: subprocess.Popen[bytes]
    orders: Connection
    pulse: Connection


class Leader:
    """The ranks that share a model's work, seen from the first of them.

    They are processes of their own, not of multiprocessing, which lets a server's engine core have no children. They
    begin to load when this does, and end when its process ends, however that happens.
    """

    def __init__(self, config: CoreConfig, layout: Layout) -> None:
        """Args:
        config: the leader's; `threads` are those of each rank.
        """
        self.layout = layout
        self._timeout = config.rank_timeout_seconds
        self._followers = {
            rank: _start(FollowerConfig(replace(config, device=device_of_rank(config.device, rank)), layout, rank))
            for rank in range(1, layout.ranks)
        }
        self.attention: SequenceAttention
        self._ranks: Ranks | None = None
        self._closing = False

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the followers."""
        return tuple(each.process.pid for each in self._followers.values())

    def meet(self, device: torch.device, lost: Callable[[Failure | None], None]) -> SequenceAttention:
        """Waits until all have loaded, and joins them.

        Args:
            device: of the leader.
            lost: hears, in another thread, that a rank is gone, and what it had to say; must end this process.

        Returns:
            What the blocks of the leader's stack attend with.

        Raises:
            ModelError: a rank cannot load the model.
        """
        loading = {follower.orders: rank for rank, follower in self._followers.items()}
        while loading:
            ready = wait(list(loading), _PATIENCE_SECONDS)
            if not ready:
                log.warning("ranks %s still load the model", ", ".join(map(str, loading.values())))
            for orders in ready:
                assert isinstance(orders, Connection)
                rank = loading.pop(orders)
                self._expect_loaded(rank, self._followers[rank])
        store = open_store(self.layout)
        self.tell(Meet(store.port))
        pulses = {rank: follower.pulse for rank, follower in self._followers.items()}
        pulse.lead(pulses, self._timeout, lambda rank, reason: self._lost(rank, reason, lost))
        self._ranks = Ranks(self.layout, 0, device, store, self._timeout)
        self.attention = SequenceAttention(self._ranks)
        return self.attention

    @property
    def ranks(self) -> Ranks:
        assert self._ranks is not None, "meet comes first"
        return self._ranks

    def engine(self, transformer: Any, stack: WanStack, shard_weights: str) -> ShardedEngine:
        """The stack on all ranks as one engine; it attends with what `meet` gave."""
        spread_weights(transformer, stack, self.ranks, shard_weights)
        return ShardedEngine(ShardedStack(stack, self.attention), self.ranks, self.tell)

    def share_slot(self, banks: Banks, slot: int) -> None:
        """Gives all ranks what is in a slot now. Raises RanksLost."""
        with in_step():
            self.tell(Swap(slot))
            share_slot(self.ranks, banks, slot)

    def decoder(self, vae: AutoencoderKLWan, latents: Tensor, job_id: str) -> LedDecoder | None:
        """Begins to decode a clip on all ranks, where they have the memory for it.

        Args:
            latents: [1, 16, latent frames, height / 8, width / 8].

        Raises:
            RanksLost: it cannot be begun.
        """
        return LedDecoder(vae, latents, self.ranks, self.tell, job_id) if self.decodes(vae, latents) else None

    def decodes(self, vae: AutoencoderKLWan, latents: Tensor) -> bool:
        """Whether ranks have the memory to decode a clip of these latents, a band each."""
        stride = int(vae.config.scale_factor_spatial)
        height, width = (int(side) * stride for side in latents.shape[3:])
        free = available_bytes(self.ranks.device)
        if free is not None:
            free //= self._ranks_on_a_device
        return fits_in_bands(vae, height, width, self.layout.ranks, free)

    def decoder_bytes(self, vae: AutoencoderKLWan, latents: Tensor) -> int:
        """What the device of the leader holds of a clip that all ranks decode, between two chunks."""
        return band_decoder_bytes(vae, latents.shape, self.layout.ranks) * self._ranks_on_a_device

    @property
    def _ranks_on_a_device(self) -> int:
        return self.layout.ranks if self.ranks.device.type == "cpu" else 1

    def tell(self, order: Order) -> None:
        """Raises OSError where a rank is gone."""
        for follower in self._followers.values():
            follower.orders.send(order)

    def traffic(self) -> list[Traffic]:
        """What each rank has sent since the last call, in their order; for studies, since it waits for all of them."""
        self.tell(TellTraffic())
        told = [follower.orders.recv() for follower in self._followers.values()]
        return [self.ranks.take_traffic(), *told]

    def close(self) -> None:
        """Ends the followers, and waits until they have."""
        self._closing = True
        for follower in self._followers.values():
            follower.orders.close()
        deadline = time.monotonic() + _END_SECONDS
        for follower in self._followers.values():
            try:
                follower.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                follower.process.kill()
                follower.process.wait()
        if self._ranks is not None:
            self._ranks.close()

    def _expect_loaded(self, rank: int, follower: _Follower) -> None:
        try:
            answer = follower.orders.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise ModelError(
                f"shard: rank {rank} ended while it loaded, exit code {follower.process.wait()}"
            ) from error
        if not isinstance(answer, Loaded):
            self.close()
            raise ModelError(answer.message)

    def _lost(self, rank: int, reason: str, lost: Callable[[Failure | None], None]) -> None:
        if self._closing:
            return
        log.error("rank %d %s; the engine core ends", rank, reason)
        said = [words for each in self._followers.values() if (words := _last_words(each)) is not None]
        for each in self._followers.values():
            each.process.kill()
        # One that is out of memory takes those with it that wait for it, and may not be the first to be missed.
        lost(max(said, key=lambda words: words.kind == "memory", default=None))


def _last_words(follower: _Follower) -> Failure | None:
    try:
        words = follower.orders.recv() if follower.orders.poll(0) else None
    except (EOFError, OSError):
        return None
    return words if isinstance(words, Failure) else None


def device_of_rank(device: str, rank: int) -> str:
    """Ranks are on GPUs in a row, from the one that is set on; or all on the CPU."""
    kind, _, index = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{int(index or 0) + rank}" if kind == "cuda" else kind


def _start(config: FollowerConfig) -> _Follower:
    orders, their_orders = Pipe()
    beats, their_beats = Pipe()
    theirs = (their_orders.fileno(), their_beats.fileno())
    command = [sys.executable, "-m", "cinecat.engines.sharding.follower", *map(str, theirs)]
    process = subprocess.Popen(command, pass_fds=theirs, stdin=subprocess.DEVNULL, env=os.environ)
    their_orders.close()
    their_beats.close()
    orders.send(config)
    return _Follower(process, orders, beats)
