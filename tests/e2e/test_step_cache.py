"""A clip some of whose steps are cached, asked for over gRPC."""

from __future__ import annotations

from pathlib import Path

import pytest

from cinecat import Client, InvalidRequest
from cinecat.server.local_server import LocalServer
from cinecat.server.top import scrape

SHOT = {"prompt": "a cat", "size": "64x64", "frames": 5, "seed": 4}


def steps(server: LocalServer, name: str) -> float:
    return scrape(f"http://127.0.0.1:{server.metrics_port}/metrics").total(f"cinecat_{name}_total")


def test_a_clip_tells_which_of_its_steps_ran(client: Client, server: LocalServer, photograph: Path) -> None:
    ran, cached = steps(server, "engine_steps"), steps(server, "cached_steps")
    clip = client.generate(image=photograph, steps=6, run_steps=3, **SHOT).result()
    assert clip.step_tokens == (32, 0, 0, 0, 32, 32)
    assert (clip.run_steps, clip.steps_run, clip.keep_ratio) == (3, 3, 0.5)
    assert "steps: caching is lossy; 3 of 6 steps run the model" in clip.notes
    assert (steps(server, "engine_steps"), steps(server, "cached_steps")) == (ran + 3, cached + 3)


def test_more_steps_than_there_are_cannot_run(client: Client, photograph: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate(image=photograph, run_steps=100, **SHOT).result()
    assert [violation.field for violation in caught.value.violations] == ["clip.run_steps"]
