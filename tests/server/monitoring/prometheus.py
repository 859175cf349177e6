"""A throw-away Prometheus that scrapes one server every second, with the configuration and the rules of the package."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

RULES = Path(__file__).parents[3] / "server" / "monitoring" / "prometheus"
NEEDED = "needs Debian's package prometheus"

needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason=NEEDED)
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason=NEEDED)


@dataclass(frozen=True)
class Prometheus:
    url: str

    def ask(self, path: str, **query: str) -> Any:
        """The data of an answer of the HTTP API. Raises HTTPError for a query that is wrong."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, promql: str) -> list[float]:
        """What an expression is now, in every series in which it is a number."""
        found = [float(series["value"][1]) for series in self.ask("query", query=promql)["result"]]
        return [value for value in found if not math.isnan(value)]


@contextmanager
def scraping(metrics_port: int, folder: Path) -> Iterator[Prometheus]:
    """Yields it once it answers."""
    config = yaml.safe_load((RULES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{metrics_port}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "tsdb"}
    options |= {"web.listen-address": address, "log.level": "warn"}
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    with (
        (folder / "prometheus.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            _await_readiness(process, address, folder / "prometheus.log")
            yield Prometheus(f"http://{address}")
        finally:
            process.kill()


def _await_readiness(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://{address}/-/ready", timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(log.read_text())
