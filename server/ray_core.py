"""The front's end of an engine core that runs on a node of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cinecat.engines.backends.store_folder import default_engine_folder
from cinecat.engines.messages import CoreConfig, ModelInfo
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.core_process import CoreProcess
from cinecat.server.ray_link import Placement, run_link


class RayCore(CoreProcess):
    """A `CoreProcess` whose process is a link: it has the core placed on a node, and passes calls on to it.

    The link is the driver of a Ray job. Whatever ends it, Ray takes the core from the node with it; and whatever ends
    the core or its node ends the link. So all that the front knows of a core's life and death holds here too, and
    nothing of Ray, which ends its drivers when a cluster's head is gone, is in the front's own process.
    """

    def __init__(self, config: CoreConfig, gauges: CoreGauges, placement: Placement) -> None:
        """
        Args:
            config: its model and model_variant are paths on the node, or a hub id.
        """
        if config.engine_cache_dir == str(default_engine_folder()):
            config = replace(config, engine_cache_dir="")  # the default of the node, not this machine's
        super().__init__(config, gauges)
        self._placement = placement

    async def start(self) -> ModelInfo:
        """As `CoreProcess.start`; where no node has room, it waits until one has."""
        model = await super().start()
        if model.device != "cpu":
            # A cluster that is short of GPUs must not get it on CPUs the next time.
            self._placement = replace(self._placement, gpus_optional=False)
        return model

    def _body(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        core, (config,) = super()._body()
        return run_link, (config, core, self._placement)
