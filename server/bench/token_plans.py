"""`cinecat bench tokens --plan-only`: what planning costs at any size, and what it would save; runs no model."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cinecat.server.bench.harness import Check, Report

if TYPE_CHECKING:
    from cinecat.engines.tokens.grid import Grid

UHD = (3840, 2160, 81)
"""Width, height and frames at which planning is judged: 680,400 patches."""

_PAIRS, _QUICK_PAIRS = 15, 3
_KEEP_RATIOS = (1.0, 0.75, 0.5, 0.375, 0.25)
_CHANNELS = 64
_GOAL = 1.0


def bench_plans(width: int, height: int, frames: int, quick: bool, out: Path | None) -> Report:
    """Runs the benchmark; with `out`, writes its samples there as CSV.

    Raises:
        ValueError: no clip has this size.
    """
    from cinecat.engines.tokens.flops import WAN_14B, forward_flops, grid_of

    grid = grid_of(width, height, frames)
    samples = plan_seconds((width, height, frames), _QUICK_PAIRS if quick else _PAIRS)
    whole = sum(forward_flops(WAN_14B, grid.count))
    results: list[dict[str, Any]] = []
    for ratio, tokens in _tokens(grid).items():
        linear, attention = forward_flops(WAN_14B, tokens)
        results.append(
            {
                "keep_ratio": ratio,
                "tokens": tokens,
                "linear_pflop": linear / 1e15,
                "attention_pflop": attention / 1e15,
                "projected_time_over_uniform": (linear + attention) / whole,
            }
        )
    check = plan_check(samples["step"])
    if (width, height, frames) == UHD:
        checks = {"plan_seconds_4k": check}
    else:
        checks = {"plan_seconds": Check(check.value, "", True, check.spread)}  # the goal is set for UHD
    report = Report(
        bench="tokens-plan",
        config={
            "width": width,
            "height": height,
            "frames": frames,
            "tokens": grid.count,
            "threads": 1,
            "projection": "floating-point operations of one row through Wan 14B; the machine is used equally well",
        },
        samples={f"{name}_s": values for name, values in samples.items()},
        results=results,
        checks=checks,
    )
    if out is not None:
        report.write_csv(out)
    return report


def plan_check(step_seconds: Sequence[float]) -> Check:
    """The median time of planning a step, with its quartiles; two samples or more."""
    median = statistics.median(step_seconds)
    low, _, high = statistics.quantiles(step_seconds, n=4)
    return Check(median, f"< {_GOAL:g}", median < _GOAL, (low, high))


def plan_seconds(size: tuple[int, int, int], pairs: int) -> Mapping[str, Sequence[float]]:
    """Seconds of planning on one thread, of synthetic content at width, height and frames.

    Returns:
        Samples by name: "regions" once per clip; "patches", "prices" and "allocate" per step, and "step", their sum.
    """
    import torch

    from cinecat.engines.tokens import path
    from cinecat.engines.tokens.adaptive import FIRST_FRAME_WEIGHT
    from cinecat.engines.tokens.allocation import Prices, Regions
    from cinecat.engines.tokens.flops import grid_of
    from cinecat.engines.tokens.schedule import rung_tokens

    grid = grid_of(*size)
    latents = _content(grid)
    names = ("regions", "patches", "prices", "allocate", "step")
    samples: dict[str, list[float]] = {name: [] for name in names}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(-1, pairs):
            Regions.of.cache_clear()
            marks = [time.perf_counter()]
            regions = Regions.of(grid)
            _ = regions.counts
            marks.append(time.perf_counter())
            content = path.to_patches(latents)[0]
            marks.append(time.perf_counter())
            prices = Prices.of(regions, content, FIRST_FRAME_WEIGHT)
            marks.append(time.perf_counter())
            prices.allocate(rung_tokens(grid, 0.5))
            marks.append(time.perf_counter())
            if number >= 0:
                spans = [after - before for before, after in itertools.pairwise(marks)]
                for name, seconds in zip(names, [*spans, marks[-1] - marks[1]], strict=True):
                    samples[name].append(seconds)
    finally:
        torch.set_num_threads(threads)
    return samples


def _content(grid: Grid) -> Any:
    """Latents float32 [1, 16, T, H, W] of a still, half flat picture with noise in the other half."""
    import torch

    latents = torch.zeros(1, _CHANNELS // 4, grid.frames, 2 * grid.height, 2 * grid.width)
    half = latents[..., : grid.width]
    half.copy_(torch.randn(half.shape, generator=torch.Generator().manual_seed(0)))
    return latents


def _tokens(grid: Grid) -> dict[float, int]:
    from cinecat.engines.tokens.allocation import Regions
    from cinecat.engines.tokens.schedule import rung_tokens

    least = len(Regions.of(grid).patches)
    return {ratio: max(least, rung_tokens(grid, ratio)) for ratio in _KEEP_RATIOS}
