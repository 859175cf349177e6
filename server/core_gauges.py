"""What an engine core tells of itself, for the log and for the server's gauges, which are sums over its cores."""

from __future__ import annotations

import structlog
from prometheus_client import Gauge

from cinecat.engines.messages import (
    CoreMemory,
    CorePlaced,
    EngineCacheEvent,
    EngineNews,
    Notice,
    SlotMemory,
    SlotUse,
    VariantFused,
    WaitsForRoom,
)
from cinecat.server.metrics import MEMORY_KINDS, Metrics

log = structlog.get_logger(__name__)


class CoreGauges:
    """One core's part.

    Attributes:
        building: the engine that the settings name is being built, and torch stands in.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._parts: dict[Gauge, float] = {}
        self.building = False

    def tell(self, notice: Notice) -> None:
        """Logs and counts what the core has to say."""
        match notice:
            case SlotMemory():
                self._set(self._metrics.style_slots, notice.style_slots)
                log.info(
                    "memory for styles",
                    bytes=notice.size_bytes,
                    style_slots=notice.style_slots,
                    max_rank=notice.max_rank,
                    device=notice.device,
                    available_bytes=notice.available_bytes,
                )
            case EngineNews():
                self._build(notice.building)
                log.warning("engine", news=notice.sentence)
            case EngineCacheEvent():
                self._metrics.engine_event(notice)
            case VariantFused():
                log.info(
                    "model variant", file=notice.name, parameters=notice.parameters, ignored_tensors=notice.ignored
                )
            case WaitsForRoom():
                log.warning("no node has room for a replica; it waits until one has", needs=notice.needs)
            case CorePlaced():
                log.info("engine core placed", node=notice.node, node_pid=notice.pid)

    def loading(self) -> None:
        """A core begins to load; it says so where it builds an engine."""
        self._build(False)

    def restarting(self) -> None:
        """Another core takes the place of one that died."""
        self._metrics.core_restarts.inc()

    def slots(self, resident: int, use: SlotUse | None = None) -> None:
        """How many style slots hold something, and what one call did with them."""
        self._set(self._metrics.style_slots_resident, resident)
        if use is not None:
            self._metrics.slots_used(use)

    def memory(self, memory: CoreMemory) -> None:
        for kind in MEMORY_KINDS:
            self._set(self._metrics.core_memory.labels(kind), getattr(memory, f"{kind}_bytes"))

    def gone(self) -> None:
        """The core has left for good."""
        self.building = False
        for gauge in self._parts:
            self._set(gauge, 0)

    def _build(self, building: bool) -> None:
        self.building = building
        self._set(self._metrics.engine_building, building)

    def _set(self, gauge: Gauge, value: float) -> None:
        gauge.inc(value - self._parts.get(gauge, 0.0))
        self._parts[gauge] = value
