"""The stack of blocks of a server's model, without the rest of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cinecat.engines.backends.choice import buckets_for, engine_spec
from cinecat.engines.backends.contract import ANY_SHAPE, Bucket, EngineSpec
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.checkpoint import Checkpoint, find_checkpoint
from cinecat.engines.errors import SettingError
from cinecat.engines.messages import VAE_TEMPORAL_STRIDE, CoreConfig
from cinecat.engines.model import load_transformer, pixel_stride
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.variants import find_variant, fuse_variant


@dataclass(frozen=True)
class LoadedStack:
    """Blocks to build engines of.

    Attributes:
        transformer: diffusers', whose weights the stack shares.
        checkpoint: that it is from.
        spec: what its engines are built from.
    """

    transformer: Any
    checkpoint: Checkpoint
    stack: WanStack
    spec: EngineSpec


def load_stack(config: CoreConfig) -> LoadedStack:
    """Loads the transformer that settings name, with its variant, and says what its engines are built from.

    Raises:
        ModelError: it cannot be loaded here.
        SettingError: a size of `engine_sizes` is none of the model's.
    """
    checkpoint = find_checkpoint(config.model)
    variant = find_variant(config.model_variant)
    transformer = load_transformer(checkpoint, config.device, config.dtype)
    fingerprint = checkpoint.fingerprint
    if variant is not None:
        fuse_variant(transformer, variant)
        fingerprint = variant.fingerprint(fingerprint)
    spec = served_spec(checkpoint, fingerprint, transformer, config)
    return LoadedStack(transformer, checkpoint, WanStack(transformer), spec)


def served_spec(checkpoint: Checkpoint, fingerprint: str, transformer: Any, config: CoreConfig) -> EngineSpec:
    """What a server's engines are built from.

    Args:
        fingerprint: of the model with what is fused into it.

    Raises:
        SettingError: a size of `engine_sizes` is none of the model's.
    """
    buckets = size_buckets(checkpoint, config.engine_sizes, transformer.config.patch_size[1])
    slots, rank, options = config.style_slots, config.max_rank, config.engine_options
    return engine_spec(checkpoint, fingerprint, transformer, slots, rank, buckets, options)


def size_buckets(
    checkpoint: Checkpoint, sizes: tuple[tuple[int, int, int], ...], latents_per_patch: int
) -> tuple[Bucket, ...]:
    """Buckets for clips of sizes (width, height, frames) in pixels; ANY_SHAPE where none is given.

    Raises:
        SettingError: one is no size of the model's.
    """
    grids = size_grids(checkpoint, sizes, latents_per_patch)
    return buckets_for(grids) if grids else (ANY_SHAPE,)


def size_grids(
    checkpoint: Checkpoint, sizes: tuple[tuple[int, int, int], ...], latents_per_patch: int
) -> tuple[Grid, ...]:
    """The patches of clips of sizes (width, height, frames) in pixels.

    Raises:
        SettingError: one is no size of the model's.
    """
    stride = pixel_stride(checkpoint) * latents_per_patch
    grids = []
    for width, height, frames in sizes:
        if (
            width < 1
            or height < 1
            or frames < 1
            or width % stride
            or height % stride
            or frames % VAE_TEMPORAL_STRIDE != 1
        ):
            raise SettingError(
                f"engine_sizes: {width}x{height}x{frames}: width and height are multiples of {stride}, frames 4k + 1"
            )
        grids.append(Grid((frames - 1) // VAE_TEMPORAL_STRIDE + 1, height // stride, width // stride))
    return tuple(grids)
