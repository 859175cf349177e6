"""Steps of a job are recorded on demand, where the operator allows it, and the clip is the same."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from cinecat import CinecatError, Client, JobState
from cinecat.cli import jobs
from cinecat.server.local_server import LocalServer
from tests.e2e.conftest import ServerFactory


def test_a_server_that_allows_no_recording_says_what_would(server: LocalServer, photograph: Path) -> None:
    with Client(server.address) as client:
        job = client.submit(image=photograph, prompt="a cat", size="64x64", frames=5, steps=2)
        with pytest.raises(CinecatError, match="setting profile_dir"):
            list(client.profile(job.job_id))


@pytest.mark.slow
def test_recorded_steps_are_files_for_perfetto_and_change_no_bit(
    start_server: ServerFactory, tmp_path: Path, photograph: Path
) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / ".0-step-1.json.gz").touch()  # of a core that was killed
    with (
        start_server(tmp_path, "--max-batch", "1", "--profile-dir", str(folder)) as server,
        Client(server.address) as client,
    ):
        assert list(folder.iterdir()) == []

        def submit(prompt: str) -> str:
            job = client.submit(
                image=photograph, prompt=prompt, size="64x64", frames=5, steps=40, seed=3, artifacts=["frames_f32"]
            )
            return job.job_id

        def frames(job_id: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            while not client.job(job_id).state.is_final:
                time.sleep(0.1)
            return load_file(client.download(job_id, tmp_path / f"{job_id}.safetensors"))["frames"]

        profiled, plain = submit("a cat"), submit("a cat")
        recording = client.profile(profiled, 6)
        recorded = [next(recording)]
        with pytest.raises(CinecatError, match="are being recorded already"):
            list(client.profile(profiled))
        recorded += recording
        assert [Path(each.path).name for each in recorded] == [
            f"{profiled}-step-{each.step}.json.gz" for each in recorded
        ]
        assert recorded[1].step == recorded[0].step + 1
        for each in recorded:
            events = json.loads(gzip.decompress(Path(each.path).read_bytes()))["traceEvents"]
            assert any("aten::" in event.get("name", "") for event in events)
        assert sorted(folder.iterdir()) == sorted(Path(each.path) for each in recorded)

        shown = CliRunner().invoke(jobs.app, ["profile", plain, "--server", server.address, "--json"])
        assert shown.exit_code == 0, shown.output
        assert len(json.loads(shown.stdout)) == 1

        assert (frames(profiled) == frames(plain)).all()
        other = submit("another")
        shutil.rmtree(folder)
        with pytest.raises(CinecatError, match="could not be written"):
            list(client.profile(other))
        with pytest.raises(CinecatError, match="succeeded"):
            list(client.profile(profiled))
        with pytest.raises(CinecatError, match="not between 1 and 20"):
            list(client.profile(other, 21))
        with pytest.raises(CinecatError):
            list(client.profile("0" * 32))
        (job,) = [job for job in client.jobs() if job.state is not JobState.SUCCEEDED]
        client.cancel(job.job_id)
