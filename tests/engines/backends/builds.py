"""What tests of the store run in processes of their own. Imports nothing that is slow to import."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cinecat.engines.backends.store import EngineStore
from cinecat.engines.backends.store_key import EngineKey

KEY = EngineKey.of({"model": "ab12", "backend": "tensorrt", "bucket": (2, 320), "styles": True})


def key(number: int) -> EngineKey:
    return EngineKey.of({**KEY.fields, "number": number})


def write_engine(folder: Path, content: bytes = b"engine") -> None:
    (folder / "weights").mkdir()
    (folder / "plan.engine").write_bytes(content)
    (folder / "weights" / "0.bin").write_bytes(bytes(range(256)) * 64)


def wait_for(path: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def build_and_log(root: Path, notes: Path) -> None:
    """Builds KEY slowly, with one line in `notes` for each time that it is really built."""

    def make(folder: Path) -> None:
        with (notes / "made").open("a") as file:
            file.write(f"{os.getpid()}\n")
        (notes / "building").touch()
        wait_for(notes / "go-on")
        write_engine(folder)

    files = EngineStore(root, None).build(KEY, make)
    (notes / f"done-{os.getpid()}").write_text((files / "plan.engine").read_text())


def build_forever(root: Path, notes: Path) -> None:
    """Writes half an engine, says so and stays there until it is killed."""

    def make(folder: Path) -> None:
        write_engine(folder)
        (notes / "half").touch()
        time.sleep(300)

    EngineStore(root, None).build(KEY, make)


def hold(root: Path, notes: Path) -> None:
    """Uses KEY until it is killed."""
    store = EngineStore(root, None)
    assert store.get(KEY)
    (notes / "held").touch()
    time.sleep(300)


def churn(root: Path, notes: Path) -> None:
    """Builds, takes, checks and prunes a few keys, again and again; what it got must be whole."""
    store = EngineStore(root, 40_000)
    for turn in range(40):
        number = (os.getpid() + turn) % 4
        files = store.build(key(number), lambda folder, number=number: write_engine(folder, bytes([number]) * 999))  # type: ignore[misc]
        assert (files / "plan.engine").read_bytes() == bytes([number]) * 999
        assert (files / "weights" / "0.bin").stat().st_size == 256 * 64
        store.release(key(number))
        if turn % 8 == 0:
            store.prune(0)
    (notes / f"churned-{os.getpid()}").touch()


def die_everywhere(root: Path, notes: Path) -> None:
    """Builds KEY, and prunes it, in children that die before their nth file operation, for every n.

    After each death the store holds a whole engine or none, and builds and prunes as ever.
    """
    deaths = []
    for work in (lambda: EngineStore(root, None).build(KEY, write_engine), lambda: EngineStore(root, None).prune(0)):
        operation = 0
        while dies_before(operation, work):
            operation += 1
            store = EngineStore(root, None)
            assert all(store.verify(entry) == [] for entry in store.entries()), operation
            files = store.get(KEY)
            assert files is None or (files / "plan.engine").read_bytes() == b"engine", operation
            assert (store.build(KEY, write_engine) / "weights" / "0.bin").exists(), operation
            assert [path.name for path in root.iterdir() if path.name != ".locks"] == [KEY.digest], operation
            store.close()
            if len(deaths) == 0:  # children build where nothing is, and prune where something is
                assert len(store.prune(0).removed) == 1
        deaths.append(operation)
    (notes / "deaths").write_text(" ".join(map(str, deaths)))


def dies_before(operation: int, work: Callable[[], object]) -> bool:
    """Whether a child that would die there got there."""
    child = os.fork()
    if child == 0:
        left = operation

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime", "fcntl.flock"):
                if left == 0:
                    os._exit(9)
                left -= 1

        sys.addaudithook(count)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    return os.waitstatus_to_exitcode(status) == 9


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
