"""Where engine cores run."""

from __future__ import annotations

from cinecat.engines.messages import CoreConfig
from cinecat.server.cards import Seat
from cinecat.server.core import Core
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.core_process import CoreProcess
from cinecat.server.settings import Settings, clip_size


def new_core(config: CoreConfig, gauges: CoreGauges) -> Core:
    """A core that is not started yet: a process on this machine."""
    return CoreProcess(config, gauges)


def core_config(settings: Settings, seat: Seat) -> CoreConfig:
    """What a core of a model with these settings needs to start there."""
    return CoreConfig(
        model=settings.model,
        device=seat.device,
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
