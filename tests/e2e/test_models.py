"""One server with two models over real gRPC: which of them a request is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cinecat import Client
from cinecat.errors import NotFound

CONFIG = '[models.small]\nmodel = "wan-tiny"\ndefault_size = "64x64x5"\nmax_steps = 40\n'


def test_a_request_gets_the_model_that_it_names_or_that_its_size_fits(
    start_server: Any, tmp_path: Path, frame_png: bytes
) -> None:
    config = tmp_path / "cinecat.toml"
    config.write_text(CONFIG)
    with (
        start_server(tmp_path, "--engine", "torch", "--config", str(config)) as server,
        Client(server.address) as client,
    ):

        def submit(**fields: Any) -> str:
            shape = {"frames": 5, "steps": 2, "guidance": 1.0} | fields
            return client.submit(image=frame_png, prompt="a cat", **shape).job_id

        first, small = client.models()
        assert (first.name, small.name, first.fingerprint == small.fingerprint) == ("wan-tiny", "small", True)
        assert len(server.core_pids) == 2
        chosen = {
            "small": [{"width": 64, "height": 64}, {"model": "small"}, {"width": 48, "height": 64, "style": "noir"}],
            "wan-tiny": [{}, {"width": 96, "height": 64}, {"width": 160, "height": 160}, {"model": "wan-tiny"}],
        }
        for model, asked in chosen.items():
            for fields in asked:
                job_id = submit(**fields)
                list(client.watch(job_id))  # raises where it failed
                assert client.job(job_id).settings.model == model
        with pytest.raises(NotFound, match="'large' is not loaded; loaded: wan-tiny, small"):
            submit(model="large")
        assert client.style("noir").models == ("wan-tiny", "small")
