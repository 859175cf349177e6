"""The dashboards are what their code says, and ask only for what there is."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from cinecat.server.metrics import Metrics
from cinecat.server.monitoring.dashboards import DASHBOARDS, FOLDER, files
from cinecat.server.monitoring.panels import Dashboard
from tests.server.monitoring.prometheus import RULES

ALL = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)


def exported_names() -> set[str]:
    """Every name under which a series can be scraped."""
    registry = CollectorRegistry()
    Metrics(registry)
    return {
        name
        for family in registry.collect()
        for name in {
            "counter": (f"{family.name}_total",),
            "histogram": tuple(f"{family.name}_{part}" for part in ("bucket", "sum", "count")),
        }.get(family.type, (family.name,))
    }


def recorded_names() -> set[str]:
    groups = yaml.safe_load((RULES / "recording.yml").read_text())["groups"]
    return {rule["record"] for group in groups for rule in group["rules"]}


def expressions() -> list[str]:
    """Of all panels and rules."""
    rules = [
        rule["expr"]
        for name in ("recording.yml", "alerts.yml")
        for group in yaml.safe_load((RULES / name).read_text())["groups"]
        for rule in group["rules"]
    ]
    return rules + [query.expr for dashboard in DASHBOARDS for panel in dashboard.panels for query in panel.queries]


def asked_names() -> set[str]:
    return {name for expr in expressions() for name in re.findall(r"\b(?:cinecat[:_]|process_)[\w:]+", expr)}


def test_the_files_of_the_dashboards_are_current() -> None:
    there = {path: path.read_text() for path in FOLDER.iterdir()}
    assert there == files(), "python -m cinecat.server.monitoring.dashboards"


def test_panels_and_rules_ask_only_for_what_is_exported_or_recorded() -> None:
    assert asked_names() - exported_names() - recorded_names() == set()


def test_every_recorded_name_is_used() -> None:
    assert recorded_names() - asked_names() == set()


def test_every_metric_is_looked_at() -> None:
    shown = {re.sub("_(total|bucket|sum|count)$", "", name) for name in asked_names()}
    there = {re.sub("_(total|bucket|sum|count)$", "", name) for name in exported_names() if name.startswith("cinecat")}
    assert there - shown == {"cinecat_jobs_accepted"}  # the queue and the jobs that end tell what comes in


@ALL
def test_panels_fill_their_rows_without_overlapping(dashboard: Dashboard) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard.to_json()["panels"]:
        at = panel["gridPos"]
        cells = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


@ALL
def test_every_panel_says_what_it_tells_and_in_which_unit(dashboard: Dashboard) -> None:
    titles = [panel.title for panel in dashboard.panels]
    assert len(set(titles)) == len(titles)
    for panel in dashboard.panels:
        assert panel.description.endswith("."), panel.title
        assert panel.unit, panel.title
        assert all(query.legend for query in panel.queries), panel.title
        assert panel.kind == "timeseries" or len(panel.queries) == 1, panel.title


@ALL
def test_every_query_is_of_the_chosen_servers_and_the_chosen_prometheus(dashboard: Dashboard) -> None:
    panels: list[dict[str, Any]] = dashboard.to_json()["panels"]
    for panel in panels:
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["expr"].count("{") == target["expr"].count('instance=~"$instance"'), target["expr"]
