"""Writes docs/metrics.md from the Metrics class: `python -m tests.server.metrics_table`."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from cinecat.server.metrics import MOST_STYLES, MOST_TENANTS, Metrics

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"

_INTRODUCTION = f"""\
<!-- Written by `python -m tests.server.metrics_table`; a test keeps it current. -->
# Metrics

`http://metrics_host:metrics_port/metrics` serves these to Prometheus, from the start of the server on (`cinecat_ready`
is 0 until it takes jobs). Everything is counted where it happens, so a scrape asks neither queue nor GPU. All times are
in seconds, all sizes in bytes.

Prometheus keeps a series for every combination of labels that it has seen, so labels take few values, whatever is asked
for: job ids, prompts and paths are never labels; the first {MOST_TENANTS} tenants and {MOST_STYLES} styles that come
have series of their own and all later ones share `other`; token counts are rounded up to powers of two. The counts
begin anew with each start of the server: use `rate` and `increase`.

"""

_PROCESS = """
Beside them, `process_*` are Prometheus' own of the front's process: CPU seconds, resident memory, open files.
Dashboards and alert rules that use these metrics are described in the [runbook](runbook.md).
"""


def metrics() -> list[MetricWrapperBase]:
    """All that are defined, in their order."""
    return [value for value in vars(Metrics(CollectorRegistry())).values() if isinstance(value, MetricWrapperBase)]


def document() -> str:
    """The whole text of docs/metrics.md."""
    rows = ["| metric | type | labels | what it tells |", "|---|---|---|---|"]
    for metric in metrics():
        (family,) = metric.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return _INTRODUCTION + "\n".join(rows) + "\n" + _PROCESS


if __name__ == "__main__":
    DOCUMENT.write_text(document())
