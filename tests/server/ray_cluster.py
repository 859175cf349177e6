"""A Ray cluster of several nodes on this machine, each with room for so many replicas."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

# Few resources: tests share a machine.
_NODE = {"object_store_memory": 100 * 2**20, "include_log_monitor": False}
_HEAD = {**_NODE, "num_cpus": 0, "include_dashboard": False, "no_monitor": True}


@contextlib.contextmanager
def ray_cluster(*cpus: int) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster`: a head without CPUs, and a node with each of these numbers of them."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'cinecat[ray]'")
    from ray.cluster_utils import Cluster

    # Nothing is told to anybody, and no process is ended because others on the machine take memory.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    cluster = Cluster(initialize_head=True, head_node_args=_HEAD | _agent_ports())
    try:
        for count in cpus:
            add_node(cluster, count)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any, cpus: int) -> Any:
    return cluster.add_node(num_cpus=cpus, **_NODE, **_agent_ports())


def _agent_ports() -> dict[str, int]:
    """Free ones, given by name: a node would wait 15 s for its agents to choose them, which on a busy machine is too
    short, and then end itself.
    """
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in names]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return {name: probe.getsockname()[1] for name, probe in zip(names, probes, strict=True)}


def raylet_pid(node: Any) -> int:
    """Of the process that a node is."""
    (raylet,) = node.all_processes["raylet"]
    return int(raylet.process.pid)
