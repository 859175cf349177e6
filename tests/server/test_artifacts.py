"""Frames become files that keep colours, counts and metadata, and that are visible only when they are whole."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from numpy.typing import NDArray
from safetensors import safe_open

from cinecat.server.artifacts import (
    CHUNK_BYTES,
    ArtifactError,
    ArtifactFormat,
    ArtifactNotFoundError,
    ArtifactStore,
    WrittenArtifact,
)
from cinecat.server.mux import ClipShape, clip_metadata, exact_rate, open_writer

JOB = "0123456789abcdef0123456789abcdef"
OTHER_JOB = "f" * 32
SHAPE = ClipShape(width=96, height=64, frames=5, rate=Fraction(16))
SETTINGS = {"seed": 7, "prompt": 'rain, "neon" — 夜', "styles": [{"name": "noir", "strength": 0.8}], "steps": 4}
METADATA = clip_metadata(str(SETTINGS["prompt"]), SETTINGS)
NOISE = np.random.default_rng(3).integers(0, 256, (5, 64, 96, 3)).astype(np.uint8)
SMOOTH = np.stack([np.mgrid[0:64, 0:96].sum(axis=0) + 5 * frame for frame in range(5)]).astype(np.uint8)[..., None]
FRAMES = np.repeat(SMOOTH, 3, axis=-1)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    url = str(tmp_path / "store") if request.param == "local" else "memory://clips"
    store = ArtifactStore(url)
    yield store
    store.close()
    MemoryFileSystem.store.clear()


@contextmanager
def small_disk() -> Iterator[None]:
    """A disk on which no file can grow beyond 20 kB. No fixture: pytest's own report may go to a longer file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write(path: Path, format: ArtifactFormat, *chunks: NDArray[Any], shape: ClipShape = SHAPE) -> WrittenArtifact:
    writer = open_writer(format, path, shape, METADATA)
    for chunk in chunks:
        writer.write(chunk)
    return writer.finish()


def write_file(store: ArtifactStore, content: bytes) -> WrittenArtifact:
    path = store.scratch_path(JOB, ArtifactFormat.MP4_H264)
    path.write_bytes(content)
    return WrittenArtifact(path, ArtifactFormat.MP4_H264)


def read_mp4(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# --- mp4 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5])
def test_an_mp4_has_the_frames_and_the_size_asked_for(tmp_path: Path, frames: int) -> None:
    shape = ClipShape(96, 64, frames, Fraction(16))
    written = write(tmp_path / "clip.mp4", ArtifactFormat.MP4_H264, FRAMES[:frames], shape=shape)
    assert read_mp4(written.path).shape == (frames, 64, 96, 3)


def test_an_mp4_shows_the_frames_in_order(tmp_path: Path) -> None:
    written = write(tmp_path / "clip.mp4", ArtifactFormat.MP4_H264, FRAMES[:2], FRAMES[2:])
    assert np.abs(read_mp4(written.path).astype(int) - FRAMES).mean() < 1.5


@pytest.mark.parametrize(
    "colour",
    [
        (0, 0, 0),
        (255, 255, 255),
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (128, 128, 128),
        (200, 30, 90),
        (17, 200, 140),
        (250, 240, 10),
    ],
)
def test_a_flat_colour_survives_an_mp4(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    flat = np.broadcast_to(np.array(colour, np.uint8), (5, 64, 96, 3))
    written = write(tmp_path / "clip.mp4", ArtifactFormat.MP4_H264, flat)
    assert np.abs(read_mp4(written.path).astype(int) - colour).max() <= 2


def test_an_mp4_is_in_bt709_of_limited_range_and_says_so(tmp_path: Path) -> None:
    red = np.broadcast_to(np.array((255, 0, 0), np.uint8), (5, 64, 96, 3))
    written = write(tmp_path / "clip.mp4", ArtifactFormat.MP4_H264, red)
    with av.open(str(written.path)) as container:
        codec = container.streams.video[0].codec_context
        luma, cb, cr = (np.frombuffer(plane, np.uint8)[0] for plane in next(container.decode(video=0)).planes)
        assert (codec.color_range, codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1, 1)
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    # ITU-R BT.709: 16 + 219 * 0.2126, 128 - 224 * 0.2126 / 1.8556, 240. By BT.601 luma would be 81.
    assert (abs(int(luma) - 63), abs(int(cb) - 102), abs(int(cr) - 240)) <= (1, 1, 1)


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (16.0, Fraction(16)),
        (24.0, Fraction(24)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
        (0.5, Fraction(1, 2)),
    ],
)
def test_the_frame_rate_of_an_mp4_is_exact(tmp_path: Path, fps: float, rate: Fraction) -> None:
    shape = ClipShape(96, 64, 5, exact_rate(fps))
    written = write(tmp_path / "clip.mp4", ArtifactFormat.MP4_H264, FRAMES, shape=shape)
    with av.open(str(written.path)) as container:
        stream = container.streams.video[0]
        times = [frame.pts * stream.time_base for frame in container.decode(video=0)]
        assert stream.average_rate == rate
    assert times == [index / rate for index in range(5)]


@pytest.mark.parametrize("fps", [0.0, -5.0, float("nan"), float("inf")])
def test_a_frame_rate_that_is_none_is_refused(fps: float) -> None:
    with pytest.raises(ValueError, match="fps must be"):
        exact_rate(fps)


def test_the_index_of_an_mp4_stands_in_front(tmp_path: Path) -> None:
    content = write(tmp_path / "clip.mp4", ArtifactFormat.MP4_H264, FRAMES).path.read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_the_settings_travel_in_the_mp4(tmp_path: Path) -> None:
    written = write(tmp_path / "clip.mp4", ArtifactFormat.MP4_H264, FRAMES)
    with av.open(str(written.path)) as container:
        assert container.metadata["title"] == SETTINGS["prompt"]
        assert json.loads(container.metadata["comment"]) == SETTINGS


def test_a_prompt_with_a_zero_byte_keeps_its_words() -> None:
    assert clip_metadata("a\0b", {})["title"] == "a b"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_become_the_same_mp4_as_their_8_bit_values(tmp_path: Path, dtype: type) -> None:
    from_bytes = write(tmp_path / "a.mp4", ArtifactFormat.MP4_H264, FRAMES)
    from_floats = write(tmp_path / "b.mp4", ArtifactFormat.MP4_H264, (FRAMES / 255).astype(dtype))
    assert np.array_equal(read_mp4(from_bytes.path), read_mp4(from_floats.path))


def test_floats_outside_the_range_are_clipped_in_an_mp4(tmp_path: Path) -> None:
    frames = np.full((5, 64, 96, 3), 1.5, np.float32)
    frames[:, :, :48] = -0.5
    pixels = read_mp4(write(tmp_path / "clip.mp4", ArtifactFormat.MP4_H264, frames).path)
    assert (pixels[:, :, :32].max(), pixels[:, :, 64:].min()) == (0, 255)


def test_an_odd_size_cannot_be_an_mp4(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="even width and height, not 95x64"):
        open_writer(ArtifactFormat.MP4_H264, tmp_path / "clip.mp4", ClipShape(95, 64, 5, Fraction(16)), METADATA)


# --- frames -----------------------------------------------------------------------------------------------------------


def test_frames_f32_holds_the_very_values_that_were_written(tmp_path: Path) -> None:
    frames = np.random.default_rng(1).random((5, 64, 96, 3), np.float32)
    written = write(tmp_path / "frames.safetensors", ArtifactFormat.FRAMES_F32, frames[:1], frames[1:])
    with safe_open(written.path, "numpy") as file:
        assert list(file.keys()) == ["frames"]
        assert np.array_equal(file.get_tensor("frames"), frames)
        assert file.get_tensor("frames").dtype == np.float32
        assert file.metadata()["title"] == SETTINGS["prompt"]
        assert json.loads(file.metadata()["comment"]) == SETTINGS


def test_frames_f32_takes_8_bit_frames(tmp_path: Path) -> None:
    written = write(tmp_path / "frames.safetensors", ArtifactFormat.FRAMES_F32, NOISE)
    with safe_open(written.path, "numpy") as file:
        assert np.array_equal(file.get_tensor("frames"), NOISE.astype(np.float32) / np.float32(255))


# --- writers ----------------------------------------------------------------------------------------------------------

FORMATS = pytest.mark.parametrize("format", ArtifactFormat)


@FORMATS
@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        (NOISE[..., :2], r"shape \[n, 64, 96, 3\], not \[5, 64, 96, 2\]"),
        (NOISE[0], r"not \[64, 96, 3\]"),
        (NOISE.astype(np.int32), "uint8 or floating point, not int32"),
        (np.concatenate([NOISE, NOISE]), "has 5 frames; 10 were given"),
    ],
)
def test_frames_of_another_kind_are_refused(
    tmp_path: Path, format: ArtifactFormat, frames: NDArray[Any], sentence: str
) -> None:
    writer = open_writer(format, tmp_path / "file", SHAPE, METADATA)
    with pytest.raises(ValueError, match=sentence):
        writer.write(frames)
    writer.abort()


@FORMATS
def test_a_clip_that_lacks_frames_is_not_finished(tmp_path: Path, format: ArtifactFormat) -> None:
    writer = open_writer(format, tmp_path / "file", SHAPE, METADATA)
    writer.write(NOISE[:3])
    with pytest.raises(ArtifactError, match="3 of 5 frames"):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


@FORMATS
def test_abort_leaves_nothing_and_may_be_repeated(tmp_path: Path, format: ArtifactFormat) -> None:
    writer = open_writer(format, tmp_path / "file", SHAPE, METADATA)
    writer.write(NOISE[:3])
    writer.abort()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@FORMATS
def test_a_full_disk_is_an_artifact_error_and_leaves_nothing(tmp_path: Path, format: ArtifactFormat) -> None:
    with small_disk(), pytest.raises(ArtifactError, match=r"cannot write file: File too large"):
        write(tmp_path / "file", format, NOISE)
    assert list(tmp_path.iterdir()) == []


@FORMATS
def test_a_folder_that_is_missing_is_an_artifact_error(tmp_path: Path, format: ArtifactFormat) -> None:
    with pytest.raises(ArtifactError, match="cannot write file: No such file"):
        open_writer(format, tmp_path / "missing" / "file", SHAPE, METADATA)


# --- store ------------------------------------------------------------------------------------------------------------


def test_a_published_artifact_is_described_and_read_back(store: ArtifactStore) -> None:
    content = b"clip" * 200_000
    written = write_file(store, content)
    info = store.publish(JOB, written)
    assert (info.name, info.format, info.mime_type) == ("clip.mp4", ArtifactFormat.MP4_H264, "video/mp4")
    assert (info.size_bytes, info.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert store.size(JOB, "clip.mp4") == len(content)
    chunks = list(store.open_range(JOB, "clip.mp4"))
    assert b"".join(chunks) == content
    assert max(map(len, chunks)) == CHUNK_BYTES
    assert not written.path.exists()


@pytest.mark.parametrize("offset", [1, 7, 10])
def test_reading_resumes_from_an_offset(store: ArtifactStore, offset: int) -> None:
    store.publish(JOB, write_file(store, b"0123456789"))
    assert b"".join(store.open_range(JOB, "clip.mp4", offset)) == b"0123456789"[offset:]


@pytest.mark.parametrize("offset", [-1, 11])
def test_an_offset_outside_the_file_is_refused(store: ArtifactStore, offset: int) -> None:
    store.publish(JOB, write_file(store, b"0123456789"))
    with pytest.raises(ValueError, match=f"offset {offset} is outside the artifact, which has 10 bytes"):
        store.open_range(JOB, "clip.mp4", offset)


def test_an_unknown_artifact_is_not_found(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactNotFoundError):
        store.open_range(JOB, "clip.mp4")
    with pytest.raises(ArtifactNotFoundError):
        store.size(JOB, "clip.mp4")


@pytest.mark.parametrize("job_id", ["", "..", "../" + JOB, JOB.upper(), JOB + "\n", JOB[:-1], JOB + "/x"])
def test_a_job_id_cannot_leave_the_store(store: ArtifactStore, job_id: str) -> None:
    with pytest.raises(ArtifactNotFoundError, match="32 hexadecimal digits"):
        store.open_range(job_id, "clip.mp4")
    with pytest.raises(ArtifactNotFoundError, match="32 hexadecimal digits"):
        store.delete_job(job_id)


@pytest.mark.parametrize("name", ["", ".", "..", "../clip.mp4", "/etc/passwd", ".clip.mp4", "a/b", "a\0", "clip.mp4\n"])
def test_a_name_cannot_leave_its_job(store: ArtifactStore, name: str) -> None:
    with pytest.raises(ArtifactNotFoundError, match="not the name of an artifact"):
        store.open_range(JOB, name)


def test_publishing_again_replaces_the_artifact(store: ArtifactStore) -> None:
    store.publish(JOB, write_file(store, b"first"))
    store.publish(JOB, write_file(store, b"second"))
    assert b"".join(store.open_range(JOB, "clip.mp4")) == b"second"


def test_deleting_a_job_removes_its_files_and_no_others(store: ArtifactStore) -> None:
    store.publish(JOB, write_file(store, b"mine"))
    store.publish(OTHER_JOB, write_file(store, b"theirs"))
    store.delete_job(JOB)
    store.delete_job(JOB)
    with pytest.raises(ArtifactNotFoundError):
        store.size(JOB, "clip.mp4")
    assert store.size(OTHER_JOB, "clip.mp4") == 6


def test_leftovers_of_a_dead_server_are_cleared(store: ArtifactStore) -> None:
    written = write_file(store, b"half a cl")
    store.clear_scratch()
    assert not written.path.exists()


def test_a_failed_local_publish_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    store = ArtifactStore(str(tmp_path))
    written = write_file(store, b"clip")
    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(ArtifactError, match=f"cannot store clip.mp4 of job {JOB}: No space left on device"):
        store.publish(JOB, written)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("step", ["put_file", "mv"])
def test_a_failed_upload_leaves_nothing(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def torn(self: MemoryFileSystem, source: str, target: str) -> None:
        self.pipe_file(target, b"half")
        raise OSError(104, "Connection reset by peer")

    def unreachable(self: MemoryFileSystem, source: str, target: str) -> None:
        raise OSError(104, "Connection reset by peer")

    store = ArtifactStore("memory://clips")
    written = write_file(store, b"a whole clip")
    monkeypatch.setattr(MemoryFileSystem, step, {"put_file": torn, "mv": unreachable}[step])
    with pytest.raises(ArtifactError, match="Connection reset by peer"):
        store.publish(JOB, written)
    assert MemoryFileSystem.store == {}
    assert not written.path.exists()
    store.close()


def test_an_upload_is_visible_only_once_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    put_file = MemoryFileSystem.put_file

    def watched(self: MemoryFileSystem, source: str, target: str) -> None:
        put_file(self, source, target)
        seen.append(self.exists(f"/clips/jobs/{JOB}/clip.mp4"))

    store = ArtifactStore("memory://clips")
    monkeypatch.setattr(MemoryFileSystem, "put_file", watched)
    store.publish(JOB, write_file(store, b"clip"))
    assert seen == [False]
    assert store.size(JOB, "clip.mp4") == 4
    store.close()
    MemoryFileSystem.store.clear()


def test_a_store_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ArtifactError, match="cannot open the artifact store 'nosuch://bucket'"):
        ArtifactStore("nosuch://bucket")
