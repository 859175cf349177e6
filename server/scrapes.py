"""What two scrapes of the server's metrics say together: rates, quantiles and counts, from their text alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

from cinecat.server.metrics import PRIORITIES

RATE_SECONDS = (10.0, 60.0, 300.0)
"""Rates are over the first of these in which there were `ENOUGH_STEPS`: at 14B a step takes half a minute."""

ENOUGH_STEPS = 5

ENOUGH_JOBS = 10
"""That must have ended in the last minutes for quantiles over them; else they are since the server started."""

LATENCIES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "end to end": ("cinecat_job_seconds", {"outcome": "succeeded"}),
    "first preview": ("cinecat_first_preview_seconds", {}),
}
"""Histograms that are shown, by what they are called."""

Labels = frozenset[tuple[str, str]]


class NotMetrics(ValueError):
    """The text is not what a Cinecat server answers a scrape with."""


@dataclass(frozen=True)
class Scrape:
    """Every sample of one scrape.

    Attributes:
        at: when it was made, in seconds of a clock that is never set back.
        samples: values by sample name and labels.
    """

    at: float
    samples: Mapping[str, Mapping[Labels, float]]

    @classmethod
    def of(cls, text: str, at: float) -> Scrape:
        """Raises NotMetrics for text that is not in Prometheus' format, or not of a Cinecat server."""
        samples: dict[str, dict[Labels, float]] = {}
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        except (ValueError, IndexError, KeyError) as error:
            raise NotMetrics("the answer is not in Prometheus' text format") from error
        if "cinecat_ready" not in samples:
            raise NotMetrics("the answer has no metrics of Cinecat")
        return cls(at, samples)

    def total(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels; 0 where there is none."""
        return sum(self._matching(name, labels))

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """That sum for each value of a label."""
        wanted = labels.items()
        sums: dict[str, float] = {}
        for series, value in self.samples.get(name, {}).items():
            if wanted <= series:
                key = dict(series).get(label, "")
                sums[key] = sums.get(key, 0.0) + value
        return sums

    def label(self, name: str, label: str) -> str:
        """A label of an info metric, of all of its series; empty where there is none."""
        return ", ".join(dict.fromkeys(dict(series).get(label, "") for series in self.samples.get(name, {})))

    def _matching(self, name: str, labels: Mapping[str, str]) -> Iterator[float]:
        wanted = labels.items()
        return (value for series, value in self.samples.get(name, {}).items() if wanted <= series)


@dataclass(frozen=True)
class Window:
    """The time between two scrapes of one server; with no first one, all of it since the server started, which has
    counts and quantiles but no rates.
    """

    before: Scrape | None
    after: Scrape

    @property
    def seconds(self) -> float:
        """How long it is; 0 with no first scrape."""
        return 0.0 if self.before is None else self.after.at - self.before.at

    def increase(self, name: str, **labels: str) -> float:
        before = 0.0 if self.before is None else self.before.total(name, **labels)
        return self.after.total(name, **labels) - before

    def increase_by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """For each value of a label."""
        before = {} if self.before is None else self.before.by(label, name, **labels)
        return {key: value - before.get(key, 0.0) for key, value in self.after.by(label, name, **labels).items()}

    def rate(self, name: str, **labels: str) -> float:
        """Per second; 0 in a window of no length."""
        return self.increase(name, **labels) / self.seconds if self.seconds > 0.0 else 0.0

    def mean(self, histogram: str, **labels: str) -> float | None:
        """Of what was observed; None where nothing was."""
        count = self.increase(f"{histogram}_count", **labels)
        return self.increase(f"{histogram}_sum", **labels) / count if count > 0.0 else None

    def quantile(self, histogram: str, q: float, **labels: str) -> float | None:
        """Of what was observed, within a bucket by a straight line, as Prometheus' histogram_quantile does; None where
        nothing was observed. What lies past the last bound is told as that bound.
        """
        grown = self.increase_by("le", f"{histogram}_bucket", **labels)
        buckets = sorted((float(bound), count) for bound, count in grown.items())
        return quantile(buckets, q)


def quantile(buckets: Sequence[tuple[float, float]], q: float) -> float | None:
    """A quantile of a histogram.

    Args:
        buckets: upper bounds, ascending, with how many observations do not exceed them.
        q: 0 to 1.
    """
    if not buckets or buckets[-1][1] <= 0.0:
        return None
    rank = q * buckets[-1][1]
    for (low, below), (high, count) in pairwise([(0.0, 0.0), *buckets]):
        if count >= rank and count > below:
            return low if math.isinf(high) else low + (high - low) * (rank - below) / (count - below)
    return buckets[-1][0]


class History:
    """The scrapes of the last minutes, of one run of the server: when it starts anew, so do its counts."""

    def __init__(self) -> None:
        self._scrapes: deque[Scrape] = deque()

    def add(self, scrape: Scrape) -> None:
        started = "process_start_time_seconds"
        if self._scrapes and self._scrapes[-1].total(started) != scrape.total(started):
            self._scrapes.clear()
        self._scrapes.append(scrape)
        while len(self._scrapes) > 2 and scrape.at - self._scrapes[1].at >= RATE_SECONDS[-1]:
            self._scrapes.popleft()

    @property
    def recent(self) -> Window:
        """The shortest window for rates that has enough in it, or the longest that there is."""
        windows = [self.last(seconds) for seconds in RATE_SECONDS]
        return next((w for w in windows if w.increase("cinecat_step_jobs_count") >= ENOUGH_STEPS), windows[-1])

    @property
    def latest(self) -> Scrape:
        return self._scrapes[-1]

    def last(self, seconds: float) -> Window:
        """The window of about so many seconds; shorter where there are not as many."""
        after = self.latest
        older = [scrape for scrape in self._scrapes if after.at - scrape.at >= seconds]
        return Window(older[-1] if older else self._scrapes[0], after)


@dataclass(frozen=True)
class Latency:
    """Quantiles, in seconds, of what was observed of jobs of one priority."""

    what: str
    priority: str
    p50: float
    p95: float
    count: int


@dataclass(frozen=True)
class Figures:
    """What an operator looks at. Rates are per second over the last `rate_seconds`, memory is in bytes.

    Attributes:
        queue: jobs that wait, by priority.
        running: jobs that have begun and not ended.
        ended: jobs since the server started, by outcome.
        jobs_per_step: mean number of jobs that shared a step; None where there was no step.
        tokens_per_second: of the denoiser, by path.
        uniform_per_second: tokens that the uniform path would have taken for the steps of CAT clips.
        keep_ratio: of CAT clips' steps; None where there were none.
        slots: styles that may be resident at once.
        latencies: over the last `latency_seconds`; None is since the server started, where few jobs ended lately.
        tenants: shares of the engine core's time, the largest first.
    """

    ready: bool
    version: str
    model: str
    device: str
    dtype: str
    engine: str
    engine_building: bool
    queue: dict[str, int]
    running: int
    ended: dict[str, int]
    rate_seconds: float
    steps_per_second: float
    jobs_per_step: float | None
    tokens_per_second: dict[str, float]
    uniform_per_second: float
    keep_ratio: float | None
    slots: int
    slots_resident: int
    slot_hits: int
    slot_loads: int
    slot_evictions: int
    memory: dict[str, int]
    core_restarts: int
    resumes: int
    preemptions: int
    latencies: list[Latency]
    latency_seconds: float | None
    tenants: dict[str, float]


def figures(history: History) -> Figures:
    """The figures of the latest scrape, and rates up to it."""
    now, recent = history.latest, history.recent
    tokens = recent.increase("cinecat_tokens_total", tokenization="cat")
    uniform = recent.increase("cinecat_tokens_uniform_total", tokenization="cat")
    latencies, latency_seconds = _latencies(history)
    states = now.by("state", "cinecat_jobs")
    info = "cinecat_model_info"
    return Figures(
        ready=now.total("cinecat_ready") == 1.0,
        version=now.label("cinecat_build_info", "version"),
        model=now.label(info, "model"),
        device=now.label(info, "device"),
        dtype=now.label(info, "dtype"),
        engine=now.label(info, "engine"),
        engine_building=now.total("cinecat_engine_building") > 0.0,
        queue=_whole(now.by("priority", "cinecat_queue_depth")),
        running=round(sum(states.values()) - states.get("queued", 0.0)),
        ended=_whole(now.by("outcome", "cinecat_jobs_ended_total")),
        rate_seconds=recent.seconds,
        steps_per_second=recent.rate("cinecat_step_jobs_count"),
        jobs_per_step=recent.mean("cinecat_step_jobs"),
        tokens_per_second={path: recent.rate("cinecat_tokens_total", tokenization=path) for path in ("uniform", "cat")},
        uniform_per_second=recent.rate("cinecat_tokens_uniform_total", tokenization="cat"),
        keep_ratio=tokens / uniform if uniform else None,
        slots=round(now.total("cinecat_style_slots")),
        slots_resident=round(now.total("cinecat_style_slots_resident")),
        slot_hits=round(now.total("cinecat_style_slot_hits_total")),
        slot_loads=round(now.total("cinecat_style_slot_loads_total")),
        slot_evictions=round(now.total("cinecat_style_slot_evictions_total")),
        memory=_whole(now.by("kind", "cinecat_core_memory_bytes")),
        core_restarts=round(now.total("cinecat_core_restarts_total")),
        resumes=round(now.total("cinecat_resumes_total")),
        preemptions=round(now.total("cinecat_preemptions_total")),
        latencies=latencies,
        latency_seconds=latency_seconds,
        tenants=_shares(recent.increase_by("tenant", "cinecat_tenant_device_seconds_total")),
    )


def _latencies(history: History) -> tuple[list[Latency], float | None]:
    lately = history.last(RATE_SECONDS[-1])
    if lately.increase("cinecat_jobs_ended_total", outcome="succeeded") >= ENOUGH_JOBS:
        return _quantiles(lately), lately.seconds
    return _quantiles(Window(None, history.latest)), None


def _quantiles(window: Window) -> list[Latency]:
    found = []
    for what, (histogram, labels) in LATENCIES.items():
        for priority in PRIORITIES:
            wanted = {**labels, "priority": priority}
            count = round(window.increase(f"{histogram}_count", **wanted))
            p50, p95 = (window.quantile(histogram, q, **wanted) for q in (0.5, 0.95))
            if p50 is not None and p95 is not None:
                found.append(Latency(what, priority, p50, p95, count))
    return found


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {name: value / total for name, value in ordered if value > 0.0}


def _whole(values: Mapping[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in values.items()}
