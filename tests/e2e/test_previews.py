"""Pictures of a clip in the making, from the engine to the client's hand."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import av
import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cinecat import Client, Finished, InvalidRequest, JobState, Previews, Progress
from cinecat.v1 import clip_pb2, generation_pb2, generation_pb2_grpc
from cinecat.v1 import job_pb2 as pb

FRAMES, STEPS, EVERY, WIDTH, HEIGHT = 13, 7, 2, 96, 64
SMALL = {"prompt": "a cat looks up", "width": WIDTH, "height": HEIGHT, "frames": FRAMES, "steps": STEPS, "seed": 11}


def opened(webp: bytes) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(webp))
    assert image.format == "WEBP"
    return np.asarray(image.convert("RGB"))


def decoded_video(clip: bytes) -> NDArray[np.uint8]:
    with av.open(io.BytesIO(clip)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(first: NDArray[np.generic], second: NDArray[np.generic]) -> float:
    return 10 * math.log10(255**2 / max(1e-9, np.mean((first.astype(float) - second.astype(float)) ** 2)))


def shown_frames(events: list[Progress]) -> list[tuple[int, bytes]]:
    """Index and picture of every decoded frame, in the order in which they came."""
    previews = [event.preview for event in events if event.preview is not None]
    return [(frame.index, frame.webp) for preview in previews if not preview.is_estimate for frame in preview.frames]


@pytest.fixture(scope="module")
def watched(request: pytest.FixtureRequest, photograph: Path) -> Iterator[tuple[list[Progress], Finished]]:
    """A clip with all the pictures there are."""
    with Client(request.getfixturevalue("server").address) as client:
        asked = Previews(every_steps=EVERY, frames=True)
        *progress, finished = client.generate(image=photograph, previews=asked, **SMALL)
        assert isinstance(finished, Finished)
        yield [event for event in progress if isinstance(event, Progress)], finished


Watched = tuple[list[Progress], Finished]


def test_estimates_come_at_the_rate_asked_for(watched: Watched) -> None:
    estimates = [event for event in watched[0] if event.preview is not None and event.preview.is_estimate]
    assert [event.preview.step for event in estimates if event.preview] == list(range(EVERY, STEPS + 1, EVERY))
    for event in estimates:
        assert event.state in (JobState.DENOISING, JobState.DECODING)
        assert event.preview is not None
        assert [frame.index for frame in event.preview.frames] == list(range(0, FRAMES, 4))
        shapes = {opened(frame.webp).shape for frame in event.preview.frames}
        assert shapes == {(HEIGHT // 8, WIDTH // 8, 3)}


def test_the_first_decoded_frame_arrives_before_the_last_is_computed(watched: Watched) -> None:
    events, _ = watched
    first = next(event for event in events if shown_frames([event]))
    assert first.state is JobState.DECODING
    assert 0 < first.frames_decoded < first.total_frames == FRAMES


def test_every_decoded_frame_comes_once_and_in_order(watched: Watched) -> None:
    assert [index for index, _ in shown_frames(watched[0])] == list(range(FRAMES))


def test_decoded_frames_are_those_of_the_clip(watched: Watched) -> None:
    events, finished = watched
    assert finished.clip.data is not None
    video = decoded_video(finished.clip.data)
    pictures = [opened(webp) for _, webp in shown_frames(events)]
    assert [picture.shape for picture in pictures] == [(HEIGHT, WIDTH, 3)] * FRAMES
    assert min(psnr(picture, frame) for picture, frame in zip(pictures, video, strict=True)) >= 20.0
    assert psnr(np.stack(pictures), video[::-1]) < psnr(np.stack(pictures), video)


def test_the_last_estimate_resembles_the_clip(watched: Watched) -> None:
    events, finished = watched
    assert finished.clip.data is not None
    video = decoded_video(finished.clip.data)
    *_, last = [event.preview for event in events if event.preview is not None and event.preview.is_estimate]
    blocks = video.reshape(FRAMES, HEIGHT // 8, 8, WIDTH // 8, 8, 3).mean(axis=(2, 4))
    # A latent frame stands for four frames, the first for one.
    means = np.concatenate([blocks[:1], blocks[1:].reshape(-1, 4, *blocks.shape[1:]).mean(axis=1)])
    pictures = np.stack([opened(frame.webp) for frame in last.frames])
    assert psnr(pictures, means) >= 16.0
    assert psnr(pictures, means) > psnr(np.full_like(means, means.mean()), means)


def test_without_asking_there_are_no_pictures(client: Client, photograph: Path) -> None:
    *events, _ = client.generate(image=photograph, **SMALL)
    assert [event.preview for event in events if isinstance(event, Progress)] == [None] * len(events)


@pytest.mark.parametrize(
    ("asked", "estimates", "frames"), [(Previews(every_steps=STEPS), 1, 0), (Previews(frames=True), 0, FRAMES)]
)
def test_one_kind_of_picture_comes_without_the_other(
    client: Client, photograph: Path, asked: Previews, estimates: int, frames: int
) -> None:
    events = [
        event for event in client.generate(image=photograph, previews=asked, **SMALL) if isinstance(event, Progress)
    ]
    assert sum(event.preview is not None and event.preview.is_estimate for event in events) == estimates
    assert len(shown_frames(events)) == frames


def test_pictures_change_nothing_about_the_clip(client: Client, photograph: Path, watched: Watched) -> None:
    plain = client.generate(image=photograph, **SMALL).result()
    assert watched[1].clip.data is not None
    assert plain.data is not None
    np.testing.assert_array_equal(decoded_video(plain.data), decoded_video(watched[1].clip.data))


def test_who_comes_back_misses_no_frame_and_sees_none_twice(client: Client, photograph: Path) -> None:
    job = client.submit(image=photograph, previews=Previews(every_steps=1, frames=True), **SMALL)
    seen: list[Progress] = []
    for event in client.watch(job.job_id):
        if isinstance(event, Progress):
            seen.append(event)
            if shown_frames([event]):
                break
    rest = [event for event in client.watch(job.job_id, seen[-1].sequence) if isinstance(event, Progress)]
    assert [index for index, _ in shown_frames(seen + rest)] == list(range(FRAMES))


def test_a_job_tells_what_was_asked_for(client: Client, photograph: Path) -> None:
    asked = Previews(every_steps=3, frames=True)
    job = client.submit(image=photograph, priority="interactive", previews=asked, **SMALL)
    assert (job.priority, job.previews) == ("interactive", asked)
    plain = client.submit(image=photograph, **SMALL)
    assert (plain.priority, plain.previews) == ("batch", Previews())
    for job_id in (job.job_id, plain.job_id):
        client.cancel(job_id)


def test_a_rate_that_gives_no_estimate_is_refused(client: Client, photograph: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.submit(image=photograph, previews=Previews(every_steps=STEPS + 1), **SMALL)
    assert [violation.field for violation in refused.value.violations] == ["previews.every_steps"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"priority": 99}, "priority"), ({"previews": pb.Previews(every_steps=-1)}, "previews.every_steps")],
)
def test_what_the_client_would_not_send_is_refused_too(
    generation: generation_pb2_grpc.GenerationStub, small_clip: clip_pb2.ClipSpec, fields: dict[str, object], field: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        generation.Submit(generation_pb2.SubmitRequest(clip=small_clip, **fields))  # type: ignore[arg-type]
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in str(refused.value.details())
