"""A folder of clips: what is taken, what is left out and why, and how a clip is brought to a shape."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cinecat.engines.training.film_set import write_video
from cinecat.engines.training.styles.clips import ClipError, ClipShape, find_clips, first_frame, read_clip
from cinecat.engines.training.styles.encoded import cached_path
from tests.engines.training.styles.samples import picture, write_clip

SHAPE = ClipShape(32, 32, 5, 8.0)


def test_a_caption_is_read_from_beside_its_clip(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", "a red star\n moves ")
    clips, problems = find_clips(tmp_path, SHAPE)
    assert [(clip.path.name, clip.caption) for clip in clips] == [("a.mp4", "a red star moves")]
    assert problems == []


@pytest.mark.parametrize("keys", [("file_name", "text"), ("video", "caption"), ("path", "prompt")])
def test_captions_are_read_from_a_metadata_file(keys: tuple[str, str], tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", "beside")
    write_clip(tmp_path / "b.mp4", "kept")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(dict(zip(keys, ("a.mp4", "told"), strict=True))) + "\n\n")
    clips, problems = find_clips(tmp_path, SHAPE)
    assert [clip.caption for clip in clips] == ["told", "kept"]
    assert problems == []


def test_what_cannot_be_trained_on_is_named_with_the_reason(tmp_path: Path) -> None:
    write_clip(tmp_path / "bare.mp4")
    write_clip(tmp_path / "good.mp4", "good")
    write_clip(tmp_path / "short.mp4", "short", frames=4)
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.txt").write_text("a caption")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "../gone.mp4", "text": "x"}\n{"file_name": "good.mp4"}\n')
    clips, problems = find_clips(tmp_path, SHAPE)
    assert [clip.path.name for clip in clips] == ["good.mp4"]
    assert [problem.partition(" (")[0] for problem in problems] == [
        'metadata.jsonl: line 2 is not {"file_name": "...", "text": "..."}',
        "../gone.mp4: is named in metadata.jsonl, and there is no such video in the folder",
        "bare.mp4: has no caption; write one into bare.txt or metadata.jsonl",
        "short.mp4: is too short: 4 frames at 8 a second, 5 are needed; leave it out, or train on fewer frames",
        "text.mp4: cannot be read as video",
    ]


def test_a_number_beside_a_clip_is_the_seed_of_its_noise(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write_clip(tmp_path / f"{name}.mp4", name)
    (tmp_path / "b.seed").write_text("17\n")
    (tmp_path / "c.seed").write_text("seventeen")
    (tmp_path / "d.seed").write_text("-1")
    clips, problems = find_clips(tmp_path, SHAPE)
    assert [(clip.caption, clip.seed) for clip in clips] == [("a", None), ("b", 17)]
    assert problems == [
        "c.seed: does not hold the seed of a request, a whole number",
        "d.seed: -1 is not the seed of a request, 0 to 2^63 - 1",
    ]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="is not a folder"):
        find_clips(tmp_path / "none", SHAPE)


def test_frames_are_taken_at_the_shapes_rate(tmp_path: Path) -> None:
    path = tmp_path / "fast.mp4"
    write_video(path, picture(10), 16.0)
    frames = read_clip(path, SHAPE)
    assert frames.shape == (5, 32, 32, 3)
    assert frames.dtype == np.uint8
    assert frames[:, 16, 4].mean(axis=-1) == pytest.approx([200, 208, 216, 224, 232], abs=2)


def test_a_wide_clip_loses_its_sides(tmp_path: Path) -> None:
    film = np.zeros((5, 32, 96, 3), dtype=np.uint8)
    film[:, :, 32:64] = 255
    write_video(tmp_path / "wide.mp4", film, 8.0)
    assert read_clip(tmp_path / "wide.mp4", SHAPE)[:, :, 2:-2].min() > 240


def test_a_rotated_clip_is_turned_upright(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    # A quarter to the right, as telephones write it: what is on the left comes to the top.
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frame = read_clip(path, SHAPE)[0]
    assert frame[:14].min() > 150
    assert frame[18:].max() < 50


def test_a_picture_beside_a_clip_is_what_it_is_made_from(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", "with a picture")
    write_clip(tmp_path / "b.mp4", "without")
    Image.new("RGBA", (64, 32), (250, 10, 10, 255)).save(tmp_path / "a.webp", lossless=True)
    clips, problems = find_clips(tmp_path, SHAPE)
    assert problems == []
    assert first_frame(clips[0], SHAPE).shape == (32, 32, 3)
    assert first_frame(clips[0], SHAPE).reshape(-1, 3).tolist() == [[250, 10, 10]] * 1024
    assert np.array_equal(first_frame(clips[1], SHAPE), read_clip(tmp_path / "b.mp4", SHAPE)[0])


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", "with a picture")
    (tmp_path / "a.png").write_text("not a picture")
    clips, problems = find_clips(tmp_path, SHAPE)
    assert clips == []
    assert [problem.partition(" (")[0] for problem in problems] == ["a.png: cannot be read as a picture"]


def test_another_picture_is_encoded_anew(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", "with a picture")
    paths = []
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "a.png")
        ((clip,), _) = find_clips(tmp_path, SHAPE)
        paths.append(cached_path(clip, clip.caption, SHAPE, "model", tmp_path))
    assert paths[0] != paths[1]
