"""What `cinecat top` draws: one frame, for a terminal of any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cinecat.cli.output import plain
from cinecat.clip import Job
from cinecat.server.scrapes import Figures

NARROW, WIDE = 78, 110
"""Columns below which tables leave out what is least asked for, and from which on job ids are whole."""

_SHORT_ID, _STYLE = 12, 18
_BESIDE_REASON = 86

_BAR, _FIGURE = 12, 6
_FEWEST_ROWS = 3
_MOST_TENANTS = 6
_GAP = "  "
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Lost:
    """Something that does not answer any more; what is shown of it is as old."""

    since: datetime
    message: str


@dataclass(frozen=True)
class Seen:
    """What one look at a server found. Running jobs are in the order of their beginning, waiting ones of their turn."""

    server: str
    time: datetime
    figures: Figures
    running: Sequence[Job]
    waiting: Sequence[Job]
    lost: Sequence[Lost] = ()


def draw(seen: Seen, width: int, height: int | None = None) -> RenderableType:
    """A frame of at most `width` columns; of `height` lines, with as many waiting jobs as there is room for."""
    title = [_title(seen, width)]
    title += [_lost(lost, width) for lost in seen.lost]
    facts = _facts(seen.figures, width)
    parts: list[RenderableType] = [*title, Text(), *facts]
    used = len(title) + 1 + len(facts)
    if seen.figures.latencies:
        parts += [Text(), _latencies(seen.figures, width < NARROW)]
        used += 2 + len(seen.figures.latencies)
    parts += [Text(), _running(seen.running, width) if seen.running else Text("nothing runs", "dim")]
    used += 2 + len(seen.running)
    if seen.waiting:
        fitting = len(seen.waiting) if height is None else max(_FEWEST_ROWS, height - used - 3)
        shown = seen.waiting[:fitting]
        parts += [Text(), _waiting(shown, width)]
        more = max(sum(seen.figures.queue.values()), len(seen.waiting)) - len(shown)
        parts += [Text(f"and {more:,} more", "dim")] if more else []
    return Group(*parts)


def _title(seen: Seen, width: int) -> Text:
    state = ("ready", "green") if seen.figures.ready else ("not ready", "bold red")
    state = ("not reachable", "bold red") if seen.lost else state
    title = Text.assemble(("cinecat ", "bold"), plain(seen.server), " ", state)
    time = f"{seen.time:%H:%M:%S}"
    title.append(" " * max(1, width - title.cell_len - len(time)) + time, "dim")
    title.truncate(width, overflow="ellipsis")
    return title


def _lost(lost: Lost, width: int) -> Text:
    text = Text(f"since {lost.since:%H:%M:%S} {plain(lost.message)}", "red")
    text.truncate(width, overflow="ellipsis")
    return text


def _facts(figures: Figures, width: int) -> list[Text]:
    """Lines that break between phrases."""
    facts = {name: [plain(phrase) for phrase in phrases if phrase] for name, phrases in _phrases(figures).items()}
    indent = max(map(len, facts)) + len(_GAP)
    lines = []
    for name, phrases in facts.items():
        label = name
        for line in _filled(phrases, width - indent):
            lines.append(Text.assemble((label.ljust(indent), "dim"), line))
            lines[-1].truncate(width, overflow="ellipsis")
            label = ""
    return lines


def _phrases(f: Figures) -> dict[str, list[str]]:
    tokens = [f"{path} {_number(rate)}/s" for path, rate in f.tokens_per_second.items()]
    if f.keep_ratio is not None:
        tokens += [f"instead of {_number(f.uniform_per_second)}/s", f"keep ratio {f.keep_ratio:.2f}"]
    memory = {kind: _size(size) for kind, size in f.memory.items() if size}
    device = [
        f"{memory[kind]} {words}"
        for kind, words in (("allocated", "allocated"), ("peak", "at the peak"), ("available", "left"))
        if kind in memory
    ]
    facts = {
        "model": [f.model, f.device, f.dtype, f"engine {f.engine}", "another is being built" * f.engine_building],
        "queue": [f"{jobs:,} {priority}" for priority, jobs in f.queue.items()],
        "jobs": [f"{f.running:,} running", *(f"{jobs:,} {outcome}" for outcome, jobs in f.ended.items())],
        "steps": [
            f"{_number(f.steps_per_second)}/s",
            "" if f.jobs_per_step is None else f"{f.jobs_per_step:.1f} jobs in each",
            f"over {_window(f.rate_seconds)}",
        ],
        "tokens": tokens,
        "style slots": [
            f"{f.slots_resident}/{f.slots} resident",
            _count(f.slot_hits, "hit"),
            _count(f.slot_loads, "load"),
            _count(f.slot_evictions, "eviction"),
        ],
        "memory": [f"core {memory['resident']}" if "resident" in memory else "not seen yet"],
        "device": device,
        "core": [_count(f.core_restarts, "restart"), _count(f.resumes, "resume"), _count(f.preemptions, "preemption")],
    }
    if len(f.tenants) > 1:
        shares = [f"{name} {share:.0%}" for name, share in f.tenants.items()]
        others = len(shares) - _MOST_TENANTS
        facts["tenants"] = [*shares[:_MOST_TENANTS], f"and {others} more" if others > 0 else ""]
    return {name: phrases for name, phrases in facts.items() if phrases}


def _latencies(f: Figures, narrow: bool) -> Table:
    window = "SINCE THE START" if f.latency_seconds is None else f"OVER {_window(f.latency_seconds).upper()}"
    table = _table(window, *(() if narrow else ("PRIORITY",)), right=("P50", "P95", *(() if narrow else ("JOBS",))))
    for latency in f.latencies:
        p50, p95 = f"{latency.p50:.2f} s", f"{latency.p95:.2f} s"
        if narrow:
            table.add_row(f"{latency.what}, {latency.priority}", p50, p95)
        else:
            table.add_row(latency.what, latency.priority, p50, p95, f"{latency.count:,}")
    return table


def _running(jobs: Sequence[Job], width: int) -> Table:
    narrow = width < NARROW
    table = _table("RUNNING", *(("STATE",) if narrow else ("STYLE", "STATE", "")), right=("STEP", "ETA"))
    for job in jobs:
        about: list[RenderableType] = [Text(plain(job.state))]
        if not narrow:
            bar = ProgressBar(total=max(1, job.total_steps), completed=job.step, width=_BAR)
            about = [_style(job), *about, bar]
        table.add_row(_id(job, width), *about, f"{job.step}/{job.total_steps}", _eta(job))
    return table


def _waiting(jobs: Sequence[Job], width: int) -> Table:
    narrow = width < NARROW
    table = _table("WAITING", *(() if narrow else ("STYLE", "PRIORITY")), right=("AHEAD", "ETA"))
    table.add_column(overflow="ellipsis", no_wrap=True, max_width=max(1, width - _BESIDE_REASON))
    for job in jobs:
        about: list[RenderableType] = [] if narrow else [_style(job), plain(job.priority)]
        reason = Text(plain(job.wait_reason) if width >= WIDE else "", "dim")
        table.add_row(_id(job, width), *about, f"{job.queue_position}", _eta(job), reason)
    return table


def _id(job: Job, width: int) -> Text:
    return Text(plain(job.job_id)[: None if width >= WIDE else _SHORT_ID])


def _style(job: Job) -> Text:
    text = Text(plain(job.settings.style))
    text.truncate(_STYLE, overflow="ellipsis")
    return text


def _table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in left:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True, min_width=_FIGURE)
    return table


def _filled(phrases: Sequence[str], width: int) -> list[str]:
    """Phrases in lines of at most a width, where each fits into one."""
    lines = [""]
    for phrase in phrases:
        longer = _GAP.join(filter(None, (lines[-1], phrase)))
        if lines[-1] and len(longer) > width:
            lines.append(phrase)
        else:
            lines[-1] = longer
    return lines


def _eta(job: Job) -> str:
    return "" if job.eta_seconds is None else _duration(job.eta_seconds)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def _window(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _size(size: float) -> str:
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.3g} {_UNITS[unit]}"
