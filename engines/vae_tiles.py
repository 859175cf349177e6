"""Tiles: what the VAE does piece by piece where a whole frame would not fit into memory.

Neighbours overlap and are blended. A tile sees nothing beyond its border, so this is not exact and the result says so:
on wan-tiny, decoding in tiles of 256 pixels is 68 dB (PSNR) from decoding whole frames, and latents encoded in tiles
reconstruct the image as well as others do.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cinecat.engines.errors import EngineError
from cinecat.engines.vae import WINDOW_BYTES, DoubledSize, HalvedSize, Layer, Memory

OVERLAP = 8
"""Latents, along a side, that neighbours share: 64 pixels."""
LEAST_TILE = 32
"""Latents of a tile's side; smaller ones would be nearly all overlap."""

FRAMES = 4
"""In one chunk."""
ALIVE = 6
"""Tensors of a convolution's input size that are alive at once, at most."""
COPIES = 4
"""Of a chunk's frames, from blending to the caller."""
SHARE = 0.8
"""Of what is available: allocators and convolutions take some for themselves."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Tiling:
    """How a frame is cut, in latents.

    Attributes:
        rows: first and past-the-last of each row of tiles.
        columns: the same of each column.
    """

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    @property
    def whole(self) -> bool:
        return len(self.rows) == len(self.columns) == 1

    @property
    def tiles(self) -> list[tuple[Span, Span]]:
        return [(row, column) for row in self.rows for column in self.columns]

    def weighted(self, scale: int, like: Tensor) -> list[tuple[Span, Span, Tensor]]:
        """Each tile's rows and columns, and how much its values count [rows, columns]: over all tiles 1 everywhere.

        Args:
            scale: values per latent along a side.
            like: a tensor of the device and dtype.
        """
        return [
            (row, column, down[:, None] * across[None])
            for row, down in zip(self.rows, _blend(self.rows, scale, like), strict=True)
            for column, across in zip(self.columns, _blend(self.columns, scale, like), strict=True)
        ]

    @property
    def note(self) -> str:
        """What a result that was made so should say; empty when nothing was lost."""
        if self.whole:
            return ""
        return (
            f"vae: coded in {len(self.rows)} x {len(self.columns)} overlapping tiles, since a whole frame does not fit "
            "into memory; it differs a little from the untiled result, most where tiles meet"
        )


def whole_frame(height: int, width: int) -> Tiling:
    """No cut, for a frame of so many latents."""
    return Tiling(((0, height),), ((0, width),))


def plan_tiling(
    encoder: list[Layer], decoder: list[Layer], height: int, width: int, stride: int, value_bytes: int, free: int | None
) -> Tiling:
    """No tiles where a frame fits, otherwise the largest tiles that do.

    Args:
        encoder: layers from pixels to moments; as `decoder`, only looked at.
        decoder: layers from latents to pixels.
        height: of a frame, in latents.
        width: of a frame, in latents.
        stride: pixels per latent along a side.
        value_bytes: of one value.
        free: bytes that there are, or None where that is not known.
    """
    whole = whole_frame(height, width)
    if free is None:
        return whole
    budget = int(free * SHARE)

    def needed(tiling: Tiling) -> int:
        """Bytes for one tile at work and for finished frames."""
        (top, bottom), (left, right) = tiling.rows[0], tiling.columns[0]
        pixels = (bottom - top) * (right - left) * stride**2
        decoding = (working(decoder, stride) + remembered(decoder, stride)) * pixels
        encoding = (working(encoder, 1) + 1.5 * remembered(encoder, 1)) * pixels
        finished = COPIES * 3 * FRAMES * height * width * stride**2
        return int(max(decoding, encoding) + finished) * value_bytes + WINDOW_BYTES

    tiling = whole
    for side in range(max(height, width), LEAST_TILE - 1, -OVERLAP):
        tiling = Tiling(_spans(height, side), _spans(width, side))
        if needed(tiling) <= budget:
            break
    return tiling


class Pasts:
    """What the tiles of one clip remember while others are at work, in a temporary file: it is gigabytes in all."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, it closes with the clip
        self._end = 0
        self._pasts: dict[tuple[int, int], _Parked] = {}  # by tile and layer

    def restore(self, tile: int, memories: Sequence[Memory]) -> None:
        """Makes the layers remember what they did when the tile was last at work; at first that is nothing."""
        for index, memory in enumerate(memories):
            past = self._pasts.get((tile, index))
            memory.past = None if past is None else self._read(past)

    def keep(self, tile: int, memories: Sequence[Memory]) -> None:
        """Takes what the layers remember away from them.

        Raises:
            EngineError: the temporary file cannot grow.
        """
        for index, memory in enumerate(memories):
            if memory.past is not None:
                key = tile, index
                self._pasts[key] = self._parked(memory.past, self._pasts.get(key))
            memory.past = None

    def _parked(self, past: Tensor, earlier: _Parked | None) -> _Parked:
        values = past.permute(0, 2, 3, 1).contiguous().cpu()
        if earlier is not None:
            parked = earlier
        else:
            parked = _Parked(self._end, values.shape, past.dtype, past.device)
            self._end += values.nbytes
        try:
            self._file.seek(parked.place)
            self._file.write(values.flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            raise EngineError(
                f"vae: what tiles remember does not fit into {tempfile.gettempdir()} ({error}); "
                "set TMPDIR to a folder with more room, or ask for a smaller size"
            ) from error
        return parked

    def _read(self, parked: _Parked) -> Tensor:
        values = torch.empty(parked.shape, dtype=parked.dtype)
        self._file.seek(parked.place)
        self._file.readinto(values.flatten().view(torch.uint8).numpy().data)
        return values.to(parked.device).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Parked:
    place: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _blend(spans: Sequence[Span], scale: int, like: Tensor) -> list[Tensor]:
    """How much each span counts along its length, less and less towards an end."""
    tents = []
    total = torch.zeros(spans[-1][1] * scale)
    for start, stop in spans:
        steps = torch.arange(1, (stop - start) * scale + 1, dtype=torch.float32)
        tent = torch.minimum(steps, steps.flip(0)).clamp(max=OVERLAP * scale)
        total[start * scale : stop * scale] += tent
        tents.append(tent)
    return [
        (tent / total[start * scale : stop * scale]).to(like.device, like.dtype)
        for tent, (start, stop) in zip(tents, spans, strict=True)
    ]


def _spans(length: int, side: int) -> tuple[Span, ...]:
    """Spans of one length, `side` or what there is, evenly over the whole; neighbours share OVERLAP or more."""
    if side >= length:
        return ((0, length),)
    count = math.ceil((length - OVERLAP) / (side - OVERLAP))
    starts = [round(index * (length - side) / (count - 1)) for index in range(count)]
    return tuple((start, start + side) for start in starts)


def remembered(layers: Sequence[Layer], scale: float) -> float:
    """Values that layers remember, for each pixel of full size; `scale` pixels per value along a side at the start."""
    return sum(
        sum(memory.reach * memory.channels for memory in layer.memories()) / at**2
        for layer, at in scaled(layers, scale)
    )


def working(layers: Sequence[Layer], scale: float, alive: int = ALIVE) -> float:
    """Values that are alive at once in the layer that takes most, for each pixel of full size."""
    return max(
        alive * FRAMES * max((memory.channels for memory in layer.memories()), default=0) / at**2
        for layer, at in scaled(layers, scale)
    )


def scaled(layers: Sequence[Layer], scale: float) -> Iterator[tuple[Layer, float]]:
    """Each layer, and how many pixels of full size a value of its input has along a side."""
    for layer in layers:
        yield layer, scale
        if isinstance(layer, HalvedSize):
            scale *= 2
        elif isinstance(layer, DoubledSize):
            scale /= 2
