"""Benchmarks: `cinecat bench NAME`."""

from collections.abc import Callable, Mapping
from pathlib import Path

from cinecat.server.bench.chaos import bench_chaos
from cinecat.server.bench.engines import bench_engines
from cinecat.server.bench.harness import Report
from cinecat.server.bench.model import bench_model
from cinecat.server.bench.rank import bench_rank
from cinecat.server.bench.schedule import bench_schedule
from cinecat.server.bench.serve import bench_serve
from cinecat.server.bench.sharding import bench_sharding
from cinecat.server.bench.styles import bench_styles
from cinecat.server.bench.telemetry import bench_telemetry
from cinecat.server.bench.tokens import bench_tokens
from cinecat.server.bench.watchers import bench_watchers

BENCHES: Mapping[str, Callable[[bool, Path | None], Report]] = {
    "serve": bench_serve,
    "model": bench_model,
    "rank": bench_rank,
    "styles": bench_styles,
    "tokens": bench_tokens,
    "engines": bench_engines,
    "schedule": bench_schedule,
    "chaos": bench_chaos,
    "sharding": bench_sharding,
    "watchers": bench_watchers,
    "telemetry": bench_telemetry,
}
