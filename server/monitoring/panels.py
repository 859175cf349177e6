"""Dashboards as typed values, and the JSON that Grafana reads them from.

The fields of the JSON are those that Grafana 12 exports (its dashboard model, schema version 41).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, Literal

SCHEMA_VERSION = 41

_COLUMNS = 24
_HEIGHTS = {"timeseries": 8, "bargauge": 8, "stat": 4}
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_CHOSEN = 'instance=~"$instance"'

# A share of nothing is NaN to Prometheus.
_NOTHING = {"type": "special", "options": {"match": "null+nan", "result": {"text": "–"}}}


@dataclass(frozen=True)
class Query:
    """One PromQL expression of a panel.

    Attributes:
        expr: with `@` where the matcher of the chosen servers goes: `cinecat_jobs{@, state="queued"}`.
        legend: Grafana's template for the name of each series, such as "{{priority}}".
    """

    expr: str
    legend: str

    @property
    def promql(self) -> str:
        """As Grafana sends it, with Grafana's variables in it."""
        return self.expr.replace("@", _CHOSEN)


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: what it tells.
        description: how to read it; shown beside the title.
        unit: of the values, by Grafana's identifiers: "s", "bytes", "percentunit", "suffix: frames/s".
        kind: a curve over time, a number that is true now, or bars of what came together in the shown time.
        width: of 24 columns.
        stacked: whether the series are parts of a whole.
        limit: from which value on a number turns red; None leaves it uncoloured.
        low_is_bad: whether it is red below that value instead.
        words: what to show in place of some values.
        names: whether a number is shown by the name of its series alone, which is what it tells.
        whole: whether the values count things; `increase` makes fractions of them.
        most: the end of the scale; None lets it follow the values.
    """

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str
    kind: Literal["timeseries", "stat", "bargauge"] = "timeseries"
    width: int = 8
    stacked: bool = False
    limit: float | None = None
    low_is_bad: bool = False
    words: Mapping[float, str] = field(default_factory=dict)
    names: bool = False
    whole: bool = False
    most: float | None = None

    def to_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """Args: number: of the panel in its dashboard; x, y: of its upper left corner, in columns and rows."""
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": _DATASOURCE,
            "gridPos": {"h": _HEIGHTS[self.kind], "w": self.width, "x": x, "y": y},
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": self._options(),
            "targets": [self._target(*named) for named in zip(ascii_uppercase, self.queries, strict=False)],
        }

    def _target(self, ref: str, query: Query) -> dict[str, Any]:
        # Bars are of the whole time that is shown, a number is of now.
        instant = self.kind == "bargauge"
        return {
            "refId": ref,
            "datasource": _DATASOURCE,
            "editorMode": "code",
            "expr": query.promql,
            "legendFormat": query.legend,
            "instant": instant,
            "range": not instant,
        }

    def _defaults(self) -> dict[str, Any]:
        found: dict[str, Any] = {"unit": self.unit, "min": 0, "thresholds": self._thresholds()}
        if self.most is not None:
            found["max"] = self.most
        if self.whole:
            found["decimals"] = 0
        options = {f"{value:g}": {"text": text} for value, text in self.words.items()}
        found["mappings"] = [{"type": "value", "options": options}] if options else []
        if self.kind == "stat":
            found["mappings"].append(_NOTHING)
        if self.kind == "timeseries":
            found["custom"] = {
                "drawStyle": "line",
                "lineWidth": 1,
                "fillOpacity": 30 if self.stacked else 8,
                "showPoints": "auto",
                "spanNulls": False,
                "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
                "thresholdsStyle": {"mode": "off" if self.limit is None else "dashed"},
            }
            found["color"] = {"mode": "palette-classic"}
        else:
            found["color"] = {"mode": "thresholds"}
        return found

    def _thresholds(self) -> dict[str, Any]:
        good, bad = ("red", "green") if self.low_is_bad else ("green", "red")
        if self.limit is None:
            return {"mode": "absolute", "steps": [{"color": "blue", "value": None}]}
        return {"mode": "absolute", "steps": [{"color": good, "value": None}, {"color": bad, "value": self.limit}]}

    def _options(self) -> dict[str, Any]:
        reduced = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        match self.kind:
            case "timeseries":
                return {
                    "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
                    "tooltip": {"mode": "multi", "sort": "desc"},
                }
            case "stat":
                return {
                    "reduceOptions": reduced,
                    "colorMode": "value",
                    "graphMode": "none",
                    "justifyMode": "center",
                    "textMode": "name" if self.names else "auto",
                }
            case "bargauge":
                return {
                    "reduceOptions": reduced,
                    "displayMode": "basic",
                    "orientation": "horizontal",
                    "showUnfilled": True,
                }


@dataclass(frozen=True)
class Row:
    """Panels under one heading, laid out from left to right."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """Attributes: uid: by which links and provisioning know it, for ever."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> list[Panel]:
        """All of them."""
        return [panel for row in self.rows for panel in row.panels]

    def to_json(self) -> dict[str, Any]:
        """As Grafana imports and provisions it."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["cinecat"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "timezone": "browser",
            "time": {"from": "now-3h", "to": "now"},
            "refresh": "30s",
            "links": [
                {
                    "type": "dashboards",
                    "title": "Cinecat",
                    "tags": ["cinecat"],
                    "asDropdown": False,
                    "includeVars": True,
                    "keepTime": True,
                }
            ],
            "annotations": {"list": []},
            "templating": {"list": [_DATASOURCE_VARIABLE, _INSTANCE_VARIABLE]},
            "panels": _laid_out(self.rows),
        }


def _laid_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    placed: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        placed.append(_heading(row, len(placed) + 1, y))
        x, y, height = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > _COLUMNS:
                x, y, height = 0, y + height, 0
            placed.append(panel.to_json(len(placed) + 1, x, y))
            x, height = x + panel.width, max(height, _HEIGHTS[panel.kind])
        y += height
    return placed


def _heading(row: Row, number: int, y: int) -> dict[str, Any]:
    where = {"h": 1, "w": _COLUMNS, "x": 0, "y": y}
    return {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": where, "panels": []}


_DATASOURCE_VARIABLE = {
    "type": "datasource",
    "name": "datasource",
    "label": "Prometheus",
    "query": "prometheus",
    "hide": 0,
    "refresh": 1,
    "regex": "",
    "multi": False,
    "includeAll": False,
    "current": {},
    "options": [],
}

_INSTANCE_VARIABLE = {
    "type": "query",
    "name": "instance",
    "label": "Server",
    "datasource": _DATASOURCE,
    "definition": "label_values(cinecat_ready, instance)",
    "query": {"query": "label_values(cinecat_ready, instance)", "refId": "servers"},
    "hide": 0,
    "refresh": 2,
    "regex": "",
    "sort": 1,
    "multi": True,
    "includeAll": True,
    "allValue": ".*",
    "current": {"text": ["All"], "value": ["$__all"]},
    "options": [],
}
