"""What a forward of a Wan transformer costs, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from cinecat.engines.tokens.grid import Grid

_PATCH_PIXELS, _FRAME_STRIDE = 16, 4


@dataclass(frozen=True)
class Layout:
    """Sizes of a Wan I2V transformer.

    Attributes:
        text, image: tokens that cross-attention looks at.
    """

    dim: int
    layers: int
    ffn_dim: int
    text: int = 512
    image: int = 257


WAN_14B = Layout(dim=5120, layers=40, ffn_dim=13824)


def forward_flops(layout: Layout, tokens: int) -> tuple[float, float]:
    """Floating-point operations of one forward of one row: of what grows with the tokens, and of self-attention.

    Twice the multiplications. Projections of the context, which are kept over all steps, and embeddings are left out.
    """
    square = layout.dim**2
    # q, k, v and output of self-attention, q and output of cross-attention, then both linears between.
    linear = tokens * (4 * square + 2 * square + 2 * layout.dim * layout.ffn_dim)
    cross = tokens * 2 * (layout.text + layout.image) * layout.dim
    attention = 2.0 * tokens * tokens * layout.dim
    return 2.0 * layout.layers * (linear + cross), 2.0 * layout.layers * attention


def step_flops(layout: Layout, tokens: int) -> float:
    """All operations of one forward of one row."""
    return sum(forward_flops(layout, tokens))


def grid_of(width: int, height: int, frames: int) -> Grid:
    """Base patches of a clip, in pixels.

    Raises:
        ValueError: the size is no multiple of 16, or the frames are not 4k + 1.
    """
    if width < _PATCH_PIXELS or height < _PATCH_PIXELS or width % _PATCH_PIXELS or height % _PATCH_PIXELS:
        raise ValueError(f"size: {width}x{height}; width and height are multiples of {_PATCH_PIXELS}")
    if frames < 1 or (frames - 1) % _FRAME_STRIDE:
        raise ValueError(f"frames: {frames}; they are 4k + 1, such as {max(0, frames - 1) // 4 * 4 + 1}")
    return Grid((frames - 1) // _FRAME_STRIDE + 1, height // _PATCH_PIXELS, width // _PATCH_PIXELS)
