"""The checked-in stubs are what the protos generate."""

import os
import sys
from pathlib import Path

import pytest

from tests.protos.stubs import PROTOS, generate


def read_stubs(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "cinecat" / "v1").glob("*_pb2*.py*")}


def test_stubs_are_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # protoc finds its plugins on PATH, and a virtual environment need not be activated.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    generate(tmp_path)
    generated = read_stubs(tmp_path)
    assert len(generated) == 16
    assert generated == read_stubs(PROTOS), "the stubs are out of date; run: make stubs"
