"""What a replica asks a Ray cluster for."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from cinecat.engines.backends.store_folder import default_engine_folder
from cinecat.server.cards import next_seat
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.core_process import CoreProcess
from cinecat.server.executors import new_core
from cinecat.server.metrics import Metrics
from cinecat.server.ray_core import RayCore
from cinecat.server.ray_link import Placement
from cinecat.server.settings import Settings


def core(**settings: object) -> CoreProcess:
    checked = Settings.model_validate(settings)
    first = next_seat(checked.device, checked.shard, [])
    made = new_core(
        checked, next_seat(checked.device, checked.shard, [first]), CoreGauges(Metrics(CollectorRegistry()))
    )
    assert isinstance(made, CoreProcess)
    return made


@pytest.mark.parametrize(
    ("settings", "gpus", "optional"),
    [
        ({"device": "cpu"}, 0, False),
        ({"device": "cpu", "shard": "ulysses=2"}, 0, False),
        ({"device": "cuda"}, 1, False),
        ({"device": "cuda", "shard": "ulysses=2,cfg=2"}, 4, False),
        ({"device": "auto", "shard": "ring=2"}, 2, True),
    ],
)
def test_a_replica_asks_for_a_gpu_for_each_of_its_ranks(settings: dict[str, str], gpus: int, optional: bool) -> None:
    made = core(executor="ray", ray_address="head:6379", ray_cpus=3, **settings)
    assert isinstance(made, RayCore)
    assert made._placement == Placement("head:6379", cpus=3, gpus=gpus, gpus_optional=optional)
    # Ray says which GPUs it has, so they are the first that it sees.
    assert made._config.device == settings["device"]


def test_engines_are_in_the_nodes_own_folder_unless_the_settings_name_one() -> None:
    assert core(executor="ray", engine_cache_dir=str(default_engine_folder()))._config.engine_cache_dir == ""
    assert core(executor="ray", engine_cache_dir="/engines")._config.engine_cache_dir == "/engines"


def test_cores_are_on_this_machine_unless_the_settings_say_otherwise() -> None:
    made = core(device="cuda")
    assert type(made) is CoreProcess
    assert made._config.device == "cuda:1"
