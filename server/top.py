"""`cinecat top`: a serving Cinecat in a terminal, from its metrics and its list of jobs."""

from __future__ import annotations

import dataclasses
import http.client
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from cinecat import Client
from cinecat.cli import output as out
from cinecat.cli.options import DEFAULT_ADDRESS, Json, Server
from cinecat.clip import Job
from cinecat.errors import CinecatError, ServerTimeout, ServerUnavailable
from cinecat.server.scrapes import History, NotMetrics, Scrape, figures
from cinecat.server.top_view import Lost, Seen, draw
from cinecat.states import JobState

DEFAULT_METRICS = "http://127.0.0.1:9464/metrics"

MOST_WAITING = 200
"""That are asked for, newest first; how many there are is a metric."""

_TIMEOUT_S = 5.0
_EARLIEST = datetime.min.replace(tzinfo=UTC)
_RUNNING = (JobState.CONDITIONING, JobState.DENOISING, JobState.DECODING, JobState.ENCODING)


def top(
    server: Server = DEFAULT_ADDRESS,
    metrics: Annotated[
        str, typer.Option("--metrics", envvar="CINECAT_METRICS", metavar="URL", help="Its Prometheus endpoint.")
    ] = DEFAULT_METRICS,
    interval: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="From one look to the next.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame and exit; rates are over one interval.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Watch a serving Cinecat: its queue, what runs, how fast, on how many tokens, in which slots.

    Rates are over the last seconds, quantiles over the last minutes. Ctrl-C leaves. The exit code is 3 where the server
    or its metrics cannot be reached at the start; later on that is shown, and waited out.
    """
    if not metrics.startswith(("http://", "https://")):
        raise out.usage_error(f"--metrics: {metrics!r} is no URL, such as {DEFAULT_METRICS}")
    if not (once or as_json or sys.stdout.isatty()):
        raise out.usage_error("stdout is no terminal; use --once or --json")
    with Client(server, timeout_s=_TIMEOUT_S) as client:
        look = Look(client, server, metrics)
        look.at_all()
        if once or as_json:
            time.sleep(interval)
            look.at_all()
            if as_json:
                out.show_json(_as_json(look.seen()))
            else:
                console = Console(highlight=False)
                console.print(draw(look.seen(), console.width))
            return
        _live(look, interval)


def _live(look: Look, interval: float) -> None:
    """Until Ctrl-C, which is how one leaves it and no failure."""
    console = Console(highlight=False)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(draw(look.seen(), console.width, console.height), refresh=True)
                time.sleep(interval)
                look.at_what_answers()
    except KeyboardInterrupt:
        pass


@dataclass
class Look:
    """What was seen of a server, and since when it is not any more."""

    client: Client
    server: str
    metrics: str
    history: History = field(default_factory=History)
    running: list[Job] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    lost: dict[str, Lost] = field(default_factory=dict)

    def at_all(self) -> None:
        """Raises CinecatError, which names the option, where there is nothing to be seen."""
        self._at_metrics()
        self._at_jobs()

    def at_what_answers(self) -> None:
        """As `at_all`; what does not answer stays as it was, and is told to be so."""
        sides: dict[str, Callable[[], None]] = {"--metrics": self._at_metrics, "--server": self._at_jobs}
        for name, look in sides.items():
            try:
                look()
            except CinecatError as error:
                since = self.lost[name].since if name in self.lost else datetime.now()
                self.lost[name] = Lost(since, error.message)
            else:
                self.lost.pop(name, None)

    def _at_metrics(self) -> None:
        self.history.add(scrape(self.metrics))

    def _at_jobs(self) -> None:
        try:
            running = list(self.client.jobs(_RUNNING))
            waiting = list(islice(self.client.jobs((JobState.QUEUED,)), MOST_WAITING))
        except (ServerUnavailable, ServerTimeout) as error:
            raise ServerUnavailable(
                f"--server: no server answers at {self.server}: {error.message}; start one with: cinecat serve"
            ) from error
        self.running = sorted(running, key=lambda job: (job.start_time or _EARLIEST, job.job_id))
        self.waiting = sorted(waiting, key=lambda job: (job.queue_position, job.job_id))

    def seen(self) -> Seen:
        lost = list(self.lost.values())
        return Seen(self.server, datetime.now(), figures(self.history), self.running, self.waiting, lost)


def scrape(url: str) -> Scrape:
    """Raises ServerUnavailable where nobody answers, CinecatError where somebody else does."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            text = answer.read().decode()
        return Scrape.of(text, time.monotonic())
    except urllib.error.HTTPError as error:
        raise CinecatError(f"--metrics: {url} answers {error.code} {error.reason}") from error
    except (NotMetrics, UnicodeDecodeError) as error:
        raise CinecatError(f"--metrics: {url}: {error}; the server says at its start where its metrics are") from error
    except http.client.HTTPException as error:
        raise CinecatError(f"--metrics: what listens at {url} does not speak HTTP") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServerUnavailable(
            f"--metrics: {url} cannot be reached: {getattr(reason, 'strerror', None) or reason}; "
            "the port is serve's setting metrics_port"
        ) from error


def _as_json(seen: Seen) -> dict[str, Any]:
    return {
        "server": seen.server,
        "time": seen.time.astimezone(),
        **dataclasses.asdict(seen.figures),
        "jobs_running": [out.job_json(job) for job in seen.running],
        "jobs_waiting": [out.job_json(job) for job in seen.waiting],
    }
