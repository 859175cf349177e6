"""A real Prometheus beside a real server: every panel and every rule has data once the server has worked."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cinecat import Client, Previews
from cinecat.clip import Job
from cinecat.errors import JobCancelled, JobFailed, NotFound
from cinecat.server.local_server import LocalServer
from cinecat.server.monitoring.dashboards import DASHBOARDS
from tests.server.monitoring.prometheus import Prometheus, needs_prometheus, scraping

# A minute on two cores; that every query names metrics that there are is tested without a server.
pytestmark = [needs_prometheus, pytest.mark.slow]

# Of Grafana's variables, as the browser fills them in for the last few minutes.
VARIABLES = {"$instance": ".*", "$__rate_interval": "2m", "$__range": "5m"}
CLIP: dict[str, Any] = {"prompt": "a star moves left", "size": "64x64", "frames": 5, "steps": 3, "guidance": 1.0}
CAT: dict[str, Any] = {"tokenization": "cat", "keep_ratio": 0.75}

# A threshold holds back what is healthy; with `bool` it lets both sides be seen.
COMPARISON = re.compile(r"(?<=\s)(==|!=|>=|<=|>|<)(?=\s)")


@pytest.fixture(scope="module")
def prometheus(start_server: Any, tmp_path_factory: pytest.TempPathFactory, frame_png: bytes) -> Iterator[Prometheus]:
    """It has watched a server that did all that it can be made to do on this machine."""
    folder = tmp_path_factory.mktemp("watched")
    with (
        start_server(folder, "--checkpoint-steps", "2", "--style-slots", "2") as server,
        scraping(server.metrics_port, folder) as watching,
        Client(server.address, tenant="studio-a") as a,
        Client(server.address, tenant="studio-b") as b,
    ):
        eventually(lambda: watching.values("cinecat_ready") == [1])
        # A series that comes into being has no rate yet; what happens again has one.
        for _ in range(2):
            work(a, b, frame_png)
            time.sleep(1.5)
        lose_the_core(server, folder, a, frame_png)
        yield watching


def work(a: Client, b: Client, image: bytes) -> None:
    """Clips on both paths, plain and styled, of two tenants and both priorities; one is cancelled, one is refused."""
    clip, seen = {"image": image, **CLIP}, Previews(every_steps=1)
    submitted = [
        a.submit(**clip, priority="batch"),
        a.submit(**clip, priority="batch", previews=seen, style="noir"),
        b.submit(**clip, priority="batch", style="amber", **CAT),
        b.submit(**clip, style=["noir:0.5", "amber:0.5"]),
    ]
    unwanted = a.submit(image=image, **(CLIP | {"steps": 200}))
    b.generate(**clip, previews=seen).result()
    b.generate(**clip, previews=seen, style="noir", **CAT).result()
    a.cancel(unwanted.job_id)
    with pytest.raises(NotFound):
        a.submit(**clip, style="sepia")
    for job in submitted:
        finish(a if job in submitted[:2] else b, job)
    with pytest.raises(JobCancelled):
        finish(a, unwanted)


def lose_the_core(server: LocalServer, folder: Path, client: Client, image: bytes) -> None:
    """Kills the core under a clip, which goes on from its checkpoint, and takes away what another is made from."""
    long = client.submit(image=image, **(CLIP | {"steps": 60}))
    next(event for event in client.watch(long.job_id) if getattr(event, "step", 0) >= 8)
    os.kill(server.core_pid, signal.SIGKILL)
    broken = client.submit(image=image, **CLIP)
    (folder / "data" / "inputs" / f"{broken.job_id}.png").unlink()
    finish(client, long)
    with pytest.raises(JobFailed):
        finish(client, broken)


def finish(client: Client, job: Job) -> None:
    for _ in client.watch(job.job_id):
        pass


def eventually(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.25)


def rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    return [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]


def queries(prometheus: Prometheus) -> dict[str, str]:
    """Every expression that somebody reads, by what it is for."""
    found = {}
    for dashboard in DASHBOARDS:
        for panel in dashboard.panels:
            for query in panel.queries:
                promql = query.promql
                for name, value in VARIABLES.items():
                    promql = promql.replace(name, value)
                found[f"{dashboard.title} / {panel.title} / {query.legend}"] = promql
    for rule in rules(prometheus):
        promql = rule["query"]
        found[rule["name"]] = COMPARISON.sub(r"\1 bool", promql) if rule["type"] == "alerting" else promql
    return found


def test_every_panel_and_every_rule_has_data(prometheus: Prometheus) -> None:
    asked = queries(prometheus)
    deadline = time.monotonic() + 10  # for the last scrape, and the rules after it
    while empty := {name: promql for name, promql in asked.items() if not prometheus.values(promql)}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert empty == {}


def test_every_rule_is_evaluated_without_an_error(prometheus: Prometheus) -> None:
    eventually(lambda: all(rule["health"] != "unknown" for rule in rules(prometheus)))
    assert {rule["name"]: rule["lastError"] for rule in rules(prometheus) if rule["health"] != "ok"} == {}


def test_no_alert_fires_for_a_server_that_does_its_work(prometheus: Prometheus) -> None:
    firing = {
        alert["labels"]["alertname"] for alert in prometheus.ask("alerts")["alerts"] if alert["state"] == "firing"
    }
    assert firing == set()


def test_the_numbers_are_those_of_what_was_done(prometheus: Prometheus) -> None:
    # Six clips a round and the one that lost its core; one a round that was cancelled; one that lost its image.
    for promql, expected in (
        ('sum(cinecat_jobs_ended_total{outcome="succeeded"})', 13),
        ('sum(cinecat_jobs_ended_total{outcome="cancelled"})', 2),
        ('sum(cinecat_jobs_ended_total{outcome="failed"})', 1),
        ("sum(cinecat_core_restarts_total)", 1),
        ("sum(cinecat_requests_refused_total)", 2),
        ('sum(cinecat_frames_total{tokenization="cat"})', 4 * CLIP["frames"]),
        ('count(cinecat_tenant_device_seconds_total{tenant=~"studio-.*"})', 2),
        ("sum(cinecat_jobs)", 0),
    ):
        eventually(lambda promql=promql, expected=expected: prometheus.values(promql) == [expected], 10)  # type: ignore[misc]
