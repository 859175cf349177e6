"""Calls in the words of a node, with a real host in this process and a core that touches the files it is told of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cinecat.engines.messages import (
    Condition,
    Conditioned,
    CoreConfig,
    Decode,
    Decoded,
    Failure,
    Save,
    Saved,
    Shot,
    Step,
    Stepped,
    StyleUse,
    Warm,
    Warmed,
)
from cinecat.server import ray_host
from cinecat.server.core_process import FrameBuffer
from cinecat.server.ray_host import CoreHost
from cinecat.server.ray_translation import Translation

CONFIG = CoreConfig(model="stub", device="cpu", dtype="float32", threads=1, style_slots=1, max_rank=8, cache_bytes=0)
SHOT = Shot("a", np.zeros((2, 3, 3), np.uint8), "", "", frames=5, steps=1, guidance_scale=1.0, seed=0, styles=())
SAVED = bytes(range(256)) * 10


def core_on_a_node(connection: Connection, config: CoreConfig) -> None:
    """Says in its notes what is in the files that a call names, and writes what it is asked to write."""
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        match call:
            case Condition(shot, checkpoint):
                worn = [Path(style.path).read_text() for style in shot.styles]
                found = Path(checkpoint).read_text() if checkpoint else "no checkpoint"
                connection.send(Conditioned((), 0, (*worn, found)))
            case Warm(style):
                connection.send(Warmed((), None) if Path(style.path).exists() else Failure("request", "no file"))  # type: ignore[arg-type]
            case Save("fails", _):
                connection.send(Failure("request", "cannot be written"))
            case Save(_, path):
                Path(path).write_bytes(SAVED)
                connection.send(Saved(0.0, len(SAVED)))
            case Step(profile=path):
                Path(path).write_bytes(b"recorded")
                connection.send(Stepped(0.5, ()))
            case Decode(_, buffer):
                memory = SharedMemory(buffer)
                memory.buf[:] = bytes(index % 251 for index in range(memory.size))
                memory.close()
                connection.send(Decoded(0, 4, 4, 0.0))


@dataclass
class Node:
    host: CoreHost
    asked: list[tuple[str, tuple[object, ...]]] = field(default_factory=list)

    def do(self, method: str, *arguments: object) -> Any:
        self.asked.append((method, arguments))
        return getattr(self.host, method)(*arguments)

    @property
    def folder(self) -> Path:
        return Path(self.host.hosted().folder)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name != "lock")

    def translation(self, **options: int) -> Translation:
        return Translation(self.do, self.folder, piece_bytes=1000, **options)

    def written(self) -> list[object]:
        return [arguments[0] for method, arguments in self.asked if method == "write"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's folder for temporary files."""
    folder = tmp_path / "node"
    folder.mkdir()
    monkeypatch.setattr(ray_host.tempfile, "gettempdir", lambda: str(folder))
    return folder


@pytest.fixture
def node(temporary: Path) -> Iterator[Node]:
    host = CoreHost(core_on_a_node, CONFIG)
    with contextlib.ExitStack() as stack:
        stack.callback(host.close)
        yield Node(host)


@pytest.fixture
def style(tmp_path: Path) -> Callable[[str], StyleUse]:
    def write(text: str) -> StyleUse:
        path = tmp_path / f"{text}.safetensors"
        path.write_text(text)
        return StyleUse(str(path), f"hash-of-{text}", 1.0)

    return write


def test_a_style_travels_once(node: Node, style: Callable[[str], StyleUse]) -> None:
    translation, dusk, dawn = node.translation(), style("dusk"), style("dawn")
    assert isinstance(translation.answer(Warm(dusk)), Warmed)
    said = translation.answer(Condition(replace(SHOT, styles=(dusk, dawn))))
    assert isinstance(said, Conditioned)
    assert said.notes == ("dusk", "dawn", "no checkpoint")
    translation.answer(Condition(replace(SHOT, styles=(dawn, dusk))))
    assert node.written() == ["hash-of-dusk.safetensors", "hash-of-dawn.safetensors"]


def test_styles_on_a_node_are_bounded_and_those_of_the_call_stay(node: Node, style: Callable[[str], StyleUse]) -> None:
    translation = node.translation(styles_bytes=9)
    first, second, third = (style(text) for text in ("aaaa", "bbbb", "cccc"))
    for each in (first, second, first, third):
        translation.answer(Warm(each))
    assert node.files() == ["hash-of-aaaa.safetensors", "hash-of-cccc.safetensors"]
    said = translation.answer(Condition(replace(SHOT, styles=(first, second, third))))
    assert isinstance(said, Conditioned)
    assert said.notes[:3] == ("aaaa", "bbbb", "cccc")


def test_a_style_that_is_gone_fails_its_request_alone(node: Node, tmp_path: Path) -> None:
    said = node.translation().answer(Warm(StyleUse(str(tmp_path / "gone.safetensors"), "hash", 1.0)))
    assert isinstance(said, Failure)
    assert (said.kind, said.fatal) == ("request", False)
    assert "gone.safetensors" in said.message


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 3000])
def test_a_checkpoint_travels_to_the_node_and_stays_there_for_one_call(node: Node, tmp_path: Path, size: int) -> None:
    checkpoint = tmp_path / "a.safetensors"
    checkpoint.write_text("x" * size)
    said = node.translation().answer(Condition(SHOT, str(checkpoint)))
    assert isinstance(said, Conditioned)
    assert said.notes == ("x" * size,)
    assert node.files() == []


def test_where_there_is_no_checkpoint_there_is_none_on_the_node(node: Node, tmp_path: Path) -> None:
    said = node.translation().answer(Condition(SHOT, str(tmp_path / "a.safetensors")))
    assert isinstance(said, Conditioned)
    assert said.notes == ("no checkpoint",)


def test_what_is_saved_on_the_node_comes_here_whole(node: Node, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    said = node.translation().answer(Save("a", str(target)))
    assert isinstance(said, Saved)
    assert said.seconds > 0
    assert target.read_bytes() == SAVED
    assert node.files() == []
    assert [path.name for path in tmp_path.iterdir()] == ["node", "a.safetensors"]


def test_a_save_that_breaks_off_leaves_the_checkpoint_that_was(node: Node, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"before")

    class NodeLost(Exception):
        pass

    def lost_while_reading(method: str, *arguments: object) -> Any:
        if method == "read" and arguments[1] == 2000:
            raise NodeLost
        return node.do(method, *arguments)

    translation = Translation(lost_while_reading, node.folder, piece_bytes=1000)
    with pytest.raises(NodeLost):
        translation.answer(Save("a", str(target)))
    assert target.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "node"]
    said = translation.answer(Save("fails", str(target)))
    assert said == Failure("request", "cannot be written")
    assert target.read_bytes() == b"before"


def test_a_recording_that_cannot_be_written_is_no_failure_of_the_step(node: Node, tmp_path: Path) -> None:
    translation = node.translation()
    assert translation.answer(Step(("a",), profile=str(tmp_path / "step-1.json.gz"))) == Stepped(0.5, ())
    assert (tmp_path / "step-1.json.gz").read_bytes() == b"recorded"
    assert translation.answer(Step(("a",), profile=str(tmp_path / "nowhere" / "step-2.json.gz"))) == Stepped(0.5, ())


def test_frames_come_into_the_buffer_of_the_front(node: Node) -> None:
    translation = node.translation()
    for height in (30, 40):  # another clip's frames are larger
        with contextlib.closing(FrameBuffer(height, 10, 4, "uint8")) as buffer:
            said = translation.answer(Decode("a", buffer.name, "uint8"))
            assert isinstance(said, Decoded)
            frames = buffer.frames(said)
        expected = np.arange(frames.size, dtype=np.int64) % 251
        np.testing.assert_array_equal(frames.reshape(-1), expected.astype(np.uint8))


def test_a_host_leaves_nothing_on_its_node(node: Node, temporary: Path, style: Callable[[str], StyleUse]) -> None:
    translation = node.translation()
    translation.answer(Warm(style("dusk")))
    with contextlib.closing(FrameBuffer(4, 4, 4, "uint8")) as buffer:
        translation.answer(Decode("a", buffer.name, "uint8"))
    frames = node.host.frame_buffer(1)
    node.host.close()
    assert [path.name for path in temporary.rglob("*") if path.name != "lock"] == [next(temporary.iterdir()).name]
    with pytest.raises(FileNotFoundError):
        SharedMemory(frames)


def test_a_host_removes_what_a_killed_one_left_and_nothing_of_those_that_live(node: Node, temporary: Path) -> None:
    abandoned = node.folder.parent / "abandoned"
    abandoned.mkdir()
    (abandoned / "style.safetensors").write_text("dusk")
    memory = SharedMemory("cinecat-abandoned", create=True, size=16)
    memory.close()
    other = CoreHost(core_on_a_node, CONFIG)
    try:
        assert not abandoned.exists()
        with pytest.raises(FileNotFoundError):
            SharedMemory("cinecat-abandoned")
        assert node.folder.exists()
    finally:
        other.close()
