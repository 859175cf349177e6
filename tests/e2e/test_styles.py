"""Styles come and go while the server runs, and every clip wears exactly what it was accepted with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load

from cinecat import Client, InvalidRequest
from cinecat.cli.app import run
from cinecat.clip import Job
from cinecat.errors import NotFound, WrongState
from cinecat.server.local_server import LocalServer
from tests.server.style_uploads import weights

CLIP: dict[str, Any] = {
    "prompt": "a cat",
    "size": "64x64",
    "frames": 5,
    "steps": 2,
    "seed": 5,
    "artifacts": ("frames_f32",),
}

# Weights that were resident once may still be.
_seeds = itertools.count(1)


@pytest.fixture
def dusk(client: Client, tmp_path: Path) -> Iterator[Path]:
    """An installed style, which is gone again after the test, and the folder for its weights files."""
    path = tmp_path / "dusk.safetensors"
    path.write_bytes(weights(next(_seeds)))
    client.install_style(path, name="dusk")
    yield tmp_path
    for style in client.styles():
        if style.name == "dusk":
            client.remove_style("dusk", style.version)


def frames(client: Client, image: bytes, style: str | None = None, **fields: Any) -> bytes:
    """The frames of a clip that is made now, as bytes."""
    data = client.generate(image=image, style=style, **CLIP, **fields).result().data
    assert data is not None
    return load(data)["frames"].tobytes()


def finished(client: Client, job: Job) -> bytes:
    """The frames of a job, once it is done."""
    for _ in client.watch(job.job_id):
        pass
    return load(client.download(job.job_id))["frames"].tobytes()


def test_a_job_wears_what_it_was_accepted_with_whatever_becomes_of_the_style(
    client: Client, dusk: Path, frame_png: bytes
) -> None:
    before = frames(client, frame_png, "dusk")
    waiting = [client.submit(image=frame_png, style="dusk", **CLIP) for _ in range(3)]
    removed = client.remove_style("dusk")
    assert removed.jobs > 0
    (dusk / "dusk.safetensors").write_bytes(weights(next(_seeds)))
    replaced = client.install_style(dusk / "dusk.safetensors", name="dusk", version=removed.version).style
    assert replaced.fingerprint != removed.fingerprint
    assert [finished(client, job) for job in waiting] == [before] * 3
    assert frames(client, frame_png, "dusk") != before


def test_a_clip_with_no_version_wears_the_newest_and_older_ones_can_be_named(
    client: Client, dusk: Path, frame_png: bytes
) -> None:
    old = frames(client, frame_png, "dusk")
    (dusk / "dusk.safetensors").write_bytes(weights(next(_seeds)))
    assert client.install_style(dusk / "dusk.safetensors", name="dusk").style.version == "1.0.1"
    assert frames(client, frame_png, "dusk") != old
    assert frames(client, frame_png, "dusk@1.0.0") == old


def test_residency_and_uses_are_told(client: Client, dusk: Path, frame_png: bytes) -> None:
    assert not client.style("dusk").resident
    warmed = client.warm_style("dusk")
    assert warmed.resident
    assert warmed.slot_bytes > 0
    frames(client, frame_png, "dusk")
    used = client.style("dusk")
    assert (used.slots, used.uses, used.jobs) == (warmed.slots, 1, 0)
    assert used.last_use_time is not None


def test_a_style_decides_what_the_request_leaves_open(client: Client, dusk: Path, frame_png: bytes) -> None:
    client.install_style(
        dusk / "dusk.safetensors", name="dusk", prompt_template="at dusk, {prompt}", steps=1, guidance=1.0, shift=5.0
    )
    clip = client.generate(image=frame_png, prompt="a cat", style="dusk", size="64x64", frames=1).result()
    assert (clip.prompt, clip.steps, clip.guidance, clip.shift) == ("at dusk, a cat", 1, 1.0, 5.0)
    assert "steps: 1, from style dusk" in clip.notes


def test_a_shift_changes_the_clip_and_the_models_own_does_not(client: Client, frame_png: bytes) -> None:
    own = client.generate(image=frame_png, **CLIP).result().shift
    assert frames(client, frame_png, shift=own) == frames(client, frame_png)
    assert frames(client, frame_png, shift=own * 3) != frames(client, frame_png)


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        (weights(size=5120), WrongState, "was made for a 5120 -> 5120"),
        (weights()[:-1], InvalidRequest, "truncated"),
    ],
)
def test_an_upload_that_does_not_fit_leaves_the_server_as_it_was(
    client: Client, tmp_path: Path, frame_png: bytes, data: bytes, kind: type[Exception], said: str
) -> None:
    before = client.styles()
    (tmp_path / "dusk.safetensors").write_bytes(data)
    with pytest.raises(kind, match=said):
        client.install_style(tmp_path / "dusk.safetensors", name="dusk")
    assert client.styles() == before
    assert frames(client, frame_png, "noir")


def test_what_comes_with_cinecat_stays(client: Client) -> None:
    with pytest.raises(WrongState, match="comes with Cinecat"):
        client.remove_style("noir")
    with pytest.raises(NotFound, match="no style 'nior'; did you mean noir"):
        client.warm_style("nior")


def test_the_command_line_takes_a_style_through_its_life(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CINECAT_SERVER", server.address)
    (tmp_path / "dusk.safetensors").write_bytes(weights(next(_seeds)))
    for arguments, said in [
        (["install", str(tmp_path / "dusk.safetensors"), "--name", "dusk", "--steps", "3"], "dusk@1.0.0: installed"),
        (["install", str(tmp_path / "dusk.safetensors"), "--name", "dusk", "--steps", "3"], "was there already"),
        (["warm", "dusk"], "dusk@1.0.0: in slot "),
        (["show", "dusk@1.0.0"], "diffusers"),
        (["list"], "installed"),
        (["remove", "dusk"], "dusk@1.0.0: removed"),
    ]:
        assert run(["styles", *arguments]) == 0
        assert said in capsys.readouterr().out
    assert run(["styles", "remove", "dusk"]) == 2
