"""`cinecat bench schedule`: previews beside renders, under the step scheduler and first come, first served.

Both sides are real servers with the same engine, threads and settings but `--scheduling`. Each round plays one trace of
arrivals to both: a preview is 128x128, 9 frames, 4 steps, a render 128x128, 17 frames, 30 steps; four of five are
previews; gaps are exponential, at 70% of the load that first come, first served could just bear, as measured before.
A preview's latency is from its request to its finished clip; its floor is what previews would have if there were no
renders at all and each ran alone, in the order of arrival: what no scheduler gets below unless previews gain by sharing
forwards. Throughput is compared where it shows, with a burst of the
same mix all at once. Four equal small clips at once show what sharing forwards gains over running them in turn.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from cinecat import AsyncClient, Finished
from cinecat.server.bench.harness import Check, Report, ratio_check
from cinecat.server.local_server import running_server

Side = Literal["steps", "fcfs"]
SIDES: tuple[Side, Side] = ("steps", "fcfs")

# One thread for the engine: on two cores, the front and the callers have the other to themselves.
_OPTIONS = ("--engine", "torch", "--threads", "1")

_LOAD = 0.7
_PREVIEW_SHARE = 0.8
_P95_GOAL = 0.25
_THROUGHPUT_GOAL = 0.97
_TOGETHER_GOAL = 0.8


@dataclass(frozen=True)
class _Kind:
    """A kind of clip."""

    width: int
    height: int
    frames: int
    steps: int
    priority: Literal["interactive", "batch"]


_PREVIEW = _Kind(128, 128, 9, 4, "interactive")
_RENDER = _Kind(128, 128, 17, 30, "batch")
_SMALL = _Kind(64, 64, 5, 30, "batch")


@dataclass(frozen=True)
class _Sizes:
    """How much is measured."""

    rounds: int
    jobs: int
    burst_rounds: int
    burst: int
    small_pairs: int


_FULL = _Sizes(rounds=3, jobs=40, burst_rounds=5, burst=10, small_pairs=15)
_QUICK = _Sizes(rounds=1, jobs=10, burst_rounds=1, burst=5, small_pairs=2)


@dataclass(frozen=True)
class _Served:
    """One clip as its caller saw it, in seconds.

    Attributes:
        foretold: the first ETA that it was given, and what was left then; None where there was none.
    """

    kind: _Kind
    latency: float
    foretold: tuple[float, float] | None


def bench_schedule(quick: bool, out: Path | None) -> Report:
    """Runs the benchmark; with `out`, writes its samples as CSV and a plot of latencies there."""
    sizes = _QUICK if quick else _FULL
    with tempfile.TemporaryDirectory(prefix="cinecat-bench-") as scratch, ExitStack() as stack:
        addresses = {}
        for side in SIDES:
            folder = Path(scratch) / side
            folder.mkdir()
            server = stack.enter_context(running_server(folder, "--scheduling", side, *_OPTIONS))
            addresses[side] = server.address
        report = asyncio.run(_measure(addresses, sizes, Path(scratch)))
    if out is not None:
        report.write_csv(out)
        plot(report.samples, out / "schedule.png")
    return report


async def _measure(addresses: Mapping[Side, str], sizes: _Sizes, folder: Path) -> Report:
    callers = {side: _Caller(address, folder) for side, address in addresses.items()}
    try:
        seconds = {kind: await _work_seconds(callers["fcfs"], kind) for kind in (_PREVIEW, _RENDER)}
        for kind in (_PREVIEW, _RENDER):
            await _work_seconds(callers["steps"], kind)  # so that both have served the same before
        mean = _PREVIEW_SHARE * seconds[_PREVIEW] + (1 - _PREVIEW_SHARE) * seconds[_RENDER]
        samples: dict[str, list[float]] = {}
        served: dict[Side, list[_Served]] = {side: [] for side in SIDES}
        for number in range(sizes.rounds):
            trace = _trace(number, sizes.jobs, mean / _LOAD)
            _add(samples, "preview_p95_s_floor", _p95(_latencies_without_renders(trace, seconds[_PREVIEW])))
            for side in _in_turn(number):
                clips = await _play(callers[side], trace)
                served[side] += clips
                _add(samples, f"preview_p95_s_{side}", _p95([c.latency for c in clips if c.kind is _PREVIEW]))
                _add(samples, f"render_mean_s_{side}", statistics.fmean(c.latency for c in clips if c.kind is _RENDER))
        for number in range(sizes.burst_rounds):
            for side in _in_turn(number):
                kinds = [_RENDER if index % 5 == 4 else _PREVIEW for index in range(sizes.burst)]
                _add(samples, f"burst_s_{side}", await _all_at_once(callers[side], kinds))
        for number in range(-1, sizes.small_pairs):
            for side in _in_turn(number):
                took = await _all_at_once(callers[side], [_SMALL] * 4)
                if number >= 0:
                    _add(samples, f"four_small_s_{side}", took)
    finally:
        for caller in callers.values():
            await caller.client.close()
    for side in SIDES:
        for kind, name in ((_PREVIEW, "preview"), (_RENDER, "render")):
            samples[f"{name}_latency_s_{side}"] = [c.latency for c in served[side] if c.kind is kind]
    errors = [abs(told - left) / left for c in served["steps"] if c.foretold for told, left in [c.foretold] if left > 0]
    samples["eta_error"] = errors
    return Report(
        bench="schedule",
        config={
            **asdict(sizes),
            "load": _LOAD,
            "preview": asdict(_PREVIEW),
            "render": asdict(_RENDER),
            "small": asdict(_SMALL),
            "preview_s_alone": seconds[_PREVIEW],
            "render_s_alone": seconds[_RENDER],
            "model": "wan-tiny",
            "options": list(_OPTIONS),
        },
        samples=samples,
        results=[],
        checks=_checks(samples, errors),
    )


def _checks(samples: Mapping[str, Sequence[float]], eta_errors: Sequence[float]) -> dict[str, Check]:
    # Clips per second of ours over theirs is their time over ours.
    throughput = ratio_check(samples["burst_s_fcfs"], samples["burst_s_steps"])
    low, _, high = statistics.quantiles(eta_errors, n=4)
    return {
        "preview_p95_ratio_vs_fcfs": ratio_check(
            samples["preview_p95_s_steps"], samples["preview_p95_s_fcfs"], at_most=_P95_GOAL
        ),
        "preview_p95_floor_ratio_vs_fcfs": ratio_check(samples["preview_p95_s_floor"], samples["preview_p95_s_fcfs"]),
        "throughput_ratio_vs_fcfs": Check(
            throughput.value, f">= {_THROUGHPUT_GOAL}", throughput.value >= _THROUGHPUT_GOAL, throughput.spread
        ),
        "render_mean_ratio_vs_fcfs": ratio_check(samples["render_mean_s_steps"], samples["render_mean_s_fcfs"]),
        "four_together_ratio_vs_in_turn": ratio_check(
            samples["four_small_s_steps"], samples["four_small_s_fcfs"], at_most=_TOGETHER_GOAL
        ),
        "eta_median_error": Check(statistics.median(eta_errors), "", True, (low, high)),
    }


class _Caller:
    """Asks one server for clips, each of a picture and a prompt of its own."""

    def __init__(self, address: str, folder: Path) -> None:
        self.client = AsyncClient(address)
        self._folder = folder
        self._asked = 0

    async def serve(self, kind: _Kind) -> _Served:
        """Asks for a clip and waits for it."""
        self._asked += 1
        image = self._folder / f"{id(self)}-{self._asked}.png"
        noise = np.random.default_rng(self._asked).integers(0, 256, (kind.height, kind.width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image, compress_level=1)
        started = time.perf_counter()
        job = await self.client.submit(
            image=image,
            prompt=f"shot number {self._asked} of a cat that looks up",
            width=kind.width,
            height=kind.height,
            frames=kind.frames,
            steps=kind.steps,
            guidance=1.0,
            seed=self._asked,
            priority=kind.priority,
        )
        foretold: tuple[float, float] | None = None
        async for event in self.client.watch(job.job_id):
            now = time.perf_counter()
            if isinstance(event, Finished):
                break
            if foretold is None and event.eta_seconds is not None:
                foretold = now, event.eta_seconds
        ended = time.perf_counter()
        image.unlink()
        told = None if foretold is None else (foretold[1], ended - foretold[0])
        return _Served(kind, ended - started, told)


def _in_turn(number: int) -> tuple[Side, ...]:
    return SIDES if number % 2 == 0 else SIDES[::-1]


def _add(samples: dict[str, list[float]], name: str, value: float) -> None:
    samples.setdefault(name, []).append(value)


async def _work_seconds(caller: _Caller, kind: _Kind) -> float:
    """Of a clip that has the server to itself; the first one is not counted."""
    latencies = [(await caller.serve(kind)).latency for _ in range(5)]
    return statistics.median(latencies[1:])


def _trace(number: int, jobs: int, gap: float) -> list[tuple[float, _Kind]]:
    """Times of arrival and kinds; exactly as many renders as their share says, at random places."""
    random = np.random.default_rng(number)
    times = np.cumsum(random.exponential(gap, jobs))
    kinds = [_PREVIEW] * round(jobs * _PREVIEW_SHARE)
    kinds += [_RENDER] * (jobs - len(kinds))
    return [(float(at), kinds[index]) for at, index in zip(times, random.permutation(jobs), strict=True)]


async def _play(caller: _Caller, trace: Sequence[tuple[float, _Kind]]) -> list[_Served]:
    began = time.perf_counter()

    async def arrive(at: float, kind: _Kind) -> _Served:
        await asyncio.sleep(max(0.0, at - (time.perf_counter() - began)))
        return await caller.serve(kind)

    return await asyncio.gather(*(arrive(at, kind) for at, kind in trace))


async def _all_at_once(caller: _Caller, kinds: Sequence[_Kind]) -> float:
    """Seconds until all of them are done."""
    started = time.perf_counter()
    await asyncio.gather(*map(caller.serve, kinds))
    return time.perf_counter() - started


def _latencies_without_renders(trace: Sequence[tuple[float, _Kind]], preview_seconds: float) -> list[float]:
    done, latencies = 0.0, []
    for at, kind in trace:
        if kind is _PREVIEW:
            done = max(done, at) + preview_seconds
            latencies.append(done - at)
    return latencies


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def plot(samples: Mapping[str, Sequence[float]], path: Path) -> None:
    """How many clips were done within how many seconds, for both kinds and sides, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    labels = {"steps": "step scheduler", "fcfs": "first come, first served"}
    for axis, name in zip(axes, ("preview", "render"), strict=True):
        for side in SIDES:
            values: Any = sorted(samples[f"{name}_latency_s_{side}"])
            axis.step(
                values, [(index + 1) / len(values) for index in range(len(values))], where="post", label=labels[side]
            )
        axis.set_xscale("log")
        axis.set_title(f"{name}s")
        axis.set_xlabel("seconds from request to clip")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of the clips that were done")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
