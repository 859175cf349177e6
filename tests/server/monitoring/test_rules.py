"""Recording rules and alerts: right by promtool, and each alert with a paragraph for whoever it wakes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from cinecat.server.monitoring.dashboards import DASHBOARDS
from tests.server.monitoring.prometheus import RULES, needs_promtool

RUNBOOK = Path(__file__).parents[3] / "docs" / "runbook.md"
UNIT_TESTS = Path(__file__).parent / "alerts_test.yml"


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: object) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_configuration_and_rules_are_what_prometheus_takes() -> None:
    promtool("check", "config", "--lint=all", "--lint-fatal", RULES / "prometheus.yml")


@needs_promtool
def test_alerts_fire_when_they_must_and_not_otherwise() -> None:
    promtool("test", "rules", UNIT_TESTS)


def test_every_alert_is_tested_firing() -> None:
    cases = [
        case for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"] for case in test.get("alert_rule_test", ())
    ]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == {alert["alert"] for alert in alerts()}


def test_every_alert_says_how_bad_it_is_and_what_happens() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] in ("critical", "warning"), alert["alert"]
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}, alert["alert"]
        assert "$labels.instance" in alert["annotations"]["summary"], alert["alert"]


def test_every_threshold_is_explained() -> None:
    """By a comment between an alert's name and its expression."""
    text = (RULES / "alerts.yml").read_text()
    assert len(re.findall(r"- alert: \w+\n +# ", text)) == len(alerts())


def test_every_alert_has_its_paragraph_and_every_paragraph_its_alert() -> None:
    paragraphs = re.split(r"^## ", RUNBOOK.read_text(), flags=re.MULTILINE)[1:]
    titles = [paragraph.partition("\n")[0] for paragraph in paragraphs]
    assert titles == [alert["alert"] for alert in alerts()]
    assert [alert["annotations"]["runbook"] for alert in alerts()] == [
        f"docs/runbook.md#{title.lower()}" for title in titles
    ]
    for paragraph in paragraphs:
        assert re.findall(r"^\*\*(\w+)\*\*", paragraph, flags=re.MULTILINE) == ["Means", "Look", "Do"]


def test_the_panels_that_the_runbook_names_are_there() -> None:
    named = re.findall(r'"([A-Z][^"]+)"', " ".join(RUNBOOK.read_text().split()))
    titles = [panel.title for dashboard in DASHBOARDS for panel in dashboard.panels]
    assert len(named) > 5
    assert [name for name in named if not any(title.startswith(name) for title in titles)] == []
