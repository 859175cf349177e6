"""`cinecat engines accept` as the command line runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from cinecat.cli import extensions
from cinecat.cli.app import run
from cinecat.engines.backends import choice
from cinecat.engines.backends.acceptance import Acceptance, BackendReport, Timing
from cinecat.engines.backends.acceptance_page import page, speed
from tests.engines.backends.sample_stack import FakeBackend

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "cinecat.engines.backends.commands:app"
    monkeypatch.setattr(extensions, "installed", lambda: {"engines": EntryPoint("engines", target, extensions.GROUP)})
    for name in ("CINECAT_ENGINE_CACHE_DIR", "CINECAT_ENGINE_CACHE_GIB"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def accept(micro: Path, tmp_path: Path, capsys: Captured) -> Callable[..., tuple[int, Any, str]]:
    """Runs the command; its exit code, what it printed as JSON, and the page, if there is one."""
    cache, report = tmp_path / "engines", tmp_path / "accept.html"
    cache.mkdir()

    def run_it(*arguments: str, size: str = "64x64x5") -> tuple[int, Any, str]:
        fixed = ("--model", micro, "--size", size, "--pairs", "2", "--style-slots", "2", "--max-rank", "4")
        command = ("engines", "accept", *fixed, "--engine-cache-dir", cache, "--report", report, "--json", *arguments)
        code = run([str(word) for word in command])
        found = json.loads(capsys.readouterr().out)
        return code, found, report.read_text() if report.exists() else ""

    return run_it


def use(monkeypatch: pytest.MonkeyPatch, *backends: FakeBackend) -> None:
    monkeypatch.setattr(choice, "BACKENDS", backends)


def test_torch_passes_on_both_paths_plain_styled_and_mixed(accept: Callable[..., tuple[int, Any, str]]) -> None:
    code, found, html = accept("--backend", "torch")
    assert (code, found["accepted"]) == (0, True)
    (torch_report,) = found["backends"]
    assert torch_report["state"] == "passed"
    kinds = {tuple(outcome["name"].split(",")[0].split()) for outcome in torch_report["outcomes"]}
    assert kinds == {(path, wear) for path in ("uniform", "cat") for wear in ("plain", "styled", "mixed")}
    uniform, cat = torch_report["timings"]
    assert set(uniform["seconds"]) == {"torch", "diffusers"}
    assert cat["tokens"] < uniform["tokens"]
    assert len(uniform["seconds"]["diffusers"]) == 2
    assert "accepted" in html


def test_a_backend_that_gives_wrong_numbers_is_not_accepted(
    accept: Callable[..., tuple[int, Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = FakeBackend("wrong", lambda output: output + 0.01 * output.roll(1, -1))
    broken = FakeBackend("broken", lambda output: output * torch.nan)
    use(monkeypatch, wrong, broken, FakeBackend("right", lambda output: output))
    code, found, html = accept()
    states = {backend["name"]: backend["state"] for backend in found["backends"]}
    assert (code, found["accepted"]) == (1, False)
    assert states == {"torch": "passed", "wrong": "failed", "broken": "failed", "right": "passed"}
    assert "6 of 6 cases differ from diffusers" in found["backends"][1]["message"]
    assert "not accepted" in html


def test_one_that_cannot_run_here_is_told_and_does_not_count(
    accept: Callable[..., tuple[int, Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(
        monkeypatch, FakeBackend("absent", lambda output: output, missing="absent: no <driver>; apt-get install driver")
    )
    code, found, html = accept()
    assert code == 0
    assert found["backends"][1]["state"] == "missing"
    assert "absent: no &lt;driver&gt;; apt-get install driver" in html


def test_one_that_cannot_be_built_is_not_accepted_and_the_others_are_tried(
    accept: Callable[..., tuple[int, Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeBackend("unbuilt", lambda output: output, built=False))
    code, found, html = accept()
    assert code == 1
    assert [backend["state"] for backend in found["backends"]] == ["passed", "failed"]
    assert "&lt;compiler&gt; crashed" in html


@pytest.mark.parametrize(
    ("arguments", "size", "told"),
    [
        (("--backend", "quantum"), "64x64x5", "'quantum' is none that is built"),
        ((), "60x64x5", "60x64x5: width and height are"),
    ],
)
def test_a_wrong_backend_or_size_is_refused(
    accept: Callable[..., tuple[int, Any, str]],
    arguments: tuple[str, ...],
    size: str,
    told: str,
) -> None:
    code, found, html = accept("--backend", "torch", *arguments, size=size)
    assert (code, html) == (2, "")
    assert told in json.dumps(found)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [name for name, _ in attributes if name in ("src", "href")] + [tag] * (tag == "script")


def test_the_page_needs_nothing_else_and_escapes_what_others_wrote() -> None:
    seconds = {"torch": (0.2, 0.3, 0.4), "diffusers": (0.4, 0.6, 0.8), "x<y>": (0.1, 0.15, 0.2)}
    backend = BackendReport("x<y>", "failed", "<script>", {}, timings=(Timing("64x64x5", "uniform", 32, seconds),))
    html = page(Acceptance({"GPU": "<b>"}, {"torch": "2"}, {"model": "<i>"}, (backend,)))
    parser = _Links()
    parser.feed(html)
    assert parser.found == []
    assert "&lt;script&gt;" in html
    assert "<b>" not in html
    assert (speed(backend, "diffusers"), speed(backend, "torch")) == ("0.25", "0.50")


@pytest.mark.slow
def test_every_backend_that_can_run_here_is_accepted(accept: Callable[..., tuple[int, Any, str]]) -> None:
    code, found, _ = accept()
    states = {backend["name"]: backend["state"] for backend in found["backends"]}
    assert code == 0, found
    assert states["torch"] == states["onnxruntime"] == states["inductor"] == "passed"
    assert set(states) == {"torch", *(backend.name for backend in choice.BACKENDS)}
