"""`python -m cinecat.server.bench.unmeasured serve ...`: the command line with metrics that count nothing.

The other side of `cinecat bench telemetry`. No setting turns metrics off, since nobody should have to choose.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from cinecat.cli import main


def _same(metric: Any, *values: object, **named: object) -> Any:
    return metric


def _nothing(metric: Any, *values: object, **named: object) -> None:
    """Counts nothing."""


if __name__ == "__main__":
    for kind, methods in ((Counter, ("inc",)), (Gauge, ("inc", "dec", "set")), (Histogram, ("observe",))):
        for method in methods:
            setattr(kind, method, _nothing)
        kind.labels = _same  # type: ignore[method-assign, assignment]
    main()
