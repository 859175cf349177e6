"""The VAE's decoder over a group of ranks: each decodes a band of the picture's rows.

Where a convolution reads across a band's border, neighbours exchange that row, and the mid block's attention sees the
keys and values of all bands. So nothing is lost, unlike with tiles: it is the whole frame's arithmetic, and its result
is the same to rounding. What layers remember of a stream stays on their rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.sharding.ranks import Ranks
from cinecat.engines.stages import ROUNDED_UP, finished_frames, latents_for_decoder
from cinecat.engines.vae import (
    WINDOW_BYTES,
    Attention,
    DoubledRate,
    DoubledSize,
    Stream,
    decoder_layers,
)
from cinecat.engines.vae_tiles import ALIVE, COPIES, FRAMES, SHARE, Span, scaled, working

LATENTS, HALO, ATTENTION, VIDEO = "vae_latents", "vae_halo", "vae_attention", "vae_video"
"""Kinds of what is sent: bands of latents from the leader, rows to neighbours, keys and values to all, frames back."""

_SHAPE_BYTES = 4 * 8  # of the latents, as the leader tells it in int64


def bands_of(height: int, ranks: int) -> list[Span]:
    """First and past-the-last row of each rank's band, as even as can be, the higher ones first. Where there are fewer
    rows than ranks, the last ranks have none, and take no part.
    """
    least, more = divmod(height, ranks)
    return list(pairwise(accumulate((least + (rank < more) for rank in range(ranks)), initial=0)))


class BandDecoder:
    """One rank's part in decoding one clip a latent frame at a time, as `ClipDecoder` does alone.

    Any number of clips can be in decoding, as long as all ranks are asked for their frames in one order.
    """

    def __init__(self, vae: AutoencoderKLWan, shape: Sequence[int], band: Tensor, bands: RankBands) -> None:
        """Takes the shape of latents as `latents_for_decoder` makes them, and the rows of one band of them."""
        self.latent_frame = 0
        self.total_frames = (shape[0] - 1) * VAE_TEMPORAL_STRIDE + 1
        self._band = band
        self._bands = bands
        self._stream = Stream(decoder_layers(vae, bands))

    @classmethod
    def start(cls, vae: AutoencoderKLWan, latents: Tensor | None, ranks: Ranks) -> BandDecoder:
        """Begins with final denoised latents [1, 16, latent frames, height / 8, width / 8]. Every rank must call it,
        with the same weights.

        Args:
            latents: on the leader; None on others, which get their bands from it.
        """
        count = ranks.layout.ranks
        if latents is not None:
            frames = latents_for_decoder(vae, latents)
            shape = list(frames.shape)
            told = torch.tensor(shape, device=vae.device)
            ranks.exchange(LATENTS, [(told, other) for other in range(1, count)], [])
            parts = [frames[:, :, top:bottom].contiguous() for top, bottom in bands_of(shape[2], count)]
            ranks.exchange(LATENTS, [(part, other) for other, part in enumerate(parts) if other and part.numel()], [])
            band = parts[0]
        else:
            told = torch.empty(4, dtype=torch.int64, device=vae.device)
            ranks.exchange(LATENTS, [], [(told, 0)])
            shape = told.tolist()
            top, bottom = bands_of(shape[2], count)[ranks.rank]
            band = torch.empty((*shape[:2], bottom - top, shape[3]), dtype=vae.dtype, device=vae.device)
            if band.numel():
                ranks.exchange(LATENTS, [], [(band, 0)])
        heights = [bottom - top for top, bottom in bands_of(shape[2], count)]
        return cls(vae, shape, band, RankBands(ranks, [height for height in heights if height]))

    @property
    def frame(self) -> int:
        """Frames that have been given."""
        return max(0, (self.latent_frame - 1) * VAE_TEMPORAL_STRIDE + 1)

    def next_frames(self) -> Tensor | None:
        """The next frames, float32 [count, height, width, 3] in [0, 1], on the leader, and None on others. Every rank
        must call it, and none after the last frame.
        """
        latent = self._band[self.latent_frame : self.latent_frame + 1]
        self.latent_frame += 1
        if not latent.numel():
            return None
        video = self._bands.gathered(self._stream(latent).permute(0, 2, 3, 1))
        return None if video is None else finished_frames(video)


class RankBands:
    """The bands of all ranks, seen from one of them: `vae.Bands` by exchange."""

    def __init__(self, ranks: Ranks, heights: Sequence[int]) -> None:
        """Takes the height of each band, in latents."""
        self._ranks, self._rank, self._heights = ranks, ranks.rank, heights
        self._others = [other for other in range(len(heights)) if other != self._rank]

    def widened(self, frames: Tensor) -> Tensor:
        count, channels, height, width = frames.shape
        wide = frames.new_empty((count, height + 2, width, channels))
        inner = wide[:, 1:-1]
        inner.copy_(frames.permute(0, 2, 3, 1))
        edges = {-1: 0, 1: -1}  # by the way to a neighbour, where its row and the one that it gets are
        neighbours = [way for way in edges if 0 <= self._rank + way < len(self._heights)]
        sent = [(inner[:, edges[way]].contiguous(), self._rank + way) for way in neighbours]
        received = [(torch.empty_like(row), neighbour) for row, neighbour in sent]
        self._ranks.exchange(HALO, sent, received)
        rows = {neighbour - self._rank: row for row, neighbour in received}
        for way, edge in edges.items():
            wide[:, edge] = rows.get(way, wide.new_zeros(()))
        return wide.permute(0, 3, 1, 2)

    def joined(self, pixels: Tensor) -> Tensor:
        own = pixels.contiguous()
        parts = {other: self._empty_part(other, own, -2) for other in self._others}
        received = [(part, other) for other, part in parts.items()]
        self._ranks.exchange(ATTENTION, [(own, other) for other in self._others], received)
        return torch.cat([own if rank == self._rank else parts[rank] for rank in range(len(self._heights))], dim=-2)

    def gathered(self, video: Tensor) -> Tensor | None:
        """Whole frames [count, height, width, 3] on the leader, of each rank's rows; None on others."""
        own = video.contiguous()
        if self._rank:
            self._ranks.exchange(VIDEO, [(own, 0)], [])
            return None
        parts = {other: self._empty_part(other, own, 1) for other in self._others}
        self._ranks.exchange(VIDEO, [], [(part, other) for other, part in parts.items()])
        return torch.cat([own, *parts.values()], dim=1)

    def _empty_part(self, rank: int, own: Tensor, dim: int) -> Tensor:
        """Room for what another rank has where this one has `own`, whose length along one dimension goes by rows."""
        shape = list(own.shape)
        shape[dim] = shape[dim] // self._heights[self._rank] * self._heights[rank]
        return own.new_empty(shape)


def sent_bytes(vae: AutoencoderKLWan, shape: Sequence[int], rank: int, ranks: int) -> dict[str, int]:
    """What a rank sends to decode one clip, by kind, and nothing where that is zero.

    Of T latent frames, a layer sees n = 1 + (T - 1) * r, r being 1, 2 or 4 by the doublings of the rate before it.
    With W columns and a band's h rows of the layer's size, its C input channels, and e bytes a value,

    - a convolution over 3 x 3 pixels sends n * W * C * e to each neighbour; the first and the last rank have only one;
    - the attention sends its keys and values, 2 * n * h * W * C * e, to each other rank;
    - each rank but the first sends its rows of the video, n * h * W * 3 * e;
    - the first sends the others the latents of their bands, and 32 bytes that tell the shape.

    Args:
        vae: only looked at; one on the device "meta" will do.
        shape: of the latents, [1, 16, latent frames, height / 8, width / 8].
    """
    _, channels, count, height, width = shape
    stride, size = int(vae.config.scale_factor_spatial), int(vae.dtype.itemsize)
    heights = [bottom - top for top, bottom in bands_of(height, ranks)]
    rows, taking_part = heights[rank], min(ranks, height)
    sent = Counter[str]()
    if rank == 0:
        sent[LATENTS] = (ranks - 1) * _SHAPE_BYTES + count * channels * (height - rows) * width * size
    if rows:
        neighbours, rate = (rank > 0) + (rank < taking_part - 1), 1
        for layer, scale in scaled(decoder_layers(vae), stride):
            frames, per_latent = 1 + (count - 1) * rate, stride / scale
            across = sum(memory.channels for memory in layer.memories() if memory.halo)
            if isinstance(layer, DoubledSize):
                across = layer.channels
            sent[HALO] += int(neighbours * frames * width * per_latent * across) * size
            if isinstance(layer, Attention):
                pixels = rows * width * per_latent**2
                sent[ATTENTION] += int((taking_part - 1) * 2 * frames * pixels * layer.channels) * size
            if isinstance(layer, DoubledRate):
                rate *= 2
        if rank:
            sent[VIDEO] = (1 + (count - 1) * rate) * rows * width * stride**2 * int(vae.config.out_channels) * size
    return dict(+sent)


def band_decoder_bytes(vae: AutoencoderKLWan, shape: Sequence[int], ranks: int) -> int:
    """What a BandDecoder of rank 0, whose band is among the highest, holds between two chunks: its band of the latents
    [1, 16, latent frames, height / 8, width / 8], and what its layers remember. For one rank it is a little more than
    `decoder_bytes`, since there are rows beyond the picture.
    """
    _, channels, count, height, width = shape
    rows = math.ceil(height / ranks)
    values = count * channels * rows * width + _remembered(vae, rows, width)
    return int(ROUNDED_UP * values) * int(vae.dtype.itemsize)


def band_needs(vae: AutoencoderKLWan, height: int, width: int, ranks: int) -> int:
    """Bytes that rank 0, which needs the most, takes at once to decode frames of `height` x `width` pixels in bands."""
    stride = int(vae.config.scale_factor_spatial)
    rows, columns = math.ceil(height / stride / ranks), width // stride
    # One more than without bands: the input with the rows beside it.
    at_work = working(decoder_layers(vae), stride, ALIVE + 1) * (rows + 2) * columns * stride**2
    finished = (COPIES + 1) * 3 * FRAMES * height * width
    return int(at_work + _remembered(vae, rows, columns) + finished) * int(vae.dtype.itemsize) + WINDOW_BYTES


def fits_in_bands(vae: AutoencoderKLWan, height: int, width: int, ranks: int, free: int | None) -> bool:
    """Whether frames of `height` x `width` pixels should be decoded in bands: if not, by rank 0 alone, in the tiles of
    `vae_tiling`, which need less but are not exact.

    Args:
        free: bytes that the rank with the least has (`available_bytes`), or None where that is not known.
    """
    return free is None or band_needs(vae, height, width, ranks) <= int(free * SHARE)


def _remembered(vae: AutoencoderKLWan, rows: int, columns: int) -> int:
    """Values that layers remember of a band of so many latents, with the rows beside it."""
    stride = int(vae.config.scale_factor_spatial)
    return sum(
        int(memory.reach * memory.channels * (rows * stride / scale + 2 * memory.halo) * columns * stride / scale)
        for layer, scale in scaled(decoder_layers(vae), stride)
        for memory in layer.memories()
    )
