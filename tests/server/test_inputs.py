"""What accepted jobs are made from lies on disk exactly as it was accepted, until they end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cinecat.plugins.registry import UnknownStyle
from cinecat.server.inputs import JobInputs


@pytest.fixture
def inputs(tmp_path: Path) -> JobInputs:
    return JobInputs(tmp_path / "data" / "inputs")


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "data" / "inputs").iterdir())


def test_a_frame_comes_back_bit_for_bit(inputs: JobInputs, frame: NDArray[np.uint8]) -> None:
    inputs.save("a", frame)
    loaded = inputs.load("a")
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, frame)


def test_only_whole_frames_are_left_behind(inputs: JobInputs, tmp_path: Path, frame: NDArray[np.uint8]) -> None:
    inputs.save("a", frame)
    assert names(tmp_path) == ["a.png"]


def test_a_deleted_frame_is_gone_and_may_be_deleted_again(inputs: JobInputs, frame: NDArray[np.uint8]) -> None:
    inputs.save("a", frame)
    inputs.delete("a")
    inputs.delete("a")
    with pytest.raises(FileNotFoundError):
        inputs.load("a")


def test_only_wanted_frames_outlive_a_restart(inputs: JobInputs, tmp_path: Path, frame: NDArray[np.uint8]) -> None:
    for name in ("a", "b", "c"):
        inputs.save(name, frame)
    (tmp_path / "data" / "inputs" / "d.tmp").write_bytes(b"torn")
    JobInputs(tmp_path / "data" / "inputs").keep_only({"b": [], "never-saved": [""]})
    assert names(tmp_path) == ["b.png"]


FINGERPRINT = "f" * 64


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A LoRA file in a styles folder."""
    path = tmp_path / "noir.safetensors"
    path.write_bytes(b"noir")
    return path


def kept(inputs: JobInputs) -> bytes | None:
    path = inputs.weights(FINGERPRINT)
    return None if path is None else path.read_bytes()


def test_weights_that_were_replaced_or_removed_are_kept_for_the_jobs_that_wear_them(
    inputs: JobInputs, weights: Path, frame: NDArray[np.uint8]
) -> None:
    inputs.save("a", frame, {FINGERPRINT: weights})
    weights.unlink()
    weights.write_bytes(b"another")
    assert kept(inputs) == b"noir"
    path = inputs.weights(FINGERPRINT)
    assert path is not None
    assert path.name == "noir.safetensors"


def test_weights_go_with_the_last_job_that_wears_them(
    inputs: JobInputs, tmp_path: Path, weights: Path, frame: NDArray[np.uint8]
) -> None:
    for job in ("a", "b"):
        inputs.save(job, frame, {FINGERPRINT: weights})
    assert inputs.wearers(FINGERPRINT) == 2
    inputs.delete("a")
    inputs.delete("a")
    assert (inputs.wearers(FINGERPRINT), kept(inputs)) == (1, b"noir")
    inputs.delete("b")
    assert (inputs.wearers(FINGERPRINT), kept(inputs)) == (0, None)
    assert list((tmp_path / "data" / "inputs" / "styles").iterdir()) == []
    assert weights.read_bytes() == b"noir"


def test_weights_take_no_second_place_on_the_same_disk(
    inputs: JobInputs, weights: Path, frame: NDArray[np.uint8]
) -> None:
    inputs.save("a", frame, {FINGERPRINT: weights})
    path = inputs.weights(FINGERPRINT)
    assert path is not None
    assert path.samefile(weights)


def test_weights_on_another_filesystem_are_copied(
    inputs: JobInputs, weights: Path, frame: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_filesystem(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("cinecat.server.inputs.os.link", other_filesystem)
    inputs.save("a", frame, {FINGERPRINT: weights})
    weights.write_bytes(b"written in place")
    assert kept(inputs) == b"noir"


def test_a_link_keeps_what_it_leads_to(
    inputs: JobInputs, tmp_path: Path, weights: Path, frame: NDArray[np.uint8]
) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(weights)
    inputs.save("a", frame, {FINGERPRINT: link})
    link.unlink()
    weights.unlink()
    assert kept(inputs) == b"noir"


def test_a_job_whose_weights_are_gone_is_not_saved(inputs: JobInputs, tmp_path: Path, frame: NDArray[np.uint8]) -> None:
    with pytest.raises(UnknownStyle, match=r"gone\.safetensors was removed just now; ask again"):
        inputs.save("a", frame, {FINGERPRINT: tmp_path / "gone.safetensors"})
    assert (inputs.wearers(FINGERPRINT), kept(inputs)) == (0, None)
    assert names(tmp_path) == ["styles"]


def test_only_weights_of_unfinished_jobs_outlive_a_restart(
    inputs: JobInputs, tmp_path: Path, weights: Path, frame: NDArray[np.uint8]
) -> None:
    ended = "e" * 64
    inputs.save("a", frame, {FINGERPRINT: weights})
    inputs.save("b", frame, {ended: weights})
    weights.unlink()
    restarted = JobInputs(tmp_path / "data" / "inputs")
    restarted.keep_only({"a": [FINGERPRINT, ""]})
    assert (kept(restarted), restarted.wearers(FINGERPRINT)) == (b"noir", 1)
    assert restarted.weights(ended) is None
    restarted.delete("a")
    assert kept(restarted) is None


def test_jobs_that_come_and_go_at_once_never_lose_their_weights(
    inputs: JobInputs, weights: Path, frame: NDArray[np.uint8]
) -> None:
    def job(number: int) -> bytes | None:
        inputs.save(f"job-{number}", frame, {FINGERPRINT: weights})
        found = kept(inputs)
        inputs.delete(f"job-{number}")
        return found

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(job, range(60))) == {b"noir"}
    assert kept(inputs) is None
