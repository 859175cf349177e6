"""An image, a prompt and a style become a clip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from safetensors.numpy import load_file

from cinecat import Client
from cinecat.server.local_server import LocalServer
from cinecat.v1 import clip_pb2, generation_pb2, generation_pb2_grpc
from cinecat.v1 import job_pb2 as pb

SMALL = {"prompt": "a cat looks up", "width": 96, "height": 64, "frames": 9, "steps": 2, "seed": 11, "fps": 12}


def test_a_clip_is_an_mp4_of_the_size_length_and_rate_asked_for(
    client: Client, photograph: Path, tmp_path: Path
) -> None:
    clip = client.generate(image=photograph, style="noir:0.5", output=tmp_path / "clip.mp4", **SMALL).result()
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        settings = json.loads(container.metadata["comment"])
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 12)
    assert np.shape(frames) == (9, 64, 96, 3)
    assert (settings["seed"], settings["prompt"]) == ("11", "a cat looks up")
    (worn,) = clip.styles
    assert settings["styles"] == [
        {"name": "noir", "version": "1.0.0", "strength": 0.5, "fingerprint": worn.fingerprint}
    ]
    assert worn.fingerprint == client.style("noir").fingerprint
    assert (clip.seed, clip.frames, clip.tokens_used, clip.tokens_uniform) == (11, 9, 72, 72)


def test_the_index_of_an_mp4_comes_before_its_frames(client: Client, photograph: Path, tmp_path: Path) -> None:
    clip = client.generate(image=photograph, **SMALL).result()
    assert clip.data is not None
    assert 0 < clip.data.index(b"moov") < clip.data.index(b"mdat")


def test_a_seed_repeats_a_clip_and_a_style_changes_it(client: Client, photograph: Path) -> None:
    def frames(style: str | None) -> np.ndarray:
        clip = client.generate(image=photograph, style=style, artifacts=("frames_f32",), **SMALL).result()
        return np.frombuffer(clip.data[-9 * 64 * 96 * 3 * 4 :], dtype="<f4")

    plain, again, noir, weaker, amber = (frames(style) for style in (None, None, "noir", "noir:0.2", "amber"))
    np.testing.assert_array_equal(plain, again)
    assert 1e-3 < np.abs(plain - weaker).mean() < np.abs(plain - noir).mean()
    assert np.abs(noir - amber).mean() > 0.01


def test_events_tell_every_state_and_every_step_in_order(
    generation: generation_pb2_grpc.GenerationStub, small_clip: clip_pb2.ClipSpec
) -> None:
    events = list(generation.Generate(generation_pb2.GenerateRequest(clip=small_clip)))
    states = list(dict.fromkeys(event.job.state for event in events))
    assert states == [
        pb.JOB_STATE_QUEUED,
        pb.JOB_STATE_CONDITIONING,
        pb.JOB_STATE_DENOISING,
        pb.JOB_STATE_DECODING,
        pb.JOB_STATE_ENCODING,
        pb.JOB_STATE_SUCCEEDED,
    ]
    sequences = [event.sequence for event in events]
    assert sequences == sorted(set(sequences))
    assert [event.job.progress.step for event in events][-1] == 2
    assert any(event.job.progress.HasField("eta") for event in events)
    assert {timing.stage for timing in events[-1].job.result.timings} == {
        pb.STAGE_QUEUE,
        pb.STAGE_TEXT_ENCODE,
        pb.STAGE_IMAGE_ENCODE,
        pb.STAGE_VAE_ENCODE,
        pb.STAGE_DENOISE,
        pb.STAGE_VAE_DECODE,
        pb.STAGE_MUX,
    }


def test_the_second_request_for_a_shot_skips_its_encoding(
    generation: generation_pb2_grpc.GenerationStub, small_clip: clip_pb2.ClipSpec
) -> None:
    small_clip.prompt = "a prompt that no other test uses"

    def cached() -> dict[int, bool]:
        *_, last = generation.Generate(generation_pb2.GenerateRequest(clip=small_clip))
        return {timing.stage: timing.cached for timing in last.job.result.timings}

    assert not cached()[pb.STAGE_TEXT_ENCODE]
    again = cached()
    assert again[pb.STAGE_TEXT_ENCODE]
    assert again[pb.STAGE_IMAGE_ENCODE]
    assert again[pb.STAGE_VAE_ENCODE]


def test_one_request_may_ask_for_both_files(client: Client, photograph: Path, tmp_path: Path) -> None:
    clip = client.generate(image=photograph, artifacts=("mp4", "frames_f32"), **SMALL).result()
    assert [artifact.format for artifact in clip.artifacts] == ["mp4", "frames_f32"]
    client.download(clip.job_id, output=tmp_path / "frames.safetensors", artifact="frames.safetensors")
    frames = load_file(tmp_path / "frames.safetensors")["frames"]
    assert (frames.shape, frames.dtype) == ((9, 64, 96, 3), np.float32)
    assert 0.0 <= frames.min() < frames.max() <= 1.0


def test_the_answer_says_what_was_done_to_the_image(client: Client, photograph: Path) -> None:
    clip = client.generate(image=photograph, **SMALL).result()
    assert clip.notes == ("image: cropped from 451x300 to 450x300, then scaled to 96x64",)


def test_the_command_line_prints_one_json_object(server: LocalServer, photograph: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cinecat.cli", "generate", str(photograph), "--server", server.address, "--json"]
    command += ["--prompt", "a cat", "--style", "noir:0.8", "--style", "amber:0.5", "--size", "64x64", "--seed", "3"]
    command += ["--frames", "5", "--steps", "2", "--guidance", "1", "--fps", "6", "-o", str(tmp_path / "out.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["status"] == "succeeded"
    assert (answer["frames"], answer["width"], answer["height"], answer["fps"], answer["seed"]) == (5, 64, 64, 6, 3)
    assert (answer["style"], answer["tokenization"], answer["engine"]) == ("noir:0.8+amber:0.5", "uniform", "torch")
    assert {"job_id", "output", "tokens_used", "tokens_uniform", "timings"} <= set(answer)
    assert (tmp_path / "out.mp4").stat().st_size > 0


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_every_fit_gives_the_size_asked_for(client: Client, photograph: Path, fit: str) -> None:
    clip = client.generate(image=photograph, fit=fit, **{**SMALL, "frames": 1, "steps": 1}).result()
    assert (clip.width, clip.height, clip.frames) == (96, 64, 1)
