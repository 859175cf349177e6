"""Where engine cores run."""

from __future__ import annotations

from cinecat.engines.messages import CoreConfig
from cinecat.server.cards import Seat
from cinecat.server.core import Core
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.core_process import CoreProcess
from cinecat.server.ray_core import RayCore
from cinecat.server.ray_link import Placement
from cinecat.server.settings import Settings, clip_size


def new_core(settings: Settings, seat: Seat, gauges: CoreGauges) -> Core:
    """A core that is not started yet.

    Args:
        settings: the model's.
        seat: one that `cards.next_seat` gave; on a Ray cluster, Ray says which GPUs it has.
    """
    if settings.executor == "local":
        return CoreProcess(_core_config(settings, seat.device), gauges)
    placement = Placement(
        address=settings.ray_address,
        cpus=settings.ray_cpus,
        gpus=0 if settings.device == "cpu" else seat.cards,
        gpus_optional=settings.device == "auto",
    )
    return RayCore(_core_config(settings, settings.device), gauges, placement)


def _core_config(settings: Settings, device: str) -> CoreConfig:
    return CoreConfig(
        model=settings.model,
        device=device,
        dtype=settings.dtype,
        threads=settings.threads,
        style_slots=settings.style_slots,
        max_rank=settings.max_rank,
        cache_bytes=settings.cache_mib * 2**20,
        style_cache_bytes=settings.style_cache_mib * 2**20,
        model_variant="" if settings.model_variant is None else str(settings.model_variant.expanduser()),
        engine=settings.engine,
        missing_engine=settings.missing_engine,
        engine_sizes=tuple(map(clip_size, settings.engine_sizes)),
        engine_options=settings.engine_options,
        engine_cache_dir=str(settings.engine_cache_dir.expanduser()),
        engine_cache_bytes=round(settings.engine_cache_gib * 2**30),
        offload=settings.offload,
        storage_dtype=settings.storage_dtype,
        shard=settings.shard,
        shard_weights=settings.shard_weights,
        rank_timeout_seconds=settings.rank_timeout_seconds,
        log_format=settings.log_format,
        log_level=settings.log_level,
    )
