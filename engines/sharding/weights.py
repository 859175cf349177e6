"""Weights of the blocks spread over ranks: each keeps a part of every block, and has a whole one while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from cinecat.engines.backends.stack import WanStack
from cinecat.engines.placement import bring
from cinecat.engines.sharding.ranks import Ranks


def spread_weights(transformer: Any, stack: WanStack, ranks: Ranks, how: str) -> None:
    """Spreads a stack's weights over the ranks that share a sequence, with torch's FSDP; they always run the same
    forwards. What is not in the blocks stays whole on each.

    Args:
        transformer: diffusers', whose blocks run in the stack alone from now on; with weights on the host, of which
            only a block at a time then comes to the device whole.
        how: "fsdp" or "none", which does nothing.
    """
    if how == "none" or ranks.layout.sequence == 1:
        return
    stack.free_parts()
    members = torch.distributed.get_process_group_ranks(ranks.sequence_group)
    mesh = DeviceMesh.from_group(ranks.sequence_group, ranks.device.type, torch.tensor(members))
    for block in stack.blocks:
        fully_shard(block, mesh=mesh)
    bring(transformer, ranks.device, besides=stack.parameters())
