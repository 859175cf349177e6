"""Wan's VAE over a stream of frames: diffusers' weights and, to rounding, its arithmetic, in less work.

Frames lie as [frames, channels, height, width] in the channels-last format, so that a norm over channels and a
convolution's reads are contiguous. A causal convolution over 3 frames is one 2D convolution over their channels, for
which every device has fast kernels (torch's own 3D convolution takes fifteen times as long on a CPU without AVX-512).
Frames before the first are zero, so the first needs a third of the weights. Where the input of a layer stands still,
so does its output some frames later, and the layer stops computing.

On several ranks, a decoder's layers have a band of the picture's rows; what they ask of the other bands is `Bands`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    WanUpBlock,
)
from torch import Tensor, nn
from torch.nn import functional

from cinecat.engines.errors import ModelError

WINDOW_BYTES = 2**26
"""A convolution whose input, with its past beside each frame, takes more than this goes frame by frame."""


def lay_out(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Puts a VAE's weights in the order in which coders read them; otherwise each coder makes a copy of its own."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = _channels_last(module.weight.data)
    return vae


class Bands(Protocol):
    """The other bands of the picture, to layers that have one. All bands ask the same things in the same order."""

    def widened(self, frames: Tensor) -> Tensor:
        """Frames [t, C, h, w] with the row above and the row below them, [t, C, h + 2, w] in the channels-last format;
        zeros beyond the picture.
        """

    def joined(self, pixels: Tensor) -> Tensor:
        """The pixels of all bands, [..., all pixels, C], of those of this band, [..., pixels, C]."""


class Layer(ABC):
    """A part of a coder, with what it remembers of its stream."""

    reach = 0
    """Frames before the present one that it reads."""
    stride = 1
    """Frames that it reads for each that it gives."""

    @abstractmethod
    def __call__(self, frames: Tensor) -> Tensor:
        """The next frames that it gives, for the next that it reads."""

    def memories(self) -> list[Memory]:
        """Whatever in it remembers frames."""
        return []


class Memory(Layer):
    """A layer that remembers the last frames that it has read."""

    halo = 0
    """Rows above and below each of its own that it reads."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.past: Tensor | None = None

    def memories(self) -> list[Memory]:
        return [self]


class CausalConv(Memory):
    """A convolution over a frame and `reach` before it (WanCausalConv3d of stride 1)."""

    def __init__(self, conv: nn.Conv3d, bands: Bands | None = None) -> None:
        weight = conv.weight
        super().__init__(weight.shape[1])
        self.reach = weight.shape[2] - 1
        self._weight = _channels_last(weight.transpose(1, 2).flatten(1, 2))
        self._present = weight[:, :, -1]  # a view; a stream needs it once
        self._bias = conv.bias
        self.halo = weight.shape[3] // 2
        self._bands = bands if self.halo else None
        self._padding = (0 if self._bands else self.halo, self.halo)

    def __call__(self, frames: Tensor) -> Tensor:
        return self._over(frames if self._bands is None else self._bands.widened(frames))

    def memories(self) -> list[Memory]:
        return [self] if self.reach else []

    def _over(self, frames: Tensor) -> Tensor:
        if not self.reach:
            return self._convolved(frames, self._present)
        if self.past is None:
            zeros = torch.zeros_like(frames[:1])
            self.past = torch.cat([zeros] * (self.reach - 1) + [frames[:1]])
            first = self._convolved(frames[:1], _channels_last(self._present))
            return first if len(frames) == 1 else torch.cat([first, self._over(frames[1:])])
        if len(frames) > 1 and frames.nbytes * (self.reach + 1) > WINDOW_BYTES:
            return torch.cat([self._over(frame[None]) for frame in frames])
        # As [height, width, channels], which torch.cat copies in long runs.
        seen = [*self.past.permute(0, 2, 3, 1), *frames.permute(0, 2, 3, 1)]
        self.past = torch.stack(seen[-self.reach :]).permute(0, 3, 1, 2)
        height, width, channels = seen[0].shape
        windows = frames.new_empty((len(frames), height, width, (self.reach + 1) * channels))
        for index, window in enumerate(windows):
            torch.cat(seen[index : index + self.reach + 1], dim=-1, out=window)
        return self._convolved(windows.permute(0, 3, 1, 2), self._weight)

    def _convolved(self, frames: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(frames, weight, self._bias, padding=self._padding)


class HalvedRate(Memory):
    """One frame of two (downsample3d's convolution); the first passes."""

    reach = 2
    stride = 2

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__(conv.weight.shape[1])
        self._weight = _channels_last(conv.weight.transpose(1, 2).flatten(1, 2))
        self._bias = conv.bias

    def __call__(self, frames: Tensor) -> Tensor:
        past, self.past = self.past, frames[-1:].clone()
        if past is None:
            return frames
        seen = torch.cat([past, frames])
        return functional.conv2d(torch.cat([seen[:-2:2], seen[1:-1:2], seen[2::2]], dim=1), self._weight, self._bias)


class DoubledRate(Layer):
    """Two frames of one (upsample3d's convolution); the first passes, and is not remembered."""

    def __init__(self, conv: nn.Conv3d) -> None:
        self._conv = CausalConv(conv)

    def __call__(self, frames: Tensor) -> Tensor:
        if self._conv.past is None:
            self._conv.past = torch.cat([torch.zeros_like(frames[:1])] * self._conv.reach)
            return frames
        return _channels_last(torch.unflatten(self._conv(frames), 1, (2, -1)).flatten(0, 1))

    def memories(self) -> list[Memory]:
        return [self._conv]


class HalvedSize(Layer):
    """A quarter of the pixels (downsample2d's convolution)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self._weight = _channels_last(conv.weight)
        self._bias = conv.bias

    def __call__(self, frames: Tensor) -> Tensor:
        count, channels, height, width = frames.shape
        padded = _empty((count, channels, height + 1, width + 1), frames)
        padded[:, :, :height, :width] = frames
        padded[:, :, height:] = 0
        padded[:, :, :, width:] = 0
        return functional.conv2d(padded, self._weight, self._bias, stride=2)


class DoubledSize(Layer):
    """Four pixels of each, convolved (upsample2d).

    Each of the four sees only 2x2 different pixels through the 3x3 kernel, with the weights of equal pixels added up:
    so four kernels of 2x2 over the small frame do what one of 3x3 does over the large one, in 4/9 of the work.
    """

    def __init__(self, conv: nn.Conv2d, bands: Bands | None = None) -> None:
        weight = conv.weight
        self.channels = weight.shape[1]
        parts = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        kernels = torch.einsum("ayk,bxl,oikl->aboiyx", parts, parts, weight)
        self._weight = _channels_last(kernels.flatten(0, 2))
        self._bias = None if conv.bias is None else conv.bias.repeat(4)
        self._bands = bands
        self._padding = (0 if bands else 1, 1)

    def __call__(self, frames: Tensor) -> Tensor:
        count, _, height, width = frames.shape
        seen = frames if self._bands is None else self._bands.widened(frames)
        convolved = functional.conv2d(seen, self._weight, self._bias, padding=self._padding)
        corners = torch.unflatten(convolved, 1, (2, 2, -1))
        large = _empty((count, corners.shape[3], 2 * height, 2 * width), frames)
        for row in (0, 1):
            for column in (0, 1):
                pixels = corners[:, row, column, :, row : row + height, column : column + width]
                large[:, :, row::2, column::2] = pixels
        return large


class NormedConv(Layer):
    """Norm over channels, SiLU, and a causal convolution."""

    def __init__(self, norm: WanRMS_norm, conv: nn.Conv3d, bands: Bands | None = None) -> None:
        self._norm = norm
        self._conv = CausalConv(conv, bands)
        self.reach = self._conv.reach

    def __call__(self, frames: Tensor) -> Tensor:
        return self._conv(functional.silu(_normed(self._norm, frames), inplace=True))

    def memories(self) -> list[Memory]:
        return self._conv.memories()


class Residual(Layer):
    """WanResidualBlock."""

    def __init__(self, block: WanResidualBlock, bands: Bands | None = None) -> None:
        self._first = NormedConv(block.norm1, block.conv1, bands)
        self._second = NormedConv(block.norm2, block.conv2, bands)
        self._shortcut = None if isinstance(block.conv_shortcut, nn.Identity) else CausalConv(block.conv_shortcut)
        self.reach = self._first.reach + self._second.reach

    def __call__(self, frames: Tensor) -> Tensor:
        out = self._second(self._first(frames))
        return out.add_(frames if self._shortcut is None else self._shortcut(frames))

    def memories(self) -> list[Memory]:
        return self._first.memories() + self._second.memories()


class Attention(Layer):
    """WanAttentionBlock: one head over the pixels of each frame."""

    def __init__(self, block: WanAttentionBlock, bands: Bands | None = None) -> None:
        self.channels = block.dim
        self._block = block
        self._bands = bands

    def __call__(self, frames: Tensor) -> Tensor:
        _, channels, height, width = frames.shape
        pixels = _normed(self._block.norm, frames).permute(0, 2, 3, 1).flatten(1, 2)[:, None]
        qkv = functional.linear(pixels, self._block.to_qkv.weight.flatten(1), self._block.to_qkv.bias)
        query, others = torch.split(qkv, [channels, 2 * channels], dim=-1)
        if self._bands is not None:
            others = self._bands.joined(others)
        key, value = torch.split(others, channels, dim=-1)
        mixed = functional.scaled_dot_product_attention(query, key, value)[:, 0]
        out = functional.linear(mixed, self._block.proj.weight.flatten(1), self._block.proj.bias)
        return torch.unflatten(out, 1, (height, width)).permute(0, 3, 1, 2) + frames


def encoder_layers(vae: AutoencoderKLWan) -> list[Layer]:
    """From frames in [-1, 1] [t, 3, H, W] to moments [t', 32, H / 8, W / 8]; the first frame must come alone.

    Raises:
        ModelError: the VAE is not built like Wan2.1's.
    """
    encoder = vae.encoder
    return [
        CausalConv(encoder.conv_in),
        *_layers(vae, encoder.down_blocks),
        *_layers(vae, [encoder.mid_block]),
        NormedConv(encoder.norm_out, encoder.conv_out),
        CausalConv(vae.quant_conv),
    ]


def decoder_layers(vae: AutoencoderKLWan, bands: Bands | None = None) -> list[Layer]:
    """From latents [t, 16, h, w] to frames [t', 3, 8 h, 8 w]; the first latent frame must come alone.

    Args:
        bands: the picture's other bands, where these layers get only one; None where they get the whole picture.

    Raises:
        ModelError: the VAE is not built like Wan2.1's.
    """
    decoder = vae.decoder
    return [
        CausalConv(vae.post_quant_conv),
        CausalConv(decoder.conv_in, bands),
        *_layers(vae, [decoder.mid_block], bands),
        *_layers(vae, decoder.up_blocks, bands),
        NormedConv(decoder.norm_out, decoder.conv_out, bands),
    ]


class Stream:
    """Layers in a row, over one stream of frames."""

    def __init__(self, layers: list[Layer], still_from: int | None = None) -> None:
        """Begins a stream; one that went through the same layers before is forgotten.

        Args:
            still_from: the frame from which on all that will be read are equal, where that is known.
        """
        self.memories = [memory for layer in layers for memory in layer.memories()]
        for memory in self.memories:
            memory.past = None
        self._layers = layers
        self._read = 0
        self._still_from = still_from
        self._last: dict[int, Tensor] = {}  # of layers that have settled: the frame that they go on giving

    def __call__(self, frames: Tensor) -> Tensor:
        """The next frames [t', C', H', W'] for the next [t, C, H, W]; of the stream's first, t must be 1."""
        start, still = self._read, self._still_from
        self._read += len(frames)
        frames = _channels_last(frames)
        for index, layer in enumerate(self._layers):
            start = -(-start // layer.stride)
            if still is not None:
                still = -(-(still + layer.reach) // layer.stride)
            if index in self._last:
                frames = self._last[index].expand(len(frames) // layer.stride, -1, -1, -1)
                continue
            frames = layer(frames)
            if still is not None and start + len(frames) > still:
                self._last[index] = frames[-1:].clone()
        return frames


def _layers(vae: AutoencoderKLWan, modules: Iterable[nn.Module], bands: Bands | None = None) -> list[Layer]:
    found: list[Layer] = []
    for module in modules:
        if isinstance(module, WanResidualBlock):
            found.append(Residual(module, bands))
        elif isinstance(module, WanAttentionBlock):
            found.append(Attention(module, bands))
        elif isinstance(module, WanMidBlock):
            found += _layers(vae, [module.resnets[0]], bands)
            for attention, block in zip(module.attentions, list(module.resnets)[1:], strict=True):
                found += _layers(vae, [attention, block], bands)
        elif isinstance(module, WanUpBlock):
            found += _layers(vae, [*module.resnets, *(module.upsamplers or [])], bands)
        elif isinstance(module, WanResample) and module.mode.startswith("downsample"):
            found.append(HalvedSize(module.resample[1]))
            if module.mode == "downsample3d":
                found.append(HalvedRate(module.time_conv))
        elif isinstance(module, WanResample) and module.mode.startswith("upsample"):
            if module.mode == "upsample3d":
                found.append(DoubledRate(module.time_conv))
            found.append(DoubledSize(module.resample[1], bands))
        else:
            raise ModelError(f"model: the VAE has a {type(module).__name__}, which Wan2.1's has not")
    return found


def _normed(norm: WanRMS_norm, frames: Tensor) -> Tensor:
    """WanRMS_norm: its floor of 1e-12 under the length is one of 1e-24 under the square, here under the mean square."""
    pixels = frames.permute(0, 2, 3, 1)
    channels = pixels.shape[-1]
    return functional.rms_norm(pixels, (channels,), norm.gamma.flatten(), 1e-24 / channels).permute(0, 3, 1, 2)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
