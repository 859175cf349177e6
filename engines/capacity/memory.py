"""What the ranks of a replica take of their cards, estimated from the formulas of `memory_plan`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from cinecat.engines.capacity.work import ClipWork
from cinecat.engines.memory_plan import VAE_DECODER_MAPS, VAE_ENCODER_MAPS, Clip, ModelSizes, ServingMemory, plan_memory
from cinecat.engines.messages import Offload
from cinecat.engines.sharding.layout import Layout

RUNTIME_BYTES = 2**30
"""Torch, its libraries and the driver; communicators of many ranks may take more."""

_ULYSSES_NUMBERS = 21
"""Of each token and channel in self-attention, while an all-to-all's result is put in order: the block's input and its
normed copy, q, k and v as projected, normed and rotated (9), and these three stacked, cut in parts, received and put in
order (12)."""

_ROTATION_BYTES = 4
"""Of each token and channel of a head: float32 cosine and sine of every second."""

_RING_NUMBERS, _RING_BYTES = 14, 12
"""Likewise in a ring: those 9, a block of keys and values and the coming one, and a part's result; and float32 the sum
so far, the part and the next sum. Behind an all-to-all also the 3 that it gave."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, by what holds them.

    Attributes:
        weights: of the encoders where this is the leader, of VAE and transformer; spread blocks in part, with two whole
            ones: that which runs and the next.
        style_banks: as on one card.
        context: keys and values; the leader has those of all rows, once by request and once as a batch, beside its own.
        latents: on the leader alone.
        activations: of the largest forward.
        staging: on the leader, tokens and rotations: of all rows whole and in shares, the outputs in shares and whole,
            those of a group put together, and the row that all were made of.
        gathering: of the staging, what is there only after the activations are gone.
        visiting: an encoder on the leader while it encodes, where encoders are offloaded.
        vae_work: whole frames on the leader when it encodes, a band of them when all ranks decode.
        runtime: RUNTIME_BYTES.
    """

    weights: int
    style_banks: int
    context: int
    latents: int
    activations: int
    staging: int
    gathering: int
    visiting: int
    vae_work: int
    runtime: int = RUNTIME_BYTES

    @property
    def floor(self) -> int:
        """At the peak, were the VAE to take nothing."""
        return self._standing + self._work

    @property
    def needed(self) -> int:
        """At the peak, with the VAE on whole frames or bands; of forwards, encoders and VAE only one runs at a time."""
        return self._standing + max(self._work, self.vae_work)

    @property
    def _standing(self) -> int:
        return self.weights + self.style_banks + self.context + self.latents + self.runtime

    @property
    def _work(self) -> int:
        forward = self.staging - self.gathering + max(self.activations, self.gathering)
        return max(forward, self.visiting)

    def as_json(self) -> dict[str, int]:
        """Its parts, and what they come to."""
        return {**asdict(self), "floor": self.floor, "needed": self.needed}

    def fits(self, card: int) -> bool:
        """On a card of so many bytes; where only the VAE does not, it works in tiles."""
        return self.floor <= card

    def taken(self, card: int) -> int:
        """At the peak on such a card, leaving out what the VAE takes where it has to make do with what is left."""
        return self.needed if self.needed <= card else self.floor

    def tiles(self, card: int) -> bool:
        """Whether the VAE has to."""
        return self.floor <= card < self.needed


@dataclass(frozen=True)
class ReplicaMemory:
    """Bytes of the leader, and of the follower that takes most; None where there is none."""

    leader: RankMemory
    follower: RankMemory | None

    @property
    def ranks(self) -> tuple[RankMemory, ...]:
        return (self.leader,) if self.follower is None else (self.leader, self.follower)

    def fits(self, card: int) -> bool:
        return all(rank.fits(card) for rank in self.ranks)

    def tiles(self, card: int) -> bool:
        """Whether the VAE of some rank works in tiles, which is not exact."""
        return self.fits(card) and any(rank.tiles(card) for rank in self.ranks)


class MemoryModel:
    """The memory of a clip's replica, for any layout."""

    def __init__(
        self,
        sizes: ModelSizes,
        clip: Clip,
        work: ClipWork,
        dtype: torch.dtype,
        style_slots: int,
        max_rank: int,
        offload: Offload = "none",
    ) -> None:
        """Args:
        sizes, clip, work, dtype: as `work.clip_work` takes and gives them.
        style_slots, max_rank: as the settings of these names.
        offload: "none" or "encoders", likewise.
        """
        self._alone: ServingMemory = plan_memory(sizes, clip, dtype, style_slots, max_rank, offload)
        self._work, self._tokens = work, clip.tokens

    def of(self, layout: Layout, spread: bool = False) -> ReplicaMemory:
        """Of a layout; `spread` as in `times.step_seconds`."""
        alone, work = self._alone, self._work
        group = -(-work.rows // layout.cfg)
        banded = -(-work.latent_rows // layout.ranks) / work.latent_rows * alone.vae_work
        own_context = alone.context * group // work.rows * len(work.steps)
        transformer = self._transformer(layout, spread)
        follower = RankMemory(
            weights=transformer + alone.vae,
            style_banks=alone.style_banks,
            context=own_context,
            latents=0,
            activations=self._activations(layout, group),
            staging=0,
            gathering=0,
            visiting=0,
            vae_work=int(banded),
        )
        if layout.ranks == 1:
            leader = RankMemory(
                weights=alone.weights,
                style_banks=alone.style_banks,
                context=alone.context * len(work.steps),
                latents=alone.latents,
                activations=alone.activations,
                staging=0,
                gathering=0,
                visiting=alone.visiting,
                vae_work=alone.vae_work,
            )
            return ReplicaMemory(leader, None)
        row = self._tokens * (work.model.dim * work.value_bytes + work.model.dim // work.heads * _ROTATION_BYTES)
        leader = RankMemory(
            weights=transformer + alone.vae + alone.text_encoder + alone.image_encoder,
            style_banks=alone.style_banks,
            context=2 * alone.context * len(work.steps) + own_context,
            latents=alone.latents,
            activations=follower.activations,
            staging=(4 * work.rows + group + 1) * row,
            gathering=(2 * work.rows + group) * row,
            visiting=alone.visiting,
            vae_work=max(int(banded), alone.vae_work * VAE_ENCODER_MAPS // VAE_DECODER_MAPS),
        )
        return ReplicaMemory(leader, follower)

    def _transformer(self, layout: Layout, spread: bool) -> int:
        if not spread or layout.sequence == 1:
            return self._alone.transformer
        blocks = self._work.block_bytes
        whole = min(2, self._work.model.layers) * blocks // self._work.model.layers
        return self._alone.transformer - blocks + -(-blocks // layout.sequence) + whole

    def _activations(self, layout: Layout, rows: int) -> int:
        work = self._work
        token, channels = self._alone.activations / self._tokens, work.model.dim
        numbers = _ULYSSES_NUMBERS if layout.ulysses > 1 else 0
        token = max(token, numbers * work.value_bytes * channels)
        if layout.ring > 1:
            numbers = _RING_NUMBERS + (3 if layout.ulysses > 1 else 0)
            token = max(token, (numbers * work.value_bytes + _RING_BYTES) * channels)
        return int(rows * layout.shard_tokens(self._tokens) * token)
