"""First frames lie on disk exactly as they were accepted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

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
    JobInputs(tmp_path / "data" / "inputs").keep_only(["b", "never-saved"])
    assert names(tmp_path) == ["b.png"]
