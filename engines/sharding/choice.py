"""Which layout a server's settings mean for its model, on its machine."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from cinecat.engines.backends.loading import size_grids
from cinecat.engines.checkpoint import Checkpoint, read_json
from cinecat.engines.errors import ModelError, SettingError
from cinecat.engines.messages import CoreConfig
from cinecat.engines.model import find_device
from cinecat.engines.sharding.layout import Layout, check_layout, choose_layout, parse_layout

_USUAL_SIZES = ((832, 480, 81),)


def layout_of(checkpoint: Checkpoint, config: CoreConfig) -> Layout:
    """The layout of a replica whose first rank is on the device that is set.

    Raises:
        ModelError: it does not suit the model or the machine.
    """
    device = find_device(config.device)
    transformer = read_json(checkpoint.folder / "transformer" / "config.json")
    heads = int(transformer["num_attention_heads"])
    first, cards = device.index or 0, torch.cuda.device_count()
    on_gpu = device.type == "cuda"
    try:
        layout = parse_layout(config.shard)
        if layout is None:
            grids = size_grids(checkpoint, config.engine_sizes or _USUAL_SIZES, transformer["patch_size"][1])
            linked = on_gpu and all(
                torch.cuda.can_device_access_peer(first, other) for other in range(first + 1, cards)
            )
            most = max(grid.count for grid in grids)
            layout = choose_layout(cards - first if on_gpu else 1, heads, most, linked)
        check_layout(layout, heads, cards - first if on_gpu else None)
    except (SettingError, ValueError) as error:
        problem = f"{error}"
        raise ModelError(problem if problem.startswith("shard") else f"shard: {problem}") from error
    if config.shard_weights != "none" and layout.sequence == 1:
        raise ModelError(
            f"shard_weights: {config.shard_weights} spreads weights over ulysses x ring ranks, and shard is "
            f"{layout}; set shard, or shard_weights to none"
        )
    if config.shard_weights != "none" and (config.offload == "blocks" or config.storage_dtype != "none"):
        raise ModelError(
            "shard_weights, offload, storage_dtype: weights that are spread over ranks cannot also wait on the host "
            "or in fewer bits; set shard_weights to none, or the others to none"
        )
    return layout


def for_ranks(checkpoint: Checkpoint, config: CoreConfig, layout: Layout) -> CoreConfig:
    """The settings of each rank: a folder that is there, and its part of the processor's cores."""
    if layout.ranks == 1:
        return config
    threads = config.threads
    if not threads and find_device(config.device).type == "cpu":
        threads = max(1, (os.cpu_count() or 1) // layout.ranks)
    return replace(config, model=str(checkpoint.folder), threads=threads)
