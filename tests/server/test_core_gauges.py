"""The server's gauges of its engine cores are sums over those that there are."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from cinecat.engines.messages import CoreMemory, EngineNews, SlotMemory, SlotUse
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.metrics import Metrics


def test_what_cores_tell_is_added_up_and_leaves_with_them() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    first, second = CoreGauges(metrics), CoreGauges(metrics)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"cinecat_{name}", labels)

    for gauges, slots in ((first, 8), (second, 4)):
        gauges.tell(SlotMemory("cpu", slots, 32, size_bytes=1, available_bytes=None))
        gauges.tell(EngineNews("it is being built", building=True))
    first.slots(3, SlotUse(hits=1, evictions=2, swap_seconds=(0.5,)))
    first.slots(5)
    second.slots(1)
    first.memory(CoreMemory(resident_bytes=100, peak_bytes=7))
    second.memory(CoreMemory(resident_bytes=30))
    assert (value("style_slots"), value("style_slots_resident"), value("engine_building")) == (12, 6, 2)
    assert (value("core_memory_bytes", kind="resident"), value("core_memory_bytes", kind="peak")) == (130, 7)
    assert (value("style_slot_hits_total"), value("style_slot_evictions_total")) == (1, 2)

    first.restarting()
    first.loading()
    assert (value("engine_building"), first.building, second.building) == (1, False, True)
    second.gone()
    assert (value("style_slots"), value("style_slots_resident"), value("engine_building")) == (8, 5, 0)
    assert (value("core_memory_bytes", kind="resident"), value("core_restarts_total")) == (100, 1)
