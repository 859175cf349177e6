"""What is read from an entry, whatever somebody put there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinecat.engines.backends.store_entry import (
    MANIFEST,
    BrokenEntry,
    Manifest,
    StoredFile,
    inspect_entry,
)
from tests.engines.backends.builds import KEY

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    tuple(place.split("/"))
    for place in (
        "version key key/bucket created build_seconds files files/c files/c/size_bytes files/c/sha256".split()
    )
]
GOOD = Manifest(KEY, 1_700_000_000.5, 12.25, {"a/b.bin": StoredFile(3, "ab" * 32), "c": StoredFile(0, "cd" * 32)})


def changed(path: tuple[str, ...], value: object) -> str:
    """The good manifest with another value in one place."""
    manifest = json.loads(GOOD.to_json())
    part = manifest
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    return json.dumps(manifest)


def test_a_manifest_survives_being_written_and_read() -> None:
    assert Manifest.from_json(GOOD.to_json()) == GOOD


@given(
    st.sampled_from(PLACES),
    JSON,
)
def test_whatever_a_manifest_says_it_is_read_or_refused(path: tuple[str, ...], value: Any) -> None:
    try:
        manifest = Manifest.from_json(changed(path, value))
    except BrokenEntry:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@given(st.binary(max_size=200) | st.integers(0, 400).map(lambda size: GOOD.to_json().encode()[:size]))
def test_bytes_that_are_no_manifest_are_refused(content: bytes) -> None:
    with pytest.raises(BrokenEntry):
        Manifest.from_json(content)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": 1, "key": {"a": ' + "[" * 900 + "]" * 900 + "}}"])
def test_a_manifest_that_is_nested_without_end_is_refused(text: str) -> None:
    with pytest.raises(BrokenEntry):
        Manifest.from_json(text)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "", ".", "a//b", "a/", "./a", "a\0b"])
def test_a_path_that_leaves_the_entry_is_refused(name: str) -> None:
    manifest = json.loads(GOOD.to_json())
    manifest["files"] = {name: {"size_bytes": 1, "sha256": "00" * 32}}
    with pytest.raises(BrokenEntry, match="not a path inside the entry"):
        Manifest.from_json(json.dumps(manifest))


@pytest.mark.parametrize("version", [0, 2, "1", True, None, [1]])
def test_a_manifest_of_another_version_is_refused_by_its_version(version: object) -> None:
    with pytest.raises(BrokenEntry, match="version"):
        Manifest.from_json(changed(("version",), version))


def test_what_cannot_be_looked_at_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / KEY.digest
    (folder / "engine").mkdir(parents=True)

    def too_many(path: object) -> None:
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(os, "scandir", too_many)
    with pytest.raises(OSError, match="Too many open files"):
        inspect_entry(folder)


def test_a_manifest_that_is_a_pipe_does_not_block(tmp_path: Path) -> None:
    folder = tmp_path / KEY.digest
    (folder / "engine").mkdir(parents=True)
    (folder / "used").touch()
    os.mkfifo(folder / MANIFEST)
    assert inspect_entry(folder).problems == ("manifest.json is not a file",)
