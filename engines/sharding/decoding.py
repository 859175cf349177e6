"""Clips decoded by all ranks, a band of rows each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cinecat.engines.sharding.messages import DecodeNext, EndDecoding, Order, StartDecoding
from cinecat.engines.sharding.ranks import Ranks, in_step
from cinecat.engines.sharding.vae import BandDecoder


class LedDecoder:
    """The leader's decoder of one clip, which has the others do their bands; as `stages.ClipDecoder` to its caller.

    Raises RanksLost from every method where anything goes wrong: the others are in the middle of it then.
    """

    def __init__(self, vae: Any, latents: Tensor, ranks: Ranks, tell: Callable[[Order], None], job_id: str) -> None:
        """Begins with final denoised latents [1, 16, latent frames, height / 8, width / 8].

        Args:
            tell: tells all followers.
        """
        self._tell, self._job_id = tell, job_id
        with in_step():
            tell(StartDecoding(job_id))
            self._decoder = BandDecoder.start(vae, latents, ranks)

    @property
    def frame(self) -> int:
        """Frames that have been given."""
        return self._decoder.frame

    @property
    def total_frames(self) -> int:
        return self._decoder.total_frames

    def next_frames(self) -> Tensor:
        """The next frames, float32 [count, height, width, 3] in [0, 1]."""
        with in_step():
            self._tell(DecodeNext(self._job_id))
            frames = self._decoder.next_frames()
        assert frames is not None, "the leader gets them"
        return frames

    def close(self) -> None:
        """Has the others forget the clip."""
        with in_step():
            self._tell(EndDecoding(self._job_id))


class FollowedDecoders:
    """A follower's part in all clips that are being decoded."""

    def __init__(self, vae: Any, ranks: Ranks) -> None:
        self._vae, self._ranks = vae, ranks
        self._decoders: dict[str, BandDecoder] = {}

    def __call__(self, order: StartDecoding | DecodeNext | EndDecoding) -> None:
        job_id = order.job_id
        match order:
            case StartDecoding():
                self._decoders[job_id] = BandDecoder.start(self._vae, None, self._ranks)
            case DecodeNext():
                self._decoders[job_id].next_frames()
            case EndDecoding():
                self._decoders.pop(job_id, None)
